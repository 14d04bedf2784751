"""The Hadamard rotation: spreads one outlier over all values before they are rounded to four bits.

H is the Sylvester matrix scaled by width^-0.5, so it is orthonormal and its own inverse. Applied to both index queries
and index keys it leaves their products unchanged; applied to one side alone it ruins them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor) -> Tensor:
    """Orthonormal Hadamard transform of the last axis (a power of two); same shape and dtype, float32 inside."""
    width = x.shape[-1]
    if width & (width - 1):
        raise ValueError(f"the Hadamard rotation needs a power of two, got width {width}")
    y = x.float()
    step = 1
    while step < width:
        pairs = y.reshape(*x.shape[:-1], width // (2 * step), 2, step)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        step *= 2
    return (y * width**-0.5).to(x.dtype)
