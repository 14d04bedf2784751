"""Packed cache entries: the bytes that the cache of a released model holds (report 3.5).

A window key or entry of K values, of which the last R are the rotary part, takes a row in each of two tensors (here for
K = 512 and R = 64, 584 bytes in all):

    payload   576   K - R codes E4M3, then the R rotary values in BF16, low byte first
    scales      8   one E8M0 code for each block of 64 of the K - R values, then zeros up to a multiple of 8

An index key of I values, which has no part of its own (here for I = 128, 68 bytes in all):

    codes      64   I / 2 pairs of E2M1 codes, the value with the even index in the low nibble
    scales      4   one E8M0 code for each block of 32 values

Payload and scales lie in tensors of their own, so that rows of 576 bytes stay aligned to 16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leadline.formats import e8m0, fp4, fp8

KEY_BLOCK = 64
SCALES_ALIGNMENT = 8


class PackedKeys(NamedTuple):
    """Window keys or entries: payload uint8 [..., K + R], scales uint8 [..., S] with S a multiple of 8."""

    payload: Tensor
    scales: Tensor


class PackedIndex(NamedTuple):
    """Index keys: codes uint8 [..., I / 2], scales uint8 [..., I / 32]."""

    codes: Tensor
    scales: Tensor


def key_widths(width: int, rotary_width: int) -> tuple[int, int]:
    """Bytes of payload and of scales of a key of `width` values."""
    blocks = -(-(width - rotary_width) // KEY_BLOCK)
    return width + rotary_width, -(-blocks // SCALES_ALIGNMENT) * SCALES_ALIGNMENT


def index_widths(width: int) -> tuple[int, int]:
    """Bytes of codes and of scales of an index key of `width` values, a multiple of 32."""
    if width % fp4.BLOCK:
        raise ValueError(f"an index key of {width} values cannot be packed: blocks have {fp4.BLOCK}")
    return width // 2, width // fp4.BLOCK


def round_keys(x: Tensor, rotary_width: int) -> Tensor:
    """x [..., K] as packing and unpacking return it, in the dtype of x."""
    rounded = x.clone()
    rounded[..., :-rotary_width] = fp8.fake_quantize(x[..., :-rotary_width], KEY_BLOCK)
    rounded[..., -rotary_width:] = x[..., -rotary_width:].to(torch.bfloat16).to(x.dtype)
    return rounded


def pack_keys(x: Tensor, rotary_width: int) -> PackedKeys:
    """x [..., K] as bytes. A vector that has been packed before keeps its values."""
    codes, scale = fp8.quantize(x[..., :-rotary_width], KEY_BLOCK)
    rotary = x[..., -rotary_width:].to(torch.bfloat16).contiguous().view(torch.uint8)
    scales = torch.nn.functional.pad(e8m0.encode(scale), (0, -scale.shape[-1] % SCALES_ALIGNMENT))
    return PackedKeys(torch.cat([codes.view(torch.uint8), rotary], dim=-1), scales)


def unpack_keys(packed: PackedKeys, rotary_width: int, dtype: torch.dtype) -> Tensor:
    """[..., K] in the given dtype; exact in bfloat16 and wider."""
    codes = packed.payload[..., : -2 * rotary_width].view(torch.float8_e4m3fn)
    rotary = packed.payload[..., -2 * rotary_width :].contiguous().view(torch.bfloat16)
    blocks = -(-codes.shape[-1] // KEY_BLOCK)
    values = fp8.dequantize(codes, packed.scales[..., :blocks], KEY_BLOCK)
    return torch.cat([values.to(dtype), rotary.to(dtype)], dim=-1)


def pack_index(x: Tensor) -> PackedIndex:
    """x [..., I], rotated already, as bytes. A vector that has been packed before keeps its values."""
    codes, scale = fp4.quantize(x)
    return PackedIndex(codes, e8m0.encode(scale))


def unpack_index(packed: PackedIndex, dtype: torch.dtype) -> Tensor:
    """[..., I] in the given dtype; exact in bfloat16 and wider."""
    return fp4.dequantize(packed.codes, packed.scales).to(dtype)
