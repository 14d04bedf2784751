"""Leadline's attention layer against transformers' on one GPU: time and memory, forward and backward.

usage: python benchmarks/layer_h100.py [--quick] [--out FILE] [--commit HASH]

The layer is what a block does before its experts, at the width of V4-Flash in bfloat16: norm, projections, compressor,
indexer with its top-512, attention and output projection. Both sides get the same random weights and one sequence.
First the gate: on a short sequence their outputs, and their gradients of the input, must agree to 3e-2 of their size,
which is what bfloat16 leaves of two ways to round; when they do not, nothing is timed. Then, for CSA and HCA:

- *forward*, without a graph, and *forward + backward*, the gradients of the input and of all weights that have one, at
  8,192 tokens: both sides, transformers with its eager attention;
- *forward + backward* at 32,768 and 65,536 tokens: leadline alone, the other side does not fit;
- *training step*: the same with the indexer's KL loss, which transformers has not (CSA, leadline alone).

Time is the median of several runs of a few calls each, so that the host prepares one call while the device does
another. Memory is the peak of what was allocated above what was allocated before: activations, gradients and
workspaces, not the weights. What does not fit is recorded as such.

The result is one JSON object per measurement, as `tools/readme.py` wants it, appended to FILE, by default
`benchmarks/results/<card>/layer_h100.jsonl`. With `--quick` only 1,024 tokens are measured, into `runs/`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from machine import commit as this_commit
from rich.console import Console
from torch import Tensor, nn

from leadline.model.attention import Attention
from leadline.model.cache_format import EXACT
from leadline.model.config import FLASH, ModelConfig
from leadline.model.linear import Norm
from leadline.model.segment import Segment
from leadline.model.segment_index import SegmentIndex
from leadline.model.signals import Training
from leadline.ops.rms_norm import rms_norm
from leadline.recipes.bench import append, slug
from leadline.weights.names import file_tensors, keeps_float32

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
SEED, GATE_TOKENS, GATE_TOLERANCE = 0, 700, 3e-2
CALLS = 4  # of a run that is timed
FORWARD, BOTH, TRAINING = "forward", "forward + backward", "training step"

# One layer of each kind with entries.
LAYERS = FLASH.replace(num_hidden_layers=2, compress_ratios=(4, 128), num_nextn_predict_layers=0)
KINDS = {"CSA": 0, "HCA": 1}


class BenchmarkError(ValueError):
    """The benchmark cannot go on; the message says what was found."""


# -- the two sides -------------------------------------------------------------------------------------------------


class Side(Protocol):
    """One layer of one implementation, ready for sequences of one length."""

    @property
    def module(self) -> nn.Module: ...

    def __call__(self, x_TD: Tensor) -> Tensor:
        """The layer's output [T, D]."""
        ...


class LeadlineSide:
    """training: whether the output carries the indexer's loss, which its backward then reaches too."""

    def __init__(self, config: ModelConfig, number: int, tokens: int, device: torch.device, training: bool = False):
        self.module, self.config = layer(config, number, device), config
        self.index = SegmentIndex(Segment.of(torch.zeros(tokens, dtype=torch.int64), device=device), config, None)
        self.training = Training(recall_queries=0) if training else None

    def __call__(self, x_TD: Tensor) -> Tensor:
        y_TD = rms_norm(x_TD, self.module.norm.weight, self.config.rms_norm_eps)
        y_TD, signals = self.module.attention(y_TD, self.index, None, EXACT, self.training)
        return y_TD if signals is None else y_TD + signals.kl.to(y_TD.dtype)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, number: int):
        super().__init__()
        self.norm = Norm(config.hidden_size)
        self.attention = Attention(config, config.layer_ratios[number])


def layer(config: ModelConfig, number: int, device: torch.device) -> Layer:
    """Leadline's layer with random weights that depend on `SEED` alone, at scales that keep every signal near 1; in the
    model's dtype but for what the release keeps in float32."""
    generator = torch.Generator(device).manual_seed(SEED + number)
    with torch.device(device):
        module = Layer(config, number)
    dtype = getattr(torch, config.torch_dtype)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, device=device)
        if parameter.ndim >= 2:
            values *= parameter.shape[-1] ** -0.5
        else:
            values = values * 0.1 + ("norm" in name)
        parameter.data = values if keeps_float32(name) else values.to(dtype)
    return module


class TransformersSide:
    def __init__(self, config: ModelConfig, number: int, tokens: int, device: torch.device):
        from transformers import DeepseekV4Config
        from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs

        settings = DeepseekV4Config(**config.to_dict("transformers"))
        settings._attn_implementation = "eager"
        ours = layer(config, number, device).state_dict()
        with torch.device(device):
            attention = theirs.DeepseekV4Attention(settings, number)
            norm = theirs.DeepseekV4RMSNorm(config.hidden_size, config.rms_norm_eps)
            rotary = theirs.DeepseekV4RotaryEmbedding(settings)
        attention.load_state_dict(in_transformers_names(ours))
        norm.load_state_dict({"weight": ours["norm.weight"]})
        self.module = nn.ModuleList([norm, attention])
        for parameter in self.module.parameters():  # and no buffer: rotary frequencies stay in float32
            parameter.data = parameter.data.to(getattr(torch, config.torch_dtype))
        self.norm, self.attention = norm, attention
        position_1T = torch.arange(tokens, device=device)[None]
        like = torch.empty(0, dtype=getattr(torch, config.torch_dtype), device=device)
        rotations = {name: rotary(like, position_ids=position_1T, layer_type=name) for name in ("main", "compress")}
        distance_TT = position_1T.T - position_1T
        hidden_TT = (distance_TT < 0) | (distance_TT >= config.sliding_window)
        mask_TT = torch.zeros_like(hidden_TT, dtype=like.dtype).masked_fill_(hidden_TT, torch.finfo(like.dtype).min)
        self.arguments = {
            "position_embeddings": rotations,
            "position_ids": position_1T,
            "attention_mask": mask_TT[None, None],
        }

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.attention(self.norm(x_TD[None]), **self.arguments)[0][0]


def in_transformers_names(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of our attention under the names of transformers' attention."""
    prefix, theirs = "layers.0.attn.", "model.layers.0.self_attn."
    tensors = {prefix + name.removeprefix("attention."): x for name, x in ours.items() if name.startswith("attention.")}
    files = file_tensors({name: tuple(x.shape) for name, x in tensors.items()}, "transformers")
    return {name.removeprefix(theirs): tensors[file.parts[0].ours] for name, file in files.items()}


def gate(config: ModelConfig, tokens: int, device: torch.device) -> float:
    """The largest difference of the two sides, relative to its size: of the output and of the input's gradient."""
    worst = 0.0
    for number in KINDS.values():
        generator = torch.Generator(device).manual_seed(SEED)
        dtype = getattr(torch, config.torch_dtype)
        x_TD, dy_TD = (
            torch.randn(tokens, config.hidden_size, generator=generator, device=device).to(dtype) for _ in range(2)
        )
        found = []
        for side in (LeadlineSide, TransformersSide):
            leaf_TD = x_TD.clone().requires_grad_()
            y_TD = side(config, number, tokens, device)(leaf_TD)
            found.append((y_TD.detach(), *torch.autograd.grad(y_TD, leaf_TD, dy_TD)))
        for ours, theirs in zip(*found, strict=True):
            difference = (ours.double() - theirs.double()).norm() / theirs.double().norm()
            worst = max(worst, float(difference.nan_to_num(nan=float("inf"))))
    return worst


# -- one measurement -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """kind: CSA or HCA. work: FORWARD, BOTH or TRAINING. both_sides: whether transformers does it too."""

    kind: str
    work: str
    tokens: int
    both_sides: bool


@dataclass(frozen=True)
class Result:
    """Without time and memory when the side asked for more than the device has."""

    milliseconds: float | None = None
    extra_bytes: int | None = None


def measurements(quick: bool) -> list[Measurement]:
    """Everything that is measured, in order."""
    first = 1024 if quick else 8192
    plan = [Measurement(kind, work, first, True) for kind in KINDS for work in (FORWARD, BOTH)]
    plan.append(Measurement("CSA", TRAINING, first, False))
    longer = () if quick else (32768, 65536)
    return plan + [Measurement(kind, BOTH, tokens, False) for kind in KINDS for tokens in longer]


def work_of(side: Side, measurement: Measurement, config: ModelConfig, device: torch.device) -> Callable[[], None]:
    """What is timed. Gradients are dropped before each run, so that memory starts from the weights."""
    dtype = getattr(torch, config.torch_dtype)
    x_TD = torch.randn(measurement.tokens, config.hidden_size, device=device).to(dtype)
    dy_TD = torch.randn_like(x_TD)
    x_TD.requires_grad_(measurement.work != FORWARD)

    def work() -> None:
        x_TD.grad = None
        side.module.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(measurement.work != FORWARD):
            y_TD = side(x_TD)
        if measurement.work != FORWARD:
            y_TD.backward(dy_TD)

    return work


def run(side: Side, measurement: Measurement, config: ModelConfig, device: torch.device, repeat: int) -> Result:
    """Median time on the device and peak memory; the first two runs, which compile, are not counted."""
    work = work_of(side, measurement, config, device)
    try:
        for _ in range(2):
            work()
        side.module.zero_grad(set_to_none=True)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        times = []
        for _ in range(repeat):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(CALLS):
                work()
            stop.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(stop) / CALLS)
        peak = torch.cuda.max_memory_allocated(device)
    except torch.OutOfMemoryError:
        return Result()
    return Result(sorted(times)[len(times) // 2], peak - before)


def sides(measurement: Measurement, config: ModelConfig, device: torch.device) -> dict[str, Callable[[], Side]]:
    """What measures what, built when its turn comes."""
    number, tokens = KINDS[measurement.kind], measurement.tokens
    training = measurement.work == TRAINING
    chosen: dict[str, Callable[[], Side]] = {"leadline": lambda: LeadlineSide(config, number, tokens, device, training)}
    if measurement.both_sides:
        chosen["transformers"] = lambda: TransformersSide(config, number, tokens, device)
    return chosen


def measure(measurement: Measurement, config: ModelConfig, device: torch.device) -> dict[str, Result]:
    """Each side in turn; the other one holds no memory meanwhile."""
    results = {}
    for name, side in sides(measurement, config, device).items():
        results[name] = run(side(), measurement, config, device, 9 if name == "leadline" else 3)
        torch.cuda.empty_cache()
    return results


# -- results -------------------------------------------------------------------------------------------------------


def record(measurement: Measurement, results: dict[str, Result], shared: dict[str, Any]) -> dict[str, Any]:
    """One line of the result file."""
    ours, theirs = results["leadline"], results.get("transformers")
    return {
        "benchmark": "layer_h100",
        "title": "The attention layer of V4-Flash on a GPU, bfloat16, against transformers eager",
        "command": "python benchmarks/layer_h100.py",
        **shared,
        **asdict(measurement),
        "leadline": asdict(ours),
        "transformers": None if theirs is None else asdict(theirs),
        "row": {
            "layer": measurement.kind,
            "work": measurement.work,
            "tokens": f"{measurement.tokens:,}",
            "leadline ms": _time(ours),
            "transformers ms": _time(theirs),
            "faster": _ratio(ours.milliseconds, None if theirs is None else theirs.milliseconds),
            "leadline memory": _memory(ours),
            "transformers memory": _memory(theirs),
            "less memory": _ratio(ours.extra_bytes, None if theirs is None else theirs.extra_bytes),
        },
    }


def _time(result: Result | None) -> str:
    return "" if result is None or result.milliseconds is None else f"{result.milliseconds:.2f}"


def _memory(result: Result | None) -> str:
    if result is None:
        return ""
    return "does not fit" if result.extra_bytes is None else f"{result.extra_bytes / GIB:.2f} GiB"


def _ratio(ours: float | None, theirs: float | None) -> str:
    return "" if not ours or not theirs else f"{theirs / ours:.1f}x"


def this_run(commit: str | None, device: torch.device) -> dict[str, Any]:
    """What all lines of one run share."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "transformers")}
    return {
        "machine": torch.cuda.get_device_name(device),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or this_commit(short=True),
        "versions": versions,
    }


def benchmark(quick: bool, out: Path | None, commit: str | None, console: Console) -> None:
    """Gate, measurements and result file; a line is stored as soon as it was measured."""
    if not torch.cuda.is_available():
        raise BenchmarkError("no CUDA device found: this benchmark compares on a GPU")
    device = torch.device("cuda")
    shared = this_run(commit, device)
    difference = gate(LAYERS, GATE_TOKENS, device)
    if not difference <= GATE_TOLERANCE:
        raise BenchmarkError(
            f"the two sides differ by {difference:.1e}, more than {GATE_TOLERANCE:.0e}: nothing is timed"
        )
    console.print(f"both sides give the same output and gradient: largest difference {difference:.1e}")
    folder = ROOT / "runs" if quick else ROOT / "benchmarks" / "results"
    out = out or folder / slug(shared["machine"]) / "layer_h100.jsonl"
    for measurement in measurements(quick):
        line = record(measurement, measure(measurement, LAYERS, device), shared)
        append(out, [line])
        console.print(" | ".join(f"{name} {value}" for name, value in line["row"].items() if value))
    console.print(f"results: {out}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short sequences, to try the benchmark out; into runs/")
    parser.add_argument("--out", type=Path, help="result file, if not in the result folder")
    parser.add_argument("--commit", help="the revision measured, where git cannot tell it")
    options = parser.parse_args(arguments)
    try:
        benchmark(options.quick, options.out, options.commit, Console(width=None if sys.stdout.isatty() else 180))
    except BenchmarkError as error:
        print(f"layer_h100: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("layer_h100: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
