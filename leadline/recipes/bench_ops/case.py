"""A case of `leadline bench ops`: one op at one shape, how its inputs are made, and what it must cost at least.

The cost of a case is that of its purpose, not of its kernel: operations that the mathematics asks for, and every tensor
of it moved once. What a kernel does beyond that, such as reading the streams a second time, counts against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

D, S, H, K, R, F, E, A, V = 4096, 4, 64, 512, 64, 2048, 256, 6, 129280  # V4-Flash
TOKENS = 8192
BF16, FP32 = 2, 4  # bytes

Inputs = list[Tensor | None]


@dataclass(frozen=True)
class Cost:
    """The least that one call can do. bytes: read from and written to the memory of the card."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Difference:
    """|kernel - reference| / |reference| of one result in the Euclidean norm, and the result's dtype. Infinite when two
    runs of the kernel differ in any bit."""

    relative: float
    dtype: torch.dtype


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    inputs: makes fresh inputs for a number of tokens on a device. forward, backward: costs at `tokens`; an op without a
    gradient has no backward. ceiling: which of the card's two measured limits the result is compared with. tolerance,
    fp32_tolerance: bounds on |difference| / |reference| for results in bfloat16, which rounding alone moves by 1.7e-3,
    and for results in FP32. gate_inputs: other inputs for the gate, where the reference in float64 would not fit on the
    card. captured: for calls so short that starting them would be timed: how many of them, each with inputs of its own,
    one captured graph holds; 0 for none.
    """

    op: str
    shape: str
    inputs: Callable[[int, torch.device], Inputs]
    run: Callable[..., Any]
    forward: Cost
    backward: Cost | None
    ceiling: Literal["copy", "matmul"] = "copy"
    tokens: int = TOKENS
    gate_tokens: tuple[int, ...] = (1, 127, 4001)
    gate_inputs: Callable[[int, torch.device], Inputs] | None = None
    tolerance: float = 4e-3
    fp32_tolerance: float = 1e-4
    captured: int = 0

    def accepts(self, difference: Difference) -> bool:
        """Whether a result is as close to the reference as its dtype allows; NaN is not. Integers must be equal."""
        if not difference.dtype.is_floating_point:
            return difference.relative == 0
        allowed = self.fp32_tolerance if difference.dtype == torch.float32 else self.tolerance
        return difference.relative <= allowed


def random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).bfloat16()


def moved(flops: float, forward_values: int, backward_values: int, fp32_values: int = 0) -> tuple[Cost, Cost]:
    """Costs of forward and backward of a case that moves bfloat16 values, and as many FP32 values in both."""
    extra = fp32_values * FP32
    return Cost(flops, forward_values * BF16 + extra), Cost(2 * flops, backward_values * BF16 + extra)
