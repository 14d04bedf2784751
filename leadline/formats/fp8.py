"""E4M3: eight-bit floats (one sign, four exponent, three mantissa bits; largest 448) in blocks with one scale each.

Three shapes of block: 1 x 64 along the width for cache entries (report 5.2.1), 1 x 128 for the activations of a linear
map, 128 x 128 for its weight (published kernels `act_quant` and `fp8_gemm`). A value is its code times the scale of its
block. Scales made here are powers of two; the readers take any, because files of the base models may hold others.

`fake_quantize` rounds through the format and back, so that training and the reference see what the packed form holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.formats import e8m0

LARGEST = 448.0
AMAX_FLOOR = 1e-4  # the published kernel's floor
ACTIVATION_BLOCK = 128
WEIGHT_BLOCK = 128


def quantize(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes, float8_e4m3fn in the shape of x, and scales, float32 [..., ceil(N / block)], of x [..., N].

    Blocks of `block` values along the last axis, the last one shorter when N is no multiple. Power-of-two scales, round
    to nearest even. A block with an infinity or NaN gets the scale NaN. Contiguous.
    """
    blocks = _split(x.float(), block)
    scale = e8m0.block_scale(blocks.abs().amax(-1, keepdim=True), LARGEST, AMAX_FLOOR)
    return _join(_round(blocks, scale), x.shape[-1]).contiguous(), scale.squeeze(-1).contiguous()


def dequantize(codes: Tensor, scale: Tensor, block: int) -> Tensor:
    """Float32 [..., N] of codes [..., N] and scales [..., ceil(N / block)], float32 or E8M0."""
    width = codes.shape[-1]
    _check_grid(scale, (*codes.shape[:-1], -(-width // block)), codes)
    return _join(_split(codes.float(), block) * e8m0.to_float32(scale).unsqueeze(-1), width)


def quantize_weight(w_ON: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales, float32 [..., ceil(O / 128), ceil(N / 128)], of a weight or a stack of them, [..., O, N].

    As `quantize`, in blocks of 128 x 128; blocks at the edges are smaller. Contiguous.
    """
    blocks = _tiles(w_ON.float())
    scale = e8m0.block_scale(blocks.abs().amax((-3, -1), keepdim=True), LARGEST, AMAX_FLOOR)
    return _untile(_round(blocks, scale), w_ON.shape).contiguous(), scale.squeeze((-3, -1)).contiguous()


def dequantize_weight(codes_ON: Tensor, scale: Tensor) -> Tensor:
    """Float32 [..., O, N] of a weight's codes and its scales [..., ceil(O / 128), ceil(N / 128)], float32 or E8M0."""
    *stack, rows, columns = codes_ON.shape
    _check_grid(scale, (*stack, -(-rows // WEIGHT_BLOCK), -(-columns // WEIGHT_BLOCK)), codes_ON)
    blocks = _tiles(codes_ON.float()) * e8m0.to_float32(scale)[..., :, None, :, None]
    return _untile(blocks, codes_ON.shape)


def fake_quantize(x: Tensor, block: int) -> Tensor:
    """Round the last axis to E4M3 in blocks of `block` values with power-of-two scales; same shape and dtype back.

    The last axis need not be a multiple of `block`: the last block is then shorter. Round to nearest even.
    """
    return dequantize(*quantize(x, block), block).to(x.dtype)


def _round(blocks: Tensor, scale: Tensor) -> Tensor:
    return (blocks / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def _split(x: Tensor, block: int) -> Tensor:
    """[..., N] as [..., blocks, block], filled up with zeros."""
    missing = -x.shape[-1] % block
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    return x.reshape(*x.shape[:-1], x.shape[-1] // block, block)


def _join(blocks: Tensor, width: int) -> Tensor:
    return blocks.flatten(-2)[..., :width]


def _tiles(w_ON: Tensor) -> Tensor:
    """[..., O, N] as [..., row blocks, 128, column blocks, 128], filled up with zeros."""
    *stack, rows, columns = w_ON.shape
    missing_rows, missing_columns = -rows % WEIGHT_BLOCK, -columns % WEIGHT_BLOCK
    if missing_rows or missing_columns:
        w_ON = torch.nn.functional.pad(w_ON, (0, missing_columns, 0, missing_rows))
    grid = (w_ON.shape[-2] // WEIGHT_BLOCK, WEIGHT_BLOCK, w_ON.shape[-1] // WEIGHT_BLOCK, WEIGHT_BLOCK)
    return w_ON.reshape(*stack, *grid)


def _untile(blocks: Tensor, shape: torch.Size) -> Tensor:
    return blocks.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]]


def _check_grid(scale: Tensor, expected: tuple[int, ...], codes: Tensor) -> None:
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"codes {list(codes.shape)} need scales {list(expected)}, got {list(scale.shape)}: wrong block grid"
        )
