"""RMS norm, with or without a learned weight."""

from __future__ import annotations

from torch import Tensor

from leadline.ops.dispatch import use_kernel
from leadline.ops.rms_norm.reference import RMSNorm


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis (report 2.3.3).

    x: [..., D] of any float dtype. weight: [D], or None for the weightless norm of the query heads. With a weight the
    arithmetic is FP32, rounded once at the end to the dtype of x. Without one, square, mean, sum with eps, inverse root
    and product are each rounded to the dtype of x, as in the published code: a scale that is off by half a step moves
    all of a head's scores, and the released weights were used with this one. Differentiable in x and weight, as if
    nothing were rounded; only x is kept for the backward.
    """
    if use_kernel("rms_norm", x):
        from leadline.ops.rms_norm import kernel

        return kernel.RMSNorm.apply(x, weight, eps)
    return RMSNorm.apply(x, weight, eps)
