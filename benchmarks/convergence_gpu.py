"""Kernels against references on a GPU: the same training run reaches the same loss.

usage: python benchmarks/convergence_gpu.py [--steps N] [--out FILE] [--commit HASH]

The `nano` model is trained on text of a small random grammar, with master weights in FP32, three times from the same
start on the same tokens: with the references in bfloat16, with the references in FP32, and with the kernels in
bfloat16. The loss of a run is the mean of its last quarter. The run with kernels passes when its loss is within
`TOLERANCE` of that of the references in bfloat16; the run in FP32 shows what rounding alone does to it.

Kernels and references round differently, so their runs part after a few steps like any two runs; what must agree is
how well they learn. Equal runs that round differently ended 0.0007 (bfloat16 and FP32 on a CPU) and 0.0045 (references
and kernels on an H100) apart after 40 steps, runs with other starts and tokens 0.02 to 0.04; the loss falls from 6.4 to
3.1.

The kernels are compiled ahead, in a `rehearsal` of the first steps.

The result is one JSON object per run, as `tools/readme.py` wants it, in
`benchmarks/results/<machine>/convergence_gpu.jsonl`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from machine import commit as this_commit
from torch import Tensor, nn

from leadline.model.config import NANO, ModelConfig
from leadline.model.init import initialize
from leadline.model.segment import Segment
from leadline.model.signals import Training
from leadline.model.transformer import Transformer
from leadline.ops.dispatch import Implementation, implementation
from leadline.ops.rehearsal import rehearsal
from leadline.optim.clip import clip_gradients
from leadline.optim.groups import build_optimizers
from leadline.recipes.bench import append, slug
from leadline.train.balance import update_selection_bias
from leadline.train.losses import Losses, LossWeights, compute_losses
from leadline.weights.names import keeps_float32

ROOT = Path(__file__).resolve().parent.parent
CONFIG = NANO.replace(vocab_size=512)
LENGTHS = (700, 300, 24)  # of the sequences of a segment
LR, WARMUP, CLIP = 1e-2, 10, 1.0
TOLERANCE = 0.02  # nats
REHEARSED = 4  # steps, of which the first attends to everything and the others pick


@dataclass(frozen=True)
class Result:
    """One run: what it ran as and in, the loss of each step in nats, and how long it took."""

    name: Implementation
    dtype: torch.dtype
    losses: list[float]
    seconds: float

    @property
    def loss(self) -> float:
        last = self.losses[-max(1, len(self.losses) // 4) :]
        return sum(last) / len(last)


def grammar(vocabulary: int) -> Tensor:
    """Probabilities of the next token after each, [V, V]: a few likely ones. The same in every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.softmax(4 * torch.randn(vocabulary, vocabulary, generator=generator), dim=1)


def sequence(table_VV: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """`length` tokens; the second half repeats the first, which attention alone can know."""
    tokens = torch.empty(length, dtype=torch.int64)
    tokens[0] = torch.randint(0, len(table_VV), (), generator=generator)
    half = (length + 1) // 2
    for place in range(1, half):
        tokens[place] = torch.multinomial(table_VV[tokens[place - 1]], 1, generator=generator)
    tokens[half:] = tokens[: length - half]
    return tokens


def batches(config: ModelConfig, steps: int, seed: int, device: torch.device) -> list[tuple[Segment, Tensor]]:
    """(segment, next-token targets) of every step."""
    generator, table_VV = torch.Generator().manual_seed(seed), grammar(config.vocab_size)
    found = []
    for _ in range(steps):
        texts = [sequence(table_VV, length + 1, generator) for length in LENGTHS]
        segment = Segment.of(*(text[:-1] for text in texts), device=device)
        found.append((segment, torch.cat([text[1:] for text in texts]).to(device)))
    return found


class Objective(nn.Module):
    """The losses of a model as the forward of a module, so that it can be called with other weights."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, segment: Segment, targets_T: Tensor, training: Training) -> Losses:
        return compute_losses(self.model, segment, targets_T, LossWeights(), training)


def train(
    name: Implementation,
    dtype: torch.dtype,
    steps: int,
    device: torch.device,
    config: ModelConfig = CONFIG,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> Result:
    """One run from the start; dtype: that of the weights but for those which stay FP32. progress is told how it goes,
    once in ten steps."""
    model = Transformer(config)
    initialize(model, seed)
    model.to(device)
    objective, optimizers = Objective(model), build_optimizers(model.named_parameters(), config, LR)
    data, losses = batches(config, steps, seed, device), []
    started = time.monotonic()
    with implementation(name):
        for step, (segment, targets_T) in enumerate(data):
            masters = dict(objective.named_parameters())
            weights = {
                key: master if keeps_float32(key.removeprefix("model.")) else master.to(dtype)
                for key, master in masters.items()
            }
            training = Training(dense=step < steps // 4)
            found: Losses = torch.func.functional_call(objective, weights, (segment, targets_T, training))
            gradients = torch.autograd.grad(found.total, list(masters.values()), allow_unused=True)
            for master, gradient in zip(masters.values(), gradients, strict=True):
                master.grad = gradient
            clip_gradients(model.named_parameters(), CLIP)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = LR * min(1.0, (step + 1) / WARMUP)
                optimizer.step()
            update_selection_bias(model, found.counts_LE, 1e-3)
            losses.append(float(found.next_token))
            if step % 10 == 9 or step + 1 == steps:
                took = time.monotonic() - started
                progress(f"{name}s, {NAMES[dtype]}: step {step + 1}, loss {losses[-1]:.4f}, {took:.1f} s")
    return Result(name, dtype, losses, time.monotonic() - started)


NAMES = {torch.bfloat16: "bfloat16", torch.float32: "FP32"}
PLAN: tuple[tuple[Implementation, torch.dtype], ...] = (
    ("reference", torch.bfloat16),
    ("reference", torch.float32),
    ("kernel", torch.bfloat16),
)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def compare(steps: int, device: torch.device) -> list[Result]:
    """The runs of `PLAN`, behind a rehearsal of the one with kernels."""
    started = time.monotonic()
    with rehearsal():
        train("kernel", torch.bfloat16, REHEARSED, device)
    say(f"kernels compiled in {time.monotonic() - started:.1f} s")
    return [train(name, dtype, steps, device, progress=say) for name, dtype in PLAN]


def passes(results: Sequence[Result]) -> bool:
    """Whether kernels and references in bfloat16 differ by no more than the tolerance; NaN never passes."""
    reference, _, kernel = (result.loss for result in results)
    return abs(kernel - reference) <= TOLERANCE


def records(results: Sequence[Result], commit: str, device: torch.device) -> list[dict[str, Any]]:
    """Lines of the result file; everything beside `row` is raw."""
    machine = torch.cuda.get_device_name(device)
    started, reference = datetime.now(UTC).isoformat(timespec="seconds"), results[0].loss
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    steps = len(results[0].losses)
    return [
        {
            "benchmark": "convergence_gpu",
            "title": f"Kernels learn as references do: nano, {steps} steps of {sum(LENGTHS):,} tokens, losses in nats",
            "command": "python benchmarks/convergence_gpu.py",
            "machine": machine,
            "time": started,
            "commit": commit,
            "versions": versions,
            "losses": result.losses,
            "row": {
                "run": f"{result.name}s, {NAMES[result.dtype]}",
                "first loss": f"{result.losses[0]:.3f}",
                "loss of the last quarter": f"{result.loss:.4f}",
                "difference": f"{result.loss - reference:+.4f}",
                "allowed": f"{TOLERANCE}" if result.name == "kernel" else "",
                "seconds": f"{result.seconds:.1f}",
            },
        }
        for result in results
    ]


def main(arguments: list[str]) -> int:
    """Run, print, store; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="result file, if not in the result folder")
    parser.add_argument("--commit", default=None, help="revision measured, where git cannot tell it")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("convergence_gpu: needs a CUDA device", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    results = compare(options.steps, device)
    lines = records(results, options.commit or this_commit(), device)
    for line in lines:
        print("  ".join(f"{column} {value}" for column, value in line["row"].items()))
    folder = ROOT / "benchmarks" / "results" / slug(torch.cuda.get_device_name(device))
    path = options.out or folder / "convergence_gpu.jsonl"
    append(path, lines)
    passed = passes(results)
    print(f"{'passed' if passed else 'FAILED'}; results: {path}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
