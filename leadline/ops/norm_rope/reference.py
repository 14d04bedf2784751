"""Norm, rotation and rounding in plain PyTorch, one behind the other."""

from __future__ import annotations

from torch import Tensor

from leadline.formats import fp4, hadamard
from leadline.formats.cache_entry import round_keys
from leadline.ops.rms_norm.reference import RMSNorm
from leadline.ops.rope.reference import Rotation


def norm_rope_reference(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float | None, rounding: str | None
) -> Tensor:
    if eps is not None:
        x = RMSNorm.apply(x, weight, eps)
    x = Rotation.apply(x, cos, sin, False)
    if rounding is None:
        return x
    if rounding == "fp8":
        return _straight_through(x, round_keys(x.detach(), 2 * cos.shape[-1]))
    x = hadamard.rotate(x)
    return _straight_through(x, fp4.fake_quantize(x.detach()))


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The rounded values, with the gradient of x."""
    return x + (rounded - x).detach() if x.requires_grad else rounded
