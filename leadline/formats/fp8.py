"""E4M3: eight-bit floats (one sign, four exponent, three mantissa bits; largest 448) in blocks with one scale each.

Used for cache entries in blocks of 64 along the width (report 5.2.1; published kernel `act_quant`). `fake_quantize`
rounds through the format and back, so that training and the reference see what the packed cache will hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.formats.e8m0 import block_scale

LARGEST = 448.0
AMAX_FLOOR = 1e-4  # the published kernel's floor


def fake_quantize(x: Tensor, block: int) -> Tensor:
    """Round the last axis to E4M3 in blocks of `block` values with power-of-two scales; same shape and dtype back.

    The last axis need not be a multiple of `block`: the last block is then shorter. Round to nearest even.
    """
    width = x.shape[-1]
    pad = -width % block
    padded = torch.nn.functional.pad(x.float(), (0, pad))
    blocks = padded.reshape(*padded.shape[:-1], padded.shape[-1] // block, block)
    scale = block_scale(blocks.abs().amax(-1, keepdim=True), LARGEST, AMAX_FLOOR)
    rounded = (blocks / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(-2)[..., :width].to(x.dtype)
