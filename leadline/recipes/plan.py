"""What a model costs: parameters, FLOPs per token, cache and training memory.

usage: leadline plan PRESET|FOLDER [--context N] [--json] [--show] [key=value ...]

PRESET is flash, pro, nano or tiny; FOLDER is a checkpoint folder, or its config.json. N is the number of tokens in the
context: 1048576, or 1M, or 128K (binary multiples); without it, the longest context that the model is made for. A
key=value replaces one field of the configuration, --show prints the configuration instead.

All numbers are closed forms (leadline/model/accounting.py); no tensor is built. DeepSeek-V3.2 stands next to them,
counted by the same rule. FLOPs are equivalent FP8 FLOPs: BF16 products count twice, FP4 x FP4 products half.

  leadline plan pro --context 1M
  leadline plan flash --context 128K --json
  leadline plan flash index_topk=1024 num_hash_layers=0
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from leadline import cli
from leadline.model import accounting, v32
from leadline.model.config import PRESETS, ModelConfig

V32_NAME = "DeepSeek-V3.2"


class PlanError(ValueError):
    """A request that cannot be planned; the message names the word and the remedy."""


@dataclass(frozen=True)
class Request:
    """One command line of `leadline plan`."""

    model: str
    context: int | None = None
    as_json: bool = False
    overrides: tuple[str, ...] = ()


def parse(arguments: Sequence[str]) -> Request:
    """Read the command line; `--context N`, `--context=N` and `context=N` are the same."""
    models: list[str] = []
    request = Request(model="")
    words = iter(arguments)
    for word in words:
        name, _, value = word.partition("=")
        if name in ("--context", "context"):
            request = replace(request, context=_context(value or next(words, "")))
        elif word == "--json":
            request = replace(request, as_json=True)
        elif "=" in word or word == "--show":
            request = replace(request, overrides=(*request.overrides, word))
        elif word.startswith("-"):
            raise PlanError(f"unknown option '{word}': the options are --context N, --json and --show")
        else:
            models.append(word)
    if len(models) != 1:
        raise PlanError(f"expected one preset or checkpoint folder, got {' '.join(models) or 'none'}")
    return replace(request, model=models[0])


def _context(text: str) -> int:
    try:
        context = cli.integer(text)
    except ValueError:
        context = 0
    if context < 1:
        raise PlanError(f"--context '{text}': expected a positive number of tokens, such as 4096, 128K or 1M")
    return context


def load(model: str) -> ModelConfig:
    """A preset by name, or the configuration of a checkpoint folder."""
    if model not in PRESETS and Path(model).exists():
        return ModelConfig.from_file(model)
    return cli.find(model, PRESETS, "preset or folder")


def plan(config: ModelConfig, context: int) -> dict[str, Any]:
    """All numbers of the plan as plain data: counts, FLOPs in equivalent FP8 FLOPs, sizes in bytes."""
    flops, flops_v32 = accounting.decode_flops(config, context), v32.decode_flops(context)
    cache, cache_v32 = accounting.kv_cache_bytes(config, context), v32.kv_cache_bytes(context)
    memory = accounting.training_memory(config)
    return {
        "context": context,
        "parameters_total": accounting.parameters_total(config),
        "parameters_active": accounting.parameters_active(config),
        "flops_per_token": flops.equivalent_fp8,
        "flops_ratio_v32": flops.equivalent_fp8 / flops_v32.equivalent_fp8,
        "kv_cache_bytes": cache,
        "kv_cache_ratio_v32": cache / cache_v32,
        "max_position_embeddings": config.max_position_embeddings,
        "parameters": accounting.parameter_breakdown(config),
        "parameters_active_with_embedding": accounting.parameters_active(config, with_embedding=True),
        "parameters_mtp_block": accounting.parameters_mtp_block(config),
        "flops": _flops_by_term(flops),
        "kv_cache": accounting.kv_cache_breakdown(
            config, context, accounting.entry_bytes(config), accounting.index_key_bytes(config)
        ),
        "kv_cache_bytes_bf16": accounting.kv_cache_bytes_bf16(config, context),
        "tail_bytes": accounting.tail_bytes(config),
        "training_memory": {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "muon_momentum": memory.muon_momentum,
            "adamw_moments": memory.adamw_moments,
            "total": memory.total,
            "stream_bytes_per_token": memory.stream_bytes_per_token,
        },
        "v32": {
            "parameters_total": v32.parameters_total(),
            "parameters_active": v32.parameters_active(),
            "flops_per_token": flops_v32.equivalent_fp8,
            "flops": _flops_by_term(flops_v32),
            "kv_cache_bytes": cache_v32,
            "kv_cache_bytes_bf16": v32.kv_cache_bytes_bf16(context),
        },
    }


def _flops_by_term(flops: accounting.DecodeFlops) -> dict[str, float]:
    """The terms in equivalent FP8 FLOPs, so that they sum to the total."""
    return {
        "fp8_linears": flops.fp8_linears * accounting.FP8_WEIGHT,
        "fp4_experts": flops.fp4_experts * accounting.FP8_WEIGHT,
        "bf16_linears": flops.bf16_linears * accounting.BF16_WEIGHT,
        "core_attention": flops.core_attention * accounting.BF16_WEIGHT,
        "index_scores": flops.index_scores * flops.index_weight,
    }


# -- the printed page ----------------------------------------------------------------------------------------------


def scaled(amount: float, unit: str = "") -> str:
    """A quantity with four digits and a decimal prefix: 319.4 GFLOP, 5.280 GB."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if amount >= 10**power:
            digits = amount / 10**power
            return f"{digits:.{max(0, 4 - len(str(int(digits))))}f} {prefix}{unit}"
    return f"{amount:g} {unit}"


def size(amount: float) -> str:
    """Bytes, with a decimal prefix."""
    return scaled(amount, "B")


def flop(amount: float) -> str:
    """FLOPs, with a decimal prefix."""
    return scaled(amount, "FLOP")


def count(amount: float) -> str:
    """Parameters as the field writes them: billions with two decimals, smaller counts in millions."""
    return f"{amount / 1e9:.2f}B" if amount >= 1e8 else f"{amount / 1e6:.3f}M"


def summary_table(name: str, values: dict[str, Any]) -> Table:
    """The model and V3.2 side by side."""
    table = _table("", name, V32_NAME, "ratio")
    for label, key, write in (
        ("parameters, total", "parameters_total", count),
        ("parameters, active per token", "parameters_active", count),
        ("FLOPs per decoded token (FP8 equiv.)", "flops_per_token", flop),
        ("KV cache, served formats", "kv_cache_bytes", size),
        ("KV cache, all in BF16", "kv_cache_bytes_bf16", size),
    ):
        ours, theirs = values[key], values["v32"][key]
        table.add_row(label, write(ours), write(theirs), f"{ours / theirs:.1%}")
    return table


def share_table(parts: Mapping[str, float], write: Callable[[float], str]) -> Table:
    """The parts of a sum with their shares."""
    total = sum(parts.values())
    table = _table("", "amount", "share")
    for label, amount in parts.items():
        table.add_row(label.replace("_", " "), write(amount), f"{amount / total:.1%}" if total else "")
    table.add_row("sum", write(total), "", style="bold")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", min_width=0 if number else 18)
    return table


def render(name: str, values: dict[str, Any], console: Console) -> None:
    """Print the plan as tables."""
    longest, memory = values["max_position_embeddings"], dict(values["training_memory"])
    streams, _ = memory.pop("stream_bytes_per_token"), memory.pop("total")

    console.print(f"{name} at a context of {values['context']:,} tokens", style="bold")
    if values["context"] > longest:
        console.print(f"The model is made for at most {longest:,} tokens.", style="yellow")
    console.print(summary_table(name, values))

    console.print("Parameters", style="bold")
    console.print(share_table(values["parameters"], count))
    console.print(
        f"{count(values['parameters_active_with_embedding'])} are active with the embedding table counted. "
        f"Each MTP block adds {count(values['parameters_mtp_block'])}.\n"
    )
    console.print("FLOPs per decoded token (FP8 equivalent)", style="bold")
    console.print(share_table(values["flops"], flop))
    console.print("KV cache of one sequence", style="bold")
    console.print(share_table(values["kv_cache"], size))
    console.print(f"Unfinished tails add {size(values['tail_bytes'])} in FP32, at any length.\n")
    console.print("Training memory, everything in FP32, MTP blocks included", style="bold")
    console.print(share_table(memory, size))
    console.print(
        f"Activations come on top: {size(streams)} per token for the streams between blocks when every\n"
        "block is recomputed in the backward pass, and the working set of one block."
    )


def main(arguments: list[str]) -> int:
    """Run `leadline plan`; returns the exit code."""
    request = parse(arguments)
    config, show = cli.resolve(load(request.model), request.overrides)
    if show:
        print(cli.show(config))
        return 0
    values = plan(config, request.context or config.max_position_embeddings)
    if request.as_json:
        print(json.dumps(values, indent=2))
    else:
        render(request.model, values, Console(highlight=False))
    return 0
