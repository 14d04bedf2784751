"""The gate before the clock: a kernel against its reference in float64.

Fresh random inputs at awkward lengths go through the kernel and through the reference; every output and every gradient
is compared, in memory that was filled with NaN before it was handed out, and the kernel runs twice and must give the
same bits. A case whose gate is red gets no time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from leadline.ops.dispatch import Implementation, implementation
from leadline.recipes.bench_ops.case import Case, Difference, Inputs


def gate(case: Case, device: torch.device) -> list[Difference]:
    """Every result at every awkward length."""
    with _poisoned_memory():
        return [
            difference
            for tokens in case.gate_tokens
            for difference in differences(case.run, (case.gate_inputs or case.inputs)(tokens, device))
        ]


def differences(run: Callable[..., Any], inputs: Sequence[Tensor | None]) -> list[Difference]:
    """Of every output of run(*inputs), and of the gradient of every floating input for random output gradients: as a
    kernel against the reference in float64."""
    first, second = (results(run, inputs, "kernel", ()) for _ in range(2))
    exact = results(run, [double(x) for x in inputs], "reference", first)
    return [difference(*three) for three in zip(first, second, exact, strict=True)]


def difference(ours: Tensor, again: Tensor, exact: Tensor) -> Difference:
    if ours.shape != exact.shape or not torch.equal(ours.nan_to_num(), again.nan_to_num()):
        return Difference(math.inf, ours.dtype)
    distance, size = float((ours.double() - exact).norm()), float(exact.double().norm())
    return Difference(distance / size if size else distance, ours.dtype)


def results(
    run: Callable[..., Any], inputs: Sequence[Tensor | None], name: Implementation, like: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs and gradients, for output gradients that are the same in every call and, where `like` gives other
    results, rounded to their dtypes."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) if x is not None else None for x in inputs]
    with implementation(name):
        outputs = outputs_of(run(*leaves))
        generator = torch.Generator(outputs[0].device).manual_seed(1)
        gradients = []
        for output, other in zip(outputs, like or outputs, strict=False):
            gradient = torch.randn(output.shape, generator=generator, device=output.device)
            gradients.append(gradient.to(other.dtype).to(output.dtype))
        return [*(output.detach() for output in outputs), *gradients_of(outputs, leaves, gradients)]


def outputs_of(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def gradients_of(outputs: list[Tensor], leaves: Inputs, gradients: list[Tensor], again: bool = False) -> list[Tensor]:
    """Gradients of the leaves that have one; the graph stays for another call when `again`."""
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    reached = [number for number, output in enumerate(outputs) if output.requires_grad]
    if not reached:
        return []
    outputs, gradients = [outputs[number] for number in reached], [gradients[number] for number in reached]
    found = torch.autograd.grad(outputs, wanted, gradients, retain_graph=again, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def double(x: Tensor | None) -> Tensor | None:
    return x.double() if x is not None and x.is_floating_point() else x


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN, as torch arranges while deterministic algorithms are asked for."""
    before, only_warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    with warnings.catch_warnings():
        # Of references that have no deterministic form: here they only have to be right.
        warnings.filterwarnings("ignore", message=".*deterministic")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=only_warns)
