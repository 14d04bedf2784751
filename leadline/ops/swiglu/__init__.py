"""Clamped SwiGLU, with the gate weight of a routed expert folded in."""

from __future__ import annotations

from torch import Tensor

from leadline.ops.dispatch import use_kernel
from leadline.ops.swiglu.reference import SwiGLU


def swiglu(
    gate: Tensor, up: Tensor, limit: float, scale: Tensor | None = None, place_X: Tensor | None = None
) -> Tensor:
    """h = silu(min(gate, limit)) * clamp(up, -limit, limit) * scale (report 4.2.3).

    gate, up: [X, F]. scale: FP32 [X] or None; a routed expert's gate weight belongs here, before the down projection.
    place_X: int64, where the scale of each row stands, every place once; None when they stand in the order of the rows.
    FP32 arithmetic, dtype of gate returned. Differentiable in gate, up and scale; keeps only its inputs.
    """
    if use_kernel("swiglu", gate):
        from leadline.ops.swiglu import kernel

        return kernel.SwiGLU.apply(gate, up, scale, place_X, limit)
    return SwiGLU.apply(gate, up, scale, place_X, limit)
