"""RMS norm, rotation and the rounding of cached vectors, in one pass: what becomes of queries, keys and entries."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from leadline.formats import fp4
from leadline.ops.dispatch import use_kernel
from leadline.ops.norm_rope.reference import norm_rope_reference

Rounding = Literal["fp8", "fp4"]


def norm_rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    weight: Tensor | None = None,
    eps: float | None = None,
    rounding: Rounding | None = None,
) -> Tensor:
    """y = round(rotate(norm(x))) over the last axis (report 2.3.3 and 5.2.1), in the dtype of x.

    x: [T, K] or [T, H, K]. eps, weight [K]: of `rms_norm`; without eps there is no norm, without a weight the norm has
    none. cos, sin: FP32 [T, R/2] from `rotations`, applied as `rope` does. rounding, so that floats hold what the bytes
    of a cache would (`formats.cache_entry`):

    - "fp8", for keys and entries: the first K - R values to E4M3 in blocks of 64, the last R to bfloat16.
    - "fp4", for index queries and keys: the Hadamard rotation, then E2M1 in blocks of 32. K is a power of two.

    Norm, rotation and Hadamard rotation compute in FP32 and are each rounded to the dtype of x, as if they were
    operations of their own. Differentiable in x and weight, as if nothing were rounded; only x is kept for the
    backward, and without a norm nothing. ValueError for a width that the rotation or the rounding cannot have.
    """
    width, rotary_width = x.shape[-1], 2 * cos.shape[-1]
    if width % 2 or width < rotary_width:
        raise ValueError(
            f"vectors of {width} values have no {rotary_width // 2} pairs at their end: the width is odd or too small"
        )
    if rounding == "fp4" and (width & (width - 1) or width % fp4.BLOCK):
        raise ValueError(
            f"vectors of {width} values cannot be rounded to FP4: the width must be a power of two from {fp4.BLOCK} on"
        )
    assert weight is None or eps is not None, "a norm's weight needs its eps"
    if use_kernel("norm_rope", x):
        from leadline.ops.norm_rope import kernel

        return kernel.NormRope.apply(x, weight, cos, sin, eps, rounding)
    return norm_rope_reference(x, cos, sin, weight, eps, rounding)
