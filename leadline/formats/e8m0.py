"""E8M0: a power-of-two scale, stored as one biased exponent byte.

The published kernels choose the scale of a block as 2^ceil(log2(amax / largest)), so that the largest value of the
block never overflows. The exponent is taken from the bits of the float, not from a logarithm: log2 of 2^k is not
exactly k on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ceil_power_of_two(x: Tensor) -> Tensor:
    """Smallest power of two that is >= x, for positive normal float32 x. Exact, elementwise, float32 in and out."""
    if x.dtype != torch.float32:
        raise ValueError(f"ceil_power_of_two works on float32, got {x.dtype}")
    bits = x.view(torch.int32)
    exponent = bits >> 23
    exponent = exponent + ((bits & 0x7FFFFF) != 0)
    return (exponent << 23).view(torch.float32)


def block_scale(amax: Tensor, largest: float, floor: float) -> Tensor:
    """Power-of-two scale of a block whose absolute maximum is `amax`: 2^ceil(log2(max(amax, floor) / largest)).

    amax: float32, any shape. largest: biggest value of the format (448 for E4M3, 6 for E2M1). floor: smallest amax
    that is honoured, so that a block of zeros gets a finite scale.
    """
    return ceil_power_of_two(amax.clamp_min(floor) * (1.0 / largest))
