"""The engine with a model of V4-Flash's shape on one card: decoding and prefill at contexts up to a million tokens.

usage: python benchmarks/engine_h100.py [--layers 43] [--experts 64] [--contexts 4K,128K,1M] [--chunk 8192]
                                        [--batch 64] [--full-prompt TOKENS] [--out FILE] [--commit HASH]
       python benchmarks/engine_h100.py --peer [--experts 64] [--out FILE] [--commit HASH]

The model has all widths of V4-Flash and random weights: experts in FP4, linear maps in FP8, the cache packed. Of the
256 experts of a layer 64 are there, so that it fits on one card; a token visits 6 of them, as in the original, so the
work and the bytes of a token are the same.

*Decoding* at a context of n tokens: the engine is put where it is after n tokens, with pages of random contents, and
decodes greedily through captured steps, which overlap; so the time of one is that of a run of 40, divided. Beside it
stands what the card alone takes for a step. The *byte floor* is every weight that a token uses, read once, and the
index keys, entries and window that it looks at, at the bandwidth that a device copy reaches in the same run.

*Prefill*: chunks at growing depths, timed one by one; MFU counts the operations of the report's formula
(model/accounting.py, every product as two operations, whatever its format) against the bfloat16 product measured in
the same run. With --full-prompt, a whole prompt goes in from the first token to the last.

With --peer, nothing of this is measured, but a few of the layers beside transformers (`engine_peer.py`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import random
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from engine_peer import PeerError, Sizes
from engine_peer import measure as measure_peer
from machine import commit as this_commit
from rich.console import Console
from rich.table import Table
from torch import Tensor

from leadline import cli
from leadline.engine.engine import Engine, Settings
from leadline.engine.graph import FixedSteps
from leadline.engine.prefix import WindowPolicy
from leadline.engine.request import Request, Sampling
from leadline.model import accounting
from leadline.model.cache_format import PACKED
from leadline.model.config import CSA_RATIO, FLASH, HCA_RATIO, ModelConfig
from leadline.model.linear import Linear
from leadline.model.moe import Experts
from leadline.model.page_table import num_pages
from leadline.model.transformer import Transformer
from leadline.ops.quantized_linear import QuantizedWeight
from leadline.quant.policy import RELEASED
from leadline.recipes.bench import append
from leadline.recipes.bench_ops.clock import Ceilings, measure_ceilings

DEVICE = torch.device("cuda")
GREEDY = Sampling(temperature=0.0)
RUN_STEPS = 40


# -- the model -----------------------------------------------------------------------------------------------------


def build(config: ModelConfig) -> Transformer:
    """A model with random weights in the released formats, made where it lies: no master copy ever exists."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(config.replace(torch_dtype="bfloat16"), cache_format=PACKED, with_mtp=False)
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            for stack in ("w1", "w2", "w3"):
                module.hold(_random_fp4(getattr(module, stack).shape), stack)
        elif isinstance(module, Linear) and RELEASED.format_of(f"{name}.weight") == "fp8":
            # wo_a takes the values, in bfloat16; the others hold codes.
            module.weight = torch.nn.Parameter(module.weight.to(torch.bfloat16), requires_grad=False)
            module.hold(_random_fp8(module.weight.shape))
    model.requires_grad_(requires_grad=False)
    for owner in model.modules():
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            if tensor is not None and tensor.is_meta:
                _materialise(owner, name, tensor, config)
    return model


def _materialise(owner: torch.nn.Module, name: str, tensor: Tensor, config: ModelConfig) -> None:
    if not tensor.is_floating_point():
        fresh = torch.randint(0, config.n_routed_experts, tensor.shape, device=DEVICE)
    else:
        fresh = torch.randn(tensor.shape, device=DEVICE) * (tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.1)
        if type(owner).__name__ == "Norm":
            fresh = 1 + fresh
        small = tensor.ndim > 1 and name == "weight"
        fresh = fresh.to(torch.bfloat16) if small or type(owner).__name__ == "Norm" else fresh
    if name in owner._parameters:
        setattr(owner, name, torch.nn.Parameter(fresh, requires_grad=False))
    else:
        setattr(owner, name, fresh)


def _random_fp4(shape: Sequence[int]) -> QuantizedWeight:
    *stack, rows, columns = shape
    codes = torch.randint(0, 256, (*stack, rows, columns // 2), dtype=torch.uint8, device=DEVICE)
    exponent = round(-0.5 * torch.tensor(float(columns)).log2().item()) - 1
    scale = torch.full((*stack, rows, columns // 32), 127 + exponent, dtype=torch.uint8, device=DEVICE)
    return QuantizedWeight.of(codes, scale.view(torch.float8_e8m0fnu), "random")


def _random_fp8(shape: Sequence[int]) -> QuantizedWeight:
    rows, columns = shape
    codes = (torch.randn(rows, columns, device=DEVICE)).to(torch.float8_e4m3fn)
    exponent = round(-0.5 * torch.tensor(float(columns)).log2().item())
    scale = torch.full((-(-rows // 128), -(-columns // 128)), 2.0**exponent, device=DEVICE)
    return QuantizedWeight.of(codes, scale, "random")


# -- what a token must cost ----------------------------------------------------------------------------------------


def weight_bytes(model: Transformer, tokens: int) -> int:
    """Bytes of the weights that a step of some tokens reads: all of them once, of the experts those visited."""
    config = model.config
    visited = min(config.n_routed_experts, tokens * config.num_experts_per_tok)
    total = 0
    for name, tensor in model.state_dict().items():
        if name.startswith("embed.") or name.endswith("tid2eid"):
            continue
        share = visited / config.n_routed_experts if ".experts." in name else 1.0
        total += int(tensor.nbytes * share)
    return total


def cache_bytes_read(config: ModelConfig, context: int) -> int:
    """Bytes of the cache that a token looks at: all index keys, the picked entries, all of HCA, the windows."""
    entry, key = accounting.entry_bytes(config), accounting.index_key_bytes(config)
    total = 0
    for ratio in config.layer_ratios:
        total += min(config.sliding_window, context) * entry
        if ratio == CSA_RATIO:
            total += context // ratio * key + min(config.index_topk, context // ratio) * entry
        elif ratio == HCA_RATIO:
            total += context // ratio * entry
    return total


# -- measurements --------------------------------------------------------------------------------------------------


def place(engine: Engine, context: int, count: int) -> None:
    """Put the engine where it is after `count` prompts of `context` tokens have been read."""
    for number in range(count):
        ids = random.Random(number).choices(range(engine.runner.model.config.vocab_size), k=context)
        engine.submit(Request(tuple(ids), 10**6, GREEDY, namespace=str(number)))
    engine.admit()
    for tensor in engine.memory.state.page_tensors().values():
        # Scale bytes near one, other bytes at random below the exponents of 2: numbers as a cache holds them.
        low, high = (120, 130) if tensor.shape[-1] <= 8 else (0, 64)
        tensor.random_(low, high)
    for sequence in engine.running:
        sequence.seen = len(sequence.tokens) - 1


def engine_at(model: Transformer, context: int, count: int, room: int = 256, overlap: bool | None = None) -> Engine:
    pages = count * num_pages(context + room) + count + 2
    settings = Settings(
        slots=count,
        pages=pages,
        max_tokens=context + room,
        step_tokens=max(512, count),
        policy=WindowPolicy("zero"),
        overlap=overlap,
    )
    return Engine(model, settings)


def decode(
    model: Transformer, context: int, count: int, ceilings: Ceilings, overlap: bool | None = None
) -> dict[str, Any]:
    """Tokens per second of `count` sequences that decode at a context, and the share of the byte floor. overlap: as in
    the engine's settings."""
    engine = engine_at(model, context, count, overlap=overlap)
    place(engine, context, count)
    for _ in range(3):
        engine.step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(RUN_STEPS):
        engine.step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / RUN_STEPS
    moved = weight_bytes(model, count) + count * cache_bytes_read(model.config, context)
    floor = moved / ceilings.copy
    assert isinstance(engine.runner.steps, FixedSteps)
    captured = _median(engine.runner.steps.made[-1].compute)
    state = engine.memory.state
    row = {
        "what": f"decode, batch {count}",
        "context": f"{context:,}",
        "ms": f"{1000 * seconds:.2f}",
        "tokens/s": f"{count / seconds:,.0f}",
        "floor ms": f"{1000 * floor:.2f}",
        "of floor": f"{floor / seconds:.0%}",
        "note": f"the card alone {1000 * captured:.2f} ms; cache {state.bytes_per_page * num_pages(context):,} bytes",
    }
    del engine, state
    _forget()
    return row


def _median(work: Callable[[], Any], count: int = 20) -> float:
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[count // 2]


def _forget() -> None:
    import gc

    gc.collect()
    torch.cuda.empty_cache()


def prompt_flops(config: ModelConfig, first: int, last: int) -> float:
    """Operations of reading the tokens `first` to `last` - 1, two for each product that is useful."""

    def at(context: int) -> float:
        flops = accounting.decode_flops(config, context)
        return flops.fp8_linears + flops.fp4_experts + flops.bf16_linears + flops.core_attention + flops.index_scores

    return (last - first) * (at(first + 1) + at(last)) / 2  # linear in between, but for the first few tokens


def prefill(model: Transformer, depths: Sequence[int], chunk: int, ceilings: Ceilings) -> list[dict[str, Any]]:
    """Tokens per second of one chunk that ends at each depth."""
    rows = []
    for depth in depths:
        engine = engine_at(model, depth, 1)
        place(engine, depth, 1)
        engine.step_tokens = chunk
        (sequence,) = engine.running
        times = []
        for _ in range(3):
            sequence.seen = depth - chunk
            sequence.tokens = sequence.tokens[:depth]
            torch.cuda.synchronize()
            start = time.perf_counter()
            engine.step()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds = min(times)
        flops = prompt_flops(model.config, depth - chunk, depth)
        rows.append(
            {
                "what": f"prefill, chunk of {chunk:,}",
                "context": f"{depth:,}",
                "ms": f"{1000 * seconds:,.0f}",
                "tokens/s": f"{chunk / seconds:,.0f}",
                "floor ms": f"{1000 * flops / ceilings.matmul:,.0f}",
                "of floor": f"{flops / seconds / ceilings.matmul:.0%}",
                "note": f"MFU; peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB",
            }
        )
        del engine, sequence
        _forget()
    return rows


def whole_prompt(model: Transformer, tokens: int, chunk: int, ceilings: Ceilings) -> dict[str, Any]:
    """One prompt from the first token to the last, and a few tokens of the answer."""
    pages = num_pages(tokens + 64) + 2
    engine = Engine(
        model, Settings(slots=1, pages=pages, max_tokens=tokens + 64, step_tokens=chunk, policy=WindowPolicy("zero"))
    )
    ids = random.Random(1).choices(range(model.config.vocab_size), k=tokens)
    number = engine.submit(Request(tuple(ids), 16, GREEDY))
    start, first, said = time.perf_counter(), 0.0, 0
    while engine.busy:
        for event in engine.step():
            if event.error:
                raise RuntimeError(event.error)
            first = first or time.perf_counter() - start
            said += len(event.tokens)
    usage = engine.usage(number)
    assert usage.output_tokens == said == 16
    flops = prompt_flops(model.config, 0, tokens)
    state = engine.memory.state
    return {
        "what": f"prefill, whole prompt in chunks of {chunk:,}",
        "context": f"{tokens:,}",
        "ms": f"{1000 * first:,.0f}",
        "tokens/s": f"{tokens / first:,.0f}",
        "floor ms": f"{1000 * flops / ceilings.matmul:,.0f}",
        "of floor": f"{flops / first / ceilings.matmul:.0%}",
        "note": f"MFU; then 16 tokens; cache {state.bytes_per_page * num_pages(tokens) + state.bytes_per_slot:,} bytes",
    }


# -- the run -------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=43)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--contexts", default="4K,128K,1M")
    parser.add_argument("--depths", default="8K,64K,256K,1M")
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--full-prompt", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/engine.jsonl"))
    parser.add_argument("--commit", default="")
    parser.add_argument("--peer", action="store_true", help="only the comparison with transformers")
    options = parser.parse_args()
    if options.peer:
        peer(options.experts, options.out, options.commit)
        return
    ratios = (*FLASH.compress_ratios[: options.layers], 0)
    config = FLASH.replace(num_hidden_layers=options.layers, compress_ratios=ratios, n_routed_experts=options.experts)
    ceilings = measure_ceilings(DEVICE)
    model = build(config)
    console = Console(width=170)
    console.print(f"model: {torch.cuda.memory_allocated() / 2**30:.1f} GiB; copy {ceilings.copy / 1e9:,.0f} GB/s, "
                  f"matmul {ceilings.matmul / 1e12:,.0f} TFLOP/s")  # fmt: skip
    rows: list[dict[str, Any]] = []

    def add(measure: Callable[[], dict[str, Any] | list[dict[str, Any]]]) -> None:
        found = measure()
        for row in found if isinstance(found, list) else [found]:
            rows.append(row)
            console.print(row)
            append(options.out, [_line(row, ceilings, options.commit)])

    contexts = [min(cli.integer(word), 2**20 - 512) for word in options.contexts.split(",") if word]
    for context in contexts:
        add(lambda context=context: decode(model, context, 1, ceilings))
    if options.batch > 1:
        add(lambda: decode(model, 8192, 1, ceilings))
        add(lambda: decode(model, 8192, options.batch, ceilings))
    depths = [min(cli.integer(word), 2**20 - 512) for word in options.depths.split(",") if word]
    for depth in depths:
        add(lambda depth=depth: prefill(model, [depth], options.chunk, ceilings))
    if options.full_prompt:
        add(lambda: whole_prompt(model, options.full_prompt, options.chunk, ceilings))
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def peer(experts: int, out: Path, commit: str) -> None:
    """The comparison with transformers, as rows of a table of its own."""
    try:
        found = measure_peer(experts, Sizes(), DEVICE)
    except PeerError as error:
        sys.exit(f"engine_h100: {error}")
    for row in found:
        Console(width=170).print(row)
        append(out, [_peer_line(row, experts, commit)])


def _line(row: dict[str, Any], ceilings: Ceilings, commit: str) -> dict[str, Any]:
    return {
        "benchmark": "engine",
        "title": "The engine with V4-Flash's widths, 43 layers, 64 experts a layer, FP4 and FP8 weights, packed cache",
        "command": "python benchmarks/engine_h100.py",
        **_run(commit, "torch", "triton"),
        "copy_bytes_per_second": ceilings.copy,
        "matmul_flops_per_second": ceilings.matmul,
        "row": row,
    }


def _peer_line(row: dict[str, Any], experts: int, commit: str) -> dict[str, Any]:
    return {
        "benchmark": "engine_peer",
        "title": f"The engine against transformers eager: CSA and HCA layers of V4-Flash with {experts} experts each",
        "command": "python benchmarks/engine_h100.py --peer",
        **_run(commit, "torch", "triton", "transformers"),
        "row": row,
    }


def _run(commit: str, *packages: str) -> dict[str, Any]:
    return {
        "machine": torch.cuda.get_device_name(DEVICE),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or this_commit(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


if __name__ == "__main__":
    main()
