"""Activations to E4M3, in Triton, and the tiles of a grouped product.

Rounding is bound by bytes: a program reads a few rows of four slabs once and writes codes, and scales with a slab to a
row, so that a product reads those of a tile of tokens as one run. For a grouped product one more program lists its
tiles, because only the device knows how many rows an expert has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.ops.cache_rows.format_kernel import (
    e4m3_codes,
    e8m0_inverse,
    e8m0_to_float,
    largest_magnitude,
    scale_codes,
)
from leadline.ops.quantized_linear.weight import SLAB

ALIGNMENT = 4  # tokens: a run of scales begins at a multiple of 16 bytes
TILE_FIELDS = 4  # of the list of tiles: expert, first token, begin and end of the tokens that are stored
ROW_BLOCK, SLAB_BLOCK = 4, 4  # of a program


@triton.jit
def _place(column, PERMUTED: tl.constexpr):
    """The column of a slab whose value stands at `column`. For FP4 on Hopper, the order in which the four threads of a
    row find its codes: column 32 k + 16 h + 4 t + b is value 32 t + 8 k + 4 h + b."""
    if PERMUTED:
        k, h, t, b = column // 32, column // 16 % 2, column // 4 % 4, column % 4
        column = 32 * t + 8 * k + 4 * h + b
    return column


@triton.jit
def _list_tiles(counts_ptr, tiles_ptr, E: tl.constexpr, TOKENS: tl.constexpr, BLOCK_E: tl.constexpr):
    """The tiles of all experts: their number, and for each its TILE_FIELDS. A tile begins at a multiple of four tokens,
    so that its scales are aligned, and may see rows of the expert before."""
    expert = tl.arange(0, BLOCK_E)
    count = tl.load(counts_ptr + expert, mask=expert < E, other=0).to(tl.int32)
    end = tl.cumsum(count, 0)
    start = end - count
    aligned = start // 4 * 4
    tiles = tl.where(count > 0, tl.cdiv(end - aligned, TOKENS), 0)
    first_tile = tl.cumsum(tiles, 0) - tiles
    tl.store(tiles_ptr, tl.sum(tiles, 0))
    for number in range(tl.max(tiles, 0)):
        entry = tiles_ptr + 4 + (first_tile + number) * 4
        token = aligned + number * TOKENS
        real = number < tiles
        tl.store(entry, expert, mask=real)
        tl.store(entry + 1, token, mask=real)
        tl.store(entry + 2, tl.maximum(start, token), mask=real)
        tl.store(entry + 3, tl.minimum(end, token + TOKENS), mask=real)


@triton.jit
def quantized_linear_round_kernel(
    x_ptr, codes_ptr, scale_ptr, counts_ptr, tiles_ptr, num_rows, stride,
    N: tl.constexpr, E: tl.constexpr, TOKENS: tl.constexpr, PERMUTED: tl.constexpr,
    BLOCK_E: tl.constexpr, ROW_BLOCK: tl.constexpr, SLAB_BLOCK: tl.constexpr,
):  # fmt: skip
    """codes [T, N] and scale [slabs, stride] of x [T, N]; the last program along the rows lists the tiles."""
    block = tl.program_id(0)
    if counts_ptr is not None and block == tl.num_programs(0) - 1:
        if tl.program_id(1) == 0:
            _list_tiles(counts_ptr, tiles_ptr, E, TOKENS, BLOCK_E)
        return
    row = block.to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    column = tl.program_id(1) * (SLAB_BLOCK * 128) + tl.arange(0, SLAB_BLOCK * 128)
    source = column // 128 * 128 + _place(column % 128, PERMUTED)
    real = (row < num_rows)[:, None]
    x = tl.load(x_ptr + row[:, None] * N + source[None, :], mask=real & (source < N)[None, :], other=0.0)
    x = x.to(tl.float32).reshape(ROW_BLOCK, SLAB_BLOCK, 128)
    exponent = scale_codes(largest_magnitude(x), 448.0, 1e-4)
    codes = e4m3_codes(x * e8m0_inverse(exponent)[:, :, None]).reshape(ROW_BLOCK, SLAB_BLOCK * 128)
    tl.store(codes_ptr + row[:, None] * N + column[None, :], codes, mask=real & (column < N)[None, :])
    scale = e8m0_to_float(exponent)
    slab = tl.program_id(1) * SLAB_BLOCK + tl.arange(0, SLAB_BLOCK)
    pointers = scale_ptr + slab.to(tl.int64)[None, :] * stride + row[:, None]
    tl.store(pointers, scale, mask=real & (slab * 128 < N)[None, :])


class Activations(NamedTuple):
    """Rounded activations. codes: E4M3 as uint8 [T, N]. scale: [slabs, stride], a column for each row of x. tiles: the
    list of the tiles of a grouped product, at most `max_tiles` of `tokens` tokens; None for a dense one."""

    codes: Tensor
    scale: Tensor
    tiles: Tensor | None
    max_tiles: int
    tokens: int


class Weight(NamedTuple):
    """Contiguous parts of a weight, formats of one byte as uint8. block_scale: of blocks of 128 x 128. sub_scale: of
    the sub-blocks of FP4, None for FP8."""

    codes: Tensor
    block_scale: Tensor
    sub_scale: Tensor | None


def round_activations(x_TN: Tensor, counts_E: Tensor | None, tokens: int, permuted: bool) -> Activations:
    """Contiguous x in E4M3 and, with counts, the tiles of at most `tokens` tokens."""
    (num_rows, width), device = x_TN.shape, x_TN.device
    codes_TN = torch.empty(x_TN.shape, dtype=torch.uint8, device=device)
    slabs, stride = triton.cdiv(width, SLAB), triton.cdiv(num_rows, ALIGNMENT) * ALIGNMENT
    scale = torch.empty(slabs, stride, device=device)
    experts = 0 if counts_E is None else len(counts_E)
    used = min(experts, num_rows)
    max_tiles = used + (num_rows + (ALIGNMENT - 1) * used) // tokens if experts else triton.cdiv(num_rows, tokens)
    tiles = torch.empty((max_tiles + 1) * TILE_FIELDS, dtype=torch.int32, device=device) if experts else None
    grid = (triton.cdiv(num_rows, ROW_BLOCK) + (tiles is not None), triton.cdiv(slabs, SLAB_BLOCK))
    quantized_linear_round_kernel[grid](
        x_TN, codes_TN, scale, counts_E, tiles, num_rows, stride,
        width, experts, tokens, permuted, triton.next_power_of_2(max(experts, 1)), ROW_BLOCK, SLAB_BLOCK, num_warps=4,
    )  # fmt: skip
    return Activations(codes_TN, scale, tiles, max_tiles, tokens)
