"""Attention layers of V3.2, V4-Pro and V4-Flash that decode on one GPU: time and cache beside the published ratios.

usage: python benchmarks/v32_layer_h100.py [--quick] [--contexts 4K,1M] [--sequences 1,8,32] [--out FILE]
                                           [--commit HASH]

Three models' attention layers with random weights in their served formats, projections included, experts and residual
streams not: V3.2's (`v32_layer.py`, written for this comparison with the kernels of `v32_kernels.py`), and leadline's
CSA, HCA and window layers with V4-Pro's and V4-Flash's widths and the packed cache. Each takes in one new token of each
of some sequences that have `context` tokens, as a captured graph replays it. First the gate: V3.2's layer must agree
with a plain dense computation in FP32 that absorbs nothing, and its picks, also among a million, with those of exact
scores, to 3e-2, which is more than bfloat16 leaves; when it does not, nothing is timed.

- *A layer*: microseconds of a step; the floor is its weights and what it looks at in the cache, each byte once, at the
  bandwidth of a device copy in the same run; bytes of the tensors that hold the cache of one sequence.
- *A model*: the sum over its layers, 61 of V3.2, 31 HCA and 30 CSA of V4-Pro, 2 window, 21 CSA and 20 HCA of V4-Flash;
  *since 4K* is what the context adds to the time at 4,096 tokens.

The published ratios are those of the report at a million tokens: the work of a token, experts included, in operations
worth one of FP8, and the bytes of the cache. With one sequence a step reads every weight for a single token, so its
time tells of weights first; with many sequences the context decides.

The result is one JSON object per row, as `tools/readme.py` wants it, appended to FILE, by default
`benchmarks/results/<card>/v32_layer_h100.jsonl`. With `--quick` contexts are short, and the rows go into `runs/`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from engine_h100 import cache_bytes_read
from layer_h100 import layer
from machine import commit as this_commit
from rich.console import Console
from torch import Tensor, nn
from v32_layer import (
    LatentAttention,
    LatentCache,
    Shape,
    Step,
    dequantized,
    random_layer,
    reference_picks,
    serve_in_fp8,
)

from leadline import cli
from leadline.formats import fp8
from leadline.model import accounting
from leadline.model.cache_format import PACKED
from leadline.model.config import CSA_RATIO, FLASH, HCA_RATIO, PRO, ModelConfig
from leadline.model.linear import Linear
from leadline.model.page_table import num_pages
from leadline.model.segment import Segment
from leadline.model.segment_index import SegmentIndex
from leadline.model.state import State
from leadline.model.v32 import LATENT_SCALE_BLOCK, NUM_LAYERS
from leadline.ops.dispatch import implementation
from leadline.ops.quantized_linear import quantize
from leadline.ops.rehearsal import rehearsal
from leadline.quant.policy import RELEASED
from leadline.recipes.bench import append, slug
from leadline.recipes.bench_ops.clock import measure_ceilings, seconds

ROOT = Path(__file__).resolve().parent.parent
GATE_POSITIONS, GATE_LONG, GATE_TOLERANCE = (2999, 1000), 2**20 - 1, 3e-2
CALLS = 8  # of a captured graph
KIND_OF_RATIO = {0: "window", CSA_RATIO: "CSA", HCA_RATIO: "HCA"}
BASE = "V3.2"
V4 = {"V4-Pro": PRO, "V4-Flash": FLASH}
PUBLISHED = {"V4-Pro": ("27%", "10%"), "V4-Flash": ("10%", "7%")}  # work and cache of V3.2's at a million tokens
PUBLISHED_CONTEXT = 2**20


class BenchmarkError(ValueError):
    """The benchmark cannot go on; the message says what was found."""


# -- the layers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """A layer in the middle of decoding. work: one step; read_bytes: weights and cache that it has to look at;
    cache_bytes: of all its sequences."""

    work: Callable[[], Tensor]
    read_bytes: int
    cache_bytes: int


class Side(Protocol):
    def at(self, sequences: int, context: int) -> Ready:
        """The layer where each of some sequences brings its last of `context` tokens."""
        ...


class V32Side:
    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device = shape, dtype, device
        self.module = random_layer(shape, dtype, device)
        serve_in_fp8(self.module)

    def at(self, sequences: int, context: int) -> Ready:
        cache = LatentCache(self.shape, sequences, context, self.dtype, self.device)
        cache.fill()
        positions_T = torch.full((sequences,), context - 1, device=self.device)
        step = Step.at(positions_T, self.shape, cache)
        x_TD = torch.randn(sequences, self.shape.hidden_size, device=self.device).to(self.dtype)
        row_bytes = [tensor.shape[1] * tensor.element_size() for tensor in cache.tensors]
        picked = min(context, self.shape.index_topk)
        looked_at = picked * sum(row_bytes[:3]) + (context * sum(row_bytes[3:]) if picked < context else 0)
        read_bytes = weight_bytes(self.module) + sequences * looked_at
        return Ready(lambda: self.module(x_TD, step, cache), read_bytes, cache.num_bytes)


class V4Side:
    """A layer of one kind with a model's widths."""

    def __init__(self, config: ModelConfig, ratio: int, device: torch.device):
        self.config = config.replace(num_hidden_layers=1, compress_ratios=(ratio,), num_nextn_predict_layers=0)
        self.device, self.dtype = device, getattr(torch, config.torch_dtype)
        self.module = layer(self.config, 0, device).attention.requires_grad_(requires_grad=False)
        for name, module in self.module.named_modules():
            if isinstance(module, Linear) and RELEASED.format_of(f"layers.0.attn.{name}.weight") == "fp8":
                module.hold(quantize(module.weight, "fp8", name))

    def at(self, sequences: int, context: int) -> Ready:
        pages = num_pages(context)
        state = State(
            self.config, sequences, pages=sequences * pages, max_tokens=context,
            cache_format=PACKED, dtype=self.dtype, device=self.device,
        )  # fmt: skip
        for slot in range(sequences):
            state.assign(slot, range(slot * pages, (slot + 1) * pages))
        for name, tensor in state.page_tensors().items():
            # Numbers as a cache holds them, and no NaN.
            tensor.random_(*((120, 130) if name.endswith("scales") else (0, 64)))
        places_T = torch.full((sequences,), context - 1, device=self.device)
        slots_N = torch.arange(sequences, device=self.device)
        segment = Segment.on_device(torch.zeros_like(slots_N), places_T, slots_N, context)
        index = SegmentIndex(segment, self.config, state.layout)
        x_TD = torch.randn(sequences, self.config.hidden_size, device=self.device).to(self.dtype)
        read_bytes = weight_bytes(self.module) + sequences * cache_bytes_read(self.config, context)
        return Ready(lambda: self.module(x_TD, index, state.layers[0], PACKED)[0], read_bytes, state.num_bytes)


def weight_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def sides(device: torch.device) -> dict[str, Side]:
    """All layers by name, with their weights."""
    found: dict[str, Side] = {BASE: V32Side(Shape(), torch.bfloat16, device)}
    for model, config in V4.items():
        for ratio in sorted(set(config.layer_ratios)):
            found[f"{model} {KIND_OF_RATIO[ratio]}"] = V4Side(config, ratio, device)
    return found


def layers_of(model: str) -> dict[str, int]:
    """How many layers of each name a model has."""
    if model == BASE:
        return {BASE: NUM_LAYERS}
    config = V4[model]
    return {
        f"{model} {KIND_OF_RATIO[r]}": accounting.num_layers_of(config, r) for r in sorted(set(config.layer_ratios))
    }


# -- the gate ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def dense(module: LatentAttention, x_TD: Tensor, step: Step, cache: LatentCache, rows_TM: Tensor) -> Tensor:
    """The layer's output [T, D] without absorption: keys and values of all heads and tokens, in FP32, and scores of all
    tokens, of which those that are not picked are left out of the softmax. Norms and FP8 maps are the layer's own."""
    plain = module.shape.qk_nope_head_dim
    q_THX = module.queries(module.latent_query(x_TD), step).float()
    latent_NCK = dequantized(cache.codes, cache.scales, torch.float32).unflatten(0, (len(x_TD), -1))
    rotary_NCR = cache.rotary.float().unflatten(0, (len(x_TD), -1))
    outputs = []
    for t, (latent_CK, rotary_CR) in enumerate(zip(latent_NCK, rotary_NCR, strict=True)):
        key_CHP = torch.einsum("ck,hpk->chp", latent_CK, module.k_up_HPK.float())
        scores_HC = torch.einsum("hp,chp->hc", q_THX[t, :, :plain], key_CHP) + q_THX[t, :, plain:] @ rotary_CR.T
        hidden_C = torch.ones(cache.capacity, dtype=torch.bool, device=x_TD.device)
        hidden_C[rows_TM[t][rows_TM[t] >= 0].long() - t * cache.capacity] = False
        weights_HC = (scores_HC * q_THX.shape[-1] ** -0.5).masked_fill(hidden_C, float("-inf")).softmax(-1)
        value_CHU = torch.einsum("ck,hku->chu", latent_CK, module.v_up_HKU.float())
        outputs.append(torch.einsum("hc,chu->hu", weights_HC, value_CHU))
    return module.project(torch.stack(outputs).transpose(0, 1).to(x_TD.dtype))


@torch.no_grad()
def gate(side: V32Side, positions: Sequence[int], *, picks_only: bool = False) -> float:
    """The largest relative difference between the layer and the plain computation: of what it writes and of its output;
    and the share of the right picks that it lacks. What is not a number counts as infinite."""
    module = side.module
    cache = LatentCache(side.shape, len(positions), max(positions) + 1, side.dtype, side.device)
    cache.fill()
    step = Step.at(torch.tensor(positions, device=side.device), side.shape, cache)
    x_TD = torch.randn(len(positions), side.shape.hidden_size, device=side.device).to(side.dtype)
    y_TD = module(x_TD, step, cache)
    q_latent_TQ = module.latent_query(x_TD)
    rows_TM = module.pick(x_TD, q_latent_TQ, step, cache)
    pairs = list(zip(_written(cache, step), _rounded(module.new_tokens(x_TD, step)), strict=True))
    with implementation("reference"):
        right_TM = reference_picks(
            module.index_queries(q_latent_TQ, step), module.head_weights(x_TD), step, cache, side.shape.index_topk
        )
    if not picks_only:
        pairs.append((y_TD, dense(module, x_TD, step, cache, rows_TM)))
    differences = [float((ours.double() - plain.double()).norm() / plain.double().norm()) for ours, plain in pairs]
    lacking = ~torch.isin(right_TM[right_TM >= 0], rows_TM)
    differences.append(float(lacking.double().mean()))
    return max(float("inf") if difference != difference else difference for difference in differences)


def _written(cache: LatentCache, step: Step) -> list[Tensor]:
    """What the cache holds of the new tokens: latents, rotary parts, index keys."""
    codes, scales, rotary, index_codes, index_scales = (tensor[step.rows_T] for tensor in cache.tensors)
    return [
        dequantized(codes, scales, torch.float32),
        rotary,
        dequantized(index_codes, index_scales, torch.float32),
    ]


def _rounded(tokens: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """What it should hold of them."""
    latent_TK, rotary_TR, key_TI = tokens
    return [
        fp8.fake_quantize(latent_TK.float(), LATENT_SCALE_BLOCK),
        rotary_TR,
        fp8.fake_quantize(key_TI.float(), key_TI.shape[1]),
    ]


def check(side: V32Side, device: torch.device) -> float:
    """BenchmarkError when the layer does not do what it should; else the largest difference."""
    worst = gate(side, GATE_POSITIONS)
    if device.type == "cuda":
        worst = max(worst, gate(side, (GATE_LONG,), picks_only=True))
    if not worst <= GATE_TOLERANCE:
        raise BenchmarkError(f"V3.2's layer is off by {worst:.1e}, more than {GATE_TOLERANCE:.0e}: nothing is timed")
    return worst


# -- measurements --------------------------------------------------------------------------------------------------


def time_captured(work: Callable[[], Tensor]) -> float:
    """Seconds of one step, from a graph of several."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                work()
    return seconds(graph.replay) / CALLS


@dataclass(frozen=True)
class Measured:
    """One layer at one place: of a step, and bytes of one sequence's cache."""

    seconds: float
    floor_seconds: float
    cache_bytes: float


def measure(side: Side, sequences: int, context: int, copy: float, clock: Callable[..., float]) -> Measured:
    """copy: bytes a second. clock: seconds of one step."""
    ready = side.at(sequences, context)
    found = Measured(clock(ready.work), ready.read_bytes / copy, ready.cache_bytes / sequences)
    del ready
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def rehearse(all_sides: Sequence[Side], contexts: Sequence[int], numbers: Sequence[int]) -> None:
    """Compile the kernels of all layers, many at the same time: for each number of sequences, and for each context."""
    with rehearsal(), torch.no_grad():
        places = {(number, contexts[0]) for number in numbers} | {(numbers[0], context) for context in contexts}
        for sequences, context in sorted(places):
            for side in all_sides:
                side.at(sequences, context).work()


# -- results -------------------------------------------------------------------------------------------------------


def layer_row(name: str, sequences: int, context: int, found: Measured) -> dict[str, str]:
    return {
        "layer": name,
        "sequences": str(sequences),
        "context": f"{context:,}",
        "µs": f"{1e6 * found.seconds:.1f}",
        "floor µs": f"{1e6 * found.floor_seconds:.1f}",
        "of floor": f"{found.floor_seconds / found.seconds:.0%}",
        "cache of a sequence": f"{found.cache_bytes / 1e6:,.2f} MB",
    }


def summed(model: str, found: dict[str, Measured]) -> tuple[float, float]:
    """Seconds of a step and cache bytes of a sequence, over all layers of a model."""
    layers = layers_of(model).items()
    return (
        sum(count * found[name].seconds for name, count in layers),
        sum(count * found[name].cache_bytes for name, count in layers),
    )


def model_row(
    model: str, sequences: int, context: int, found: dict[str, Measured], first: dict[str, Measured]
) -> dict[str, str]:
    """first: the same at the shortest context."""
    seconds, cache = summed(model, found)
    base_seconds, base_cache = summed(BASE, found)
    added, base_added = seconds - summed(model, first)[0], base_seconds - summed(BASE, first)[0]
    published_work, published_cache = PUBLISHED.get(model, ("", "")) if context == PUBLISHED_CONTEXT else ("", "")
    return {
        "attention of": model,
        "sequences": str(sequences),
        "context": f"{context:,}",
        "ms": f"{1000 * seconds:.2f}",
        "of V3.2's": f"{seconds / base_seconds:.0%}",
        "ms since the shortest": f"{1000 * added:.2f}" if found is not first else "",
        "of V3.2's ms since": f"{added / base_added:.0%}" if found is not first and base_added > 0 else "",
        "published work": published_work,
        "cache of a sequence": f"{cache / 1e9:.3f} GB",
        "of V3.2's cache": f"{cache / base_cache:.1%}",
        "published cache": published_cache,
    }


def lines_at(
    names: dict[str, Measured], sequences: int, context: int, first: dict[str, Measured], shared: dict[str, Any]
) -> list[dict[str, Any]]:
    """All lines of the result file for one number of sequences and one context."""
    layers = [layer_row(name, sequences, context, found) for name, found in names.items()]
    models = [model_row(model, sequences, context, names, first) for model in (BASE, *V4)]
    titles = {
        "v32_layer": "Attention layers of V3.2 and V4 that decode one token of each sequence, projections included",
        "v32_model": "Attention of whole models that decode, as sums of these layers, beside the published ratios",
    }
    return [
        {"benchmark": benchmark, "title": titles[benchmark], "command": "python benchmarks/v32_layer_h100.py"}
        | shared
        | {"row": row}
        for benchmark, rows in (("v32_layer", layers), ("v32_model", models))
        for row in rows
    ]


def this_run(commit: str | None, device: torch.device) -> dict[str, Any]:
    """What all lines of one run share."""
    return {
        "machine": torch.cuda.get_device_name(device),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or this_commit(short=True),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton")},
    }


def benchmark(contexts: Sequence[int], numbers: Sequence[int], out: Path, commit: str | None, console: Console) -> None:
    """Gate, measurements and result file; lines are stored as soon as they are measured."""
    if not torch.cuda.is_available():
        raise BenchmarkError("no CUDA device found: this benchmark decodes on a GPU")
    device = torch.device("cuda")
    shared = this_run(commit, device)
    all_sides = sides(device)
    base = all_sides[BASE]
    assert isinstance(base, V32Side)
    started = time.monotonic()
    rehearse(list(all_sides.values()), contexts, numbers)
    console.print(f"kernels compiled in {time.monotonic() - started:.1f} s")
    console.print(f"V3.2's layer is off from the plain computation by {check(base, device):.1e}")
    copy = measure_ceilings(device).copy
    console.print(f"device copy: {copy / 1e9:,.0f} GB/s")
    for sequences in numbers:
        first: dict[str, Measured] | None = None
        for context in contexts:
            started = time.monotonic()
            found = {name: measure(side, sequences, context, copy, time_captured) for name, side in all_sides.items()}
            console.print(f"{sequences} x {context:,} tokens: measured in {time.monotonic() - started:.1f} s")
            first = first or found
            lines = lines_at(found, sequences, context, first, shared)
            append(out, lines)
            for line in lines:
                console.print(" | ".join(f"{name} {value}" for name, value in line["row"].items() if value))
    console.print(f"results: {out}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short contexts, to try the benchmark out; into runs/")
    parser.add_argument("--contexts", default="", help="ascending, such as 4K,128K,1M; default: 4K,1M")
    parser.add_argument("--sequences", default="", help="default: 1,8,32")
    parser.add_argument("--out", type=Path, help="result file, if not in the result folder")
    parser.add_argument("--commit", help="the revision measured, where git cannot tell it")
    options = parser.parse_args(arguments)
    contexts = options.contexts or ("1K,4K" if options.quick else "4K,1M")
    numbers = options.sequences or ("1,3" if options.quick else "1,8,32")
    try:
        if not torch.cuda.is_available():
            raise BenchmarkError("no CUDA device found: this benchmark decodes on a GPU")
        card = slug(torch.cuda.get_device_name())
        folder = ROOT / "runs" if options.quick else ROOT / "benchmarks" / "results" / card
        benchmark(
            [cli.integer(word) for word in contexts.split(",")],
            [cli.integer(word) for word in numbers.split(",")],
            options.out or folder / "v32_layer_h100.jsonl",
            options.commit,
            Console(width=None if sys.stdout.isatty() else 200),
        )
    except BenchmarkError as error:
        print(f"v32_layer_h100: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("v32_layer_h100: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
