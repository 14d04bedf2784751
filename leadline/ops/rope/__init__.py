"""Rotary embedding of the last R values of a vector, as interleaved pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from leadline.ops.dispatch import use_kernel
from leadline.ops.invariance import rowwise
from leadline.ops.rope.reference import Rotation


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the pairs (2k, 2k+1) of the last R values of x by the angle of their position (report 2.3.3).

    x: [T, K] or [T, H, K]; the first K - R values pass through. cos, sin: FP32 [T, R/2] from `rotations`. inverse:
    rotate back, as the attention output is at the query's position. FP32 arithmetic, dtype of x returned.
    """
    if use_kernel("rope", x):
        from leadline.ops.rope import kernel

        return kernel.Rotation.apply(x, cos, sin, inverse)
    return Rotation.apply(x, cos, sin, inverse)


def unrotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope` with inverse, in place: x with its last R values turned back, the others neither read nor written.

    Arguments as in `rope`; x may have any layout, is changed, and is returned. Only for an x that autograd does not
    know: a gradient would be that of numbers which are gone. So an x that requires a gradient is refused, also where
    gradients are switched off.
    """
    if x.requires_grad:
        raise ValueError("unrotate_ changes a tensor that requires a gradient; use rope(..., inverse=True)")
    if x.is_contiguous() and use_kernel("unrotate_", x):
        from leadline.ops.rope import kernel

        kernel.unrotate(x, cos.contiguous(), sin.contiguous())
    else:
        tail = x[..., -2 * cos.shape[-1] :]
        tail.copy_(rope(tail, cos, sin, inverse=True))
    return x


def unrotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with its last R values turned back, which may be x itself: in place only they move, an eighth of the values;
    but a gradient needs what x was."""
    return rope(x, cos, sin, inverse=True) if x.requires_grad else unrotate_(x, cos, sin)


def rotations(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, FP32 [..., R/2]. The product stays FP32: bf16 is wrong beyond 256."""
    angles = positions.to(torch.float32)[..., None] * frequencies
    return rowwise(torch.cos, angles), rowwise(torch.sin, angles)


def frequencies(
    width: int,
    base: float,
    *,
    factor: float = 1.0,
    original_positions: int = 0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Tensor:
    """Angular frequency of each of the R/2 pairs, FP32: base^(-2k/R), stretched by YaRN when factor > 1.

    YaRN leaves the fast pairs alone, divides the slow ones by `factor`, and ramps in between, where the borders are the
    pairs that turn `beta_fast` and `beta_slow` times over `original_positions`. V4 has no amplitude factor.
    """
    plain = 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    if factor <= 1.0:
        return plain

    def pair_that_turns(turns: float) -> float:
        return width * math.log(original_positions / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(beta_slow)), width - 1)
    span = max(high - low, 0.001)
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return plain * (1 - ramp) + plain / factor * ramp
