"""E2M1: four-bit floats, the values 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, in blocks with one scale each.

Used for the index queries and keys in blocks of 32 (report 5.2.1; published kernel `fp4_act_quant`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.formats.e8m0 import block_scale

LARGEST = 6.0
AMAX_FLOOR = 6.0 * 2.0**-126  # keeps the scale a normal float32


def round_to_e2m1(x: Tensor) -> Tensor:
    """Nearest E2M1 value of float32 x in [-6, 6], ties to the even code."""
    magnitude = x.abs()
    # Below 2 the values are 0.5 apart, below 4 they are 1 apart, above 2 apart: torch.round rounds ties to even,
    # and the even multiple is the even code in each of the three ranges.
    fine = torch.round(magnitude * 2.0) * 0.5
    middle = torch.round(magnitude)
    coarse = torch.round(magnitude * 0.5) * 2.0
    rounded = torch.where(magnitude < 2.0, fine, torch.where(magnitude < 4.0, middle, coarse))
    return torch.copysign(rounded, x)


def fake_quantize(x: Tensor, block: int = 32) -> Tensor:
    """Round the last axis (a multiple of `block`) to E2M1 with power-of-two scales; same shape and dtype back."""
    if x.shape[-1] % block:
        raise ValueError(f"the last axis ({x.shape[-1]}) must be a multiple of the block ({block})")
    blocks = x.float().reshape(*x.shape[:-1], x.shape[-1] // block, block)
    scale = block_scale(blocks.abs().amax(-1, keepdim=True), LARGEST, AMAX_FLOOR)
    rounded = round_to_e2m1((blocks / scale).clamp(-LARGEST, LARGEST)) * scale
    return rounded.flatten(-2).to(x.dtype)
