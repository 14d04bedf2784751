"""The clock: what the card reaches at best, and how long a case takes on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from leadline.ops.dispatch import implementation
from leadline.recipes.bench_ops.case import Case, random
from leadline.recipes.bench_ops.gate import gradients_of, outputs_of


@dataclass(frozen=True)
class Ceilings:
    """What the card reaches in this run: bytes/s of a device copy, read and write counted, and bfloat16 FLOP/s."""

    copy: float
    matmul: float


def measure_ceilings(device: torch.device) -> Ceilings:
    """A copy of 1 GiB, and a product of two random 8192 x 8192 matrices."""
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size() / seconds(lambda: target.copy_(source))
    del source, target
    a, b = (random(8192, 8192, device=device) for _ in range(2))
    return Ceilings(copied, 2 * 8192**3 / seconds(lambda: a @ b))


def seconds(work: Callable[[], Any]) -> float:
    """Median time of one call on the card, caches cold."""
    from triton.testing import do_bench

    milliseconds = do_bench(work, warmup=25, rep=100, return_mode="median")
    assert isinstance(milliseconds, float)
    return milliseconds / 1000


def time_forward(case: Case, device: torch.device) -> float:
    """Seconds of the kernel alone, without what a backward needs."""
    if case.captured:
        return time_captured(case, device)
    inputs = case.inputs(case.tokens, device)
    with torch.no_grad(), implementation("kernel"):
        return seconds(lambda: case.run(*inputs))


def time_captured(case: Case, device: torch.device) -> float:
    """Seconds of one of the calls that a captured graph holds."""
    sets = [case.inputs(case.tokens, device) for _ in range(case.captured)]
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), implementation("kernel"):
        case.run(*sets[0])  # compiles, which a capture does not allow
        with torch.cuda.graph(graph):
            for inputs in sets:
                case.run(*inputs)
    return seconds(graph.replay) / len(sets)


def time_backward(case: Case, device: torch.device) -> float:
    """Seconds from output gradients to the gradients of all floating inputs."""
    leaves = case.inputs(case.tokens, device)
    for leaf in leaves:
        if leaf is not None:
            leaf.requires_grad_(leaf.is_floating_point())
    with implementation("kernel"):
        outputs = outputs_of(case.run(*leaves))
        gradients = [torch.randn(output.shape, device=device).to(output.dtype) for output in outputs]
        return seconds(lambda: gradients_of(outputs, leaves, gradients, again=True))
