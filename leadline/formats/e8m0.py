"""E8M0: a power-of-two scale, stored as one biased exponent byte.

The published kernels choose the scale of a block as 2^ceil(log2(amax / largest)), so that the largest value of the
block never overflows. The exponent is taken from the bits of the float, not from a logarithm: log2 of 2^k is not
exactly k on every device.

A code c stands for 2^(c - 127), which is the exponent field of a float32; code 0 is its largest subnormal power of two,
and code 255 is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAN_CODE = 255
_SUBNORMAL_POWER = 1 << 22  # the bits of 2^-127


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
    that is honoured, so that a block of zeros gets a finite scale. A block that holds an infinity or NaN gets the scale
    NaN, so that it stays visibly broken.
    """
    scale = ceil_power_of_two(amax.clamp_min(floor) * (1.0 / largest))
    return torch.where(amax.isfinite(), scale, torch.nan)


def encode(scale: Tensor) -> Tensor:
    """Codes, uint8, of float32 scales. What is no power of two from 2^-127 to 2^127 becomes the code of NaN.

    No error for it, because a check would wait for the device: `decode` gives NaN back, and readers of files say so.
    """
    if scale.dtype != torch.float32:
        raise ValueError(f"a scale to be encoded is float32, got {scale.dtype}")
    bits = scale.view(torch.int32)
    exponent = bits >> 23  # of a negative number: negative
    is_power = ((bits & 0x7FFFFF) == 0) & (exponent > 0)  # infinity has the field 255, which is the code of NaN
    codes = torch.where(is_power, exponent, NAN_CODE)
    return torch.where(bits == _SUBNORMAL_POWER, 0, codes).to(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """Float32 scales of codes given as uint8 or float8_e8m0fnu. Exact; code 255 gives NaN."""
    exponent = codes.view(torch.uint8).to(torch.int32)
    scale = torch.where(exponent == 0, _SUBNORMAL_POWER, exponent << 23).view(torch.float32)
    return torch.where(exponent == NAN_CODE, torch.nan, scale)


def to_float32(scale: Tensor) -> Tensor:
    """A scale as files hold it, float32 or E8M0 (uint8 or float8_e8m0fnu), in float32."""
    if scale.dtype == torch.float32:
        return scale
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return decode(scale)
    raise ValueError(f"a scale is float32 or E8M0, got {scale.dtype}")
