"""E2M1: four-bit floats, the values 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, in blocks with one scale each.

Used in blocks of 32 along the width for index queries and keys and for the weights of the routed experts (report 5.2.1;
published kernels `fp4_act_quant` and `fp4_gemm`). Two codes share a byte, the value with the even index in the low
nibble.

A four-bit weight is multiplied as an eight-bit one: `to_fp8` turns it into E4M3 blocks of 128 x 128 without loss. The
scale of such a block is its largest sub-scale / 2^6, so that the largest value, 6 x 2^6, stays below 448; a sub-block
whose scale is smaller by 2^11 has its smallest value 0.5 at E4M3's smallest normal, 2^-6. A weight whose sub-scales
differ by more is refused.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from leadline.formats import e8m0, fp8

LARGEST = 6.0
AMAX_FLOOR = 6.0 * 2.0**-126  # keeps the scale a normal float32
BLOCK = 32
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; the fourth bit is the sign
_RATIO_EXPONENT = 11  # two sub-scales of one block of 128 x 128 differ by at most 2^11
_HEADROOM_EXPONENT = 6


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


def encode(values: Tensor) -> Tensor:
    """Codes 0..15, uint8, of E2M1 values in float32."""
    magnitude = values.abs()
    # Codes and values are evenly spaced in each of three ranges; a search in the table takes twice as long.
    codes = torch.where(
        magnitude < 2.0, magnitude * 2.0, torch.where(magnitude < 4.0, magnitude + 2.0, magnitude * 0.5 + 4.0)
    )
    # NaN must stay a nibble too.
    return (codes.to(torch.uint8) & 7) | (values.signbit().to(torch.uint8) << 3)


def decode(codes: Tensor) -> Tensor:
    """Float32 values of codes 0..15."""
    return _table(codes.device)[codes.int()]


@cache
def _table(device: torch.device) -> Tensor:
    # Worked out on the device: a copy from the host would make it wait.
    code = torch.arange(16, device=device)
    magnitude = code & 7
    quarters = torch.where(magnitude < 2, 2 * magnitude, (2 + (magnitude & 1)) << (magnitude >> 1))
    value = quarters.float() / 4
    return torch.where(code < 8, value, -value)


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the even index in the low nibble: uint8 [..., N] of codes 0..15 to uint8 [..., N / 2]."""
    if codes.shape[-1] % 2:
        raise ValueError(f"four-bit codes are packed in pairs, got a last axis of {codes.shape[-1]}")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Codes 0..15, uint8 [..., N], of bytes [..., N / 2] given as uint8, int8 or float4_e2m1fn_x2."""
    pairs = packed.view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)


def quantize(x: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Packed codes, uint8 [..., N / 2], and scales, float32 [..., N / block], of x [..., N].

    N is even and a multiple of `block`. Power-of-two scales, round to nearest even. A block with an infinity or NaN
    gets the scale NaN. Contiguous.
    """
    values, scale = _round(x, block)
    return pack(encode(values)).contiguous(), scale.contiguous()


def dequantize(packed: Tensor, scale: Tensor) -> Tensor:
    """Float32 [..., N] of packed codes [..., N / 2] and scales [..., blocks], float32 or E8M0; the blocks share N."""
    width, blocks = 2 * packed.shape[-1], scale.shape[-1]
    if packed.shape[:-1] != scale.shape[:-1] or blocks * (width // max(blocks, 1)) != width:
        raise ValueError(
            f"packed codes {list(packed.shape)} do not fit scales {list(scale.shape)}: one for each block of "
            f"a row of {width} values is needed"
        )
    values = decode(unpack(packed)).reshape(*scale.shape, width // max(blocks, 1))
    return (values * e8m0.to_float32(scale).unsqueeze(-1)).flatten(-2)


def fake_quantize(x: Tensor, block: int = BLOCK) -> Tensor:
    """Round the last axis (a multiple of `block`) to E2M1 with power-of-two scales; same shape and dtype back."""
    values, scale = _round(x, block)
    return (values.reshape(*scale.shape, block) * scale.unsqueeze(-1)).flatten(-2).to(x.dtype)


def fp8_scale(packed_ON: Tensor, scale: Tensor, name: str = "weight") -> Tensor:
    """The scale of each 128 x 128 block under which a four-bit weight is exact in E4M3: largest sub-scale / 2^6.

    packed_ON: [..., O, N / 2]. scale: powers of two, float32 or E8M0, [..., O, N / 32]. Returns float32
    [..., ceil(O / 128), ceil(N / 128)]. Sub-blocks of zeros have no say in it. `name` is for the error, raised when two
    sub-scales of one block differ by more than 2^11. Waits for the device.
    """
    *stack, rows, half = packed_ON.shape
    if tuple(scale.shape) != (*stack, rows, 2 * half // BLOCK) or 2 * half % BLOCK:
        raise ValueError(
            f"{name}: packed codes {list(packed_ON.shape)} need scales {[*stack, rows, 2 * half // BLOCK]}, one for "
            f"{BLOCK} values in a row, got {list(scale.shape)}"
        )
    exponents = e8m0.encode(e8m0.to_float32(scale)).to(torch.int16)
    if (exponents == e8m0.NAN_CODE).any():
        raise ValueError(f"{name}: a scale is NaN or no power of two; the file is damaged")
    used = (packed_ON.view(torch.uint8) & 0x77).reshape(*scale.shape, BLOCK // 2).amax(-1) > 0
    largest = _block_amax(torch.where(used, exponents, 0))
    smallest = e8m0.NAN_CODE - _block_amax(torch.where(used, e8m0.NAN_CODE - exponents, 0))
    spread = (largest - smallest).clamp_min(0)
    if (spread > _RATIO_EXPONENT).any():
        block = torch.unravel_index(spread.argmax(), spread.shape)
        raise ValueError(
            f"{name}: the sub-scales of block {[int(i) for i in block]} differ by 2^{int(spread.max())}, more than the "
            f"2^{_RATIO_EXPONENT} that four bits in eight can hold exactly; use the bf16 format for it"
        )
    return e8m0.decode((largest - _HEADROOM_EXPONENT).clamp_min(1).to(torch.uint8))


def to_fp8(packed_ON: Tensor, scale: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """The same weight in E4M3: codes, float8_e4m3fn [..., O, N], and scales [..., ceil(O / 128), ceil(N / 128)]. Exact.

    Arguments, scales and error as in `fp8_scale`.
    """
    block_scale = fp8_scale(packed_ON, scale, name)
    rows, columns = packed_ON.shape[-2], 2 * packed_ON.shape[-1]
    per_row = block_scale.repeat_interleave(fp8.WEIGHT_BLOCK, -2)[..., :rows, :]
    per_value = per_row.repeat_interleave(fp8.WEIGHT_BLOCK, -1)[..., :columns]
    return (dequantize(packed_ON, scale) / per_value).to(torch.float8_e4m3fn), block_scale


def _round(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """E2M1 values in the shape of x, float32, and the scales of their blocks."""
    if x.shape[-1] % block:
        raise ValueError(f"the last axis ({x.shape[-1]}) must be a multiple of the block ({block})")
    blocks = x.float().reshape(*x.shape[:-1], x.shape[-1] // block, block)
    scale = e8m0.block_scale(blocks.abs().amax(-1, keepdim=True), LARGEST, AMAX_FLOOR)
    return round_to_e2m1((blocks / scale).clamp(-LARGEST, LARGEST)).flatten(-2), scale.squeeze(-1)


def _block_amax(x_OB: Tensor) -> Tensor:
    """Maximum of non-negative [..., O, N / 32] over the 128 rows and 4 columns of each block of 128 x 128."""
    rows, groups = fp8.WEIGHT_BLOCK, fp8.WEIGHT_BLOCK // BLOCK
    padded = torch.nn.functional.pad(x_OB, (0, -x_OB.shape[-1] % groups, 0, -x_OB.shape[-2] % rows))
    *stack, height, width = padded.shape
    return padded.reshape(*stack, height // rows, rows, width // groups, groups).amax((-3, -1))
