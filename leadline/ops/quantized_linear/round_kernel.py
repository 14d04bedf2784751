"""Activations to E4M3, in Triton, and the tiles of a grouped product.

Rounding is bound by bytes: a program reads a few rows of four slabs once and writes codes, and scales with a slab to a
row, so that a product reads those of a tile of tokens as one run. What it reads may be tokens in the places of their
copies, or two products whose SwiGLU it takes on the way (`rows.py`). For a grouped product one more program lists its
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
from leadline.ops.early_start import begin, starts_early
from leadline.ops.quantized_linear.weight import SLAB
from leadline.ops.swiglu.kernel import swiglu_values

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
def _load_rows(
    x_ptr, up_ptr, weight_ptr, place_ptr, limit, row, column, here, inside, N: tl.constexpr, CHOICES: tl.constexpr
):
    """What is to be rounded, FP32 [rows, columns], of rows `row`, real where `here`, and columns `column`: x itself;
    with CHOICES, the tokens of the pairs at `place`; with up, the SwiGLU of x and up, rounded as if it were stored."""
    if CHOICES > 0:
        row = tl.load(place_ptr + row, mask=here, other=0) // CHOICES
    x = tl.load(x_ptr + row * N + column, mask=inside, other=0.0).to(tl.float32)
    if up_ptr is not None:
        x = swiglu_values(x, tl.load(up_ptr + row * N + column, mask=inside, other=0.0).to(tl.float32), limit)
        if weight_ptr is not None:
            place = row if place_ptr is None else tl.load(place_ptr + row, mask=here, other=0)
            x *= tl.load(weight_ptr + place, mask=here, other=0.0)
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def quantized_linear_round_kernel(
    x_ptr, up_ptr, weight_ptr, place_ptr, codes_ptr, scale_ptr, counts_ptr, tiles_ptr, num_rows, stride, limit,
    N: tl.constexpr, CHOICES: tl.constexpr, E: tl.constexpr, TOKENS: tl.constexpr, PERMUTED: tl.constexpr,
    BLOCK_E: tl.constexpr, ROW_BLOCK: tl.constexpr, SLAB_BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """codes [X, N] and scale [slabs, stride] of the rows of `_load_rows`; the last program along rows lists tiles."""
    begin(EARLY)
    block = tl.program_id(0)
    if counts_ptr is not None and block == tl.num_programs(0) - 1:
        if tl.program_id(1) == 0:
            _list_tiles(counts_ptr, tiles_ptr, E, TOKENS, BLOCK_E)
        return
    row = block.to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    column = tl.program_id(1) * (SLAB_BLOCK * 128) + tl.arange(0, SLAB_BLOCK * 128)
    source = column // 128 * 128 + _place(column % 128, PERMUTED)
    real = (row < num_rows)[:, None]
    inside = real & (source < N)[None, :]
    x = _load_rows(x_ptr, up_ptr, weight_ptr, place_ptr, limit, row[:, None], source[None, :], real, inside, N, CHOICES)
    x = x.reshape(ROW_BLOCK, SLAB_BLOCK, 128)
    exponent = scale_codes(largest_magnitude(x), 448.0, 1e-4)
    codes = e4m3_codes(x * e8m0_inverse(exponent)[:, :, None]).reshape(ROW_BLOCK, SLAB_BLOCK * 128)
    tl.store(codes_ptr + row[:, None] * N + column[None, :], codes, mask=real & (column < N)[None, :])
    scale = e8m0_to_float(exponent)
    slab = tl.program_id(1) * SLAB_BLOCK + tl.arange(0, SLAB_BLOCK)
    pointers = scale_ptr + slab.to(tl.int64)[None, :] * stride + row[:, None]
    tl.store(pointers, scale, mask=real & (slab * 128 < N)[None, :])


class Operands(NamedTuple):
    """Contiguous parts of `Rows`. x: [T, N], the rows, the tokens that they are copies of, or a gate. up: [T, N], where
    x is a gate; then weight FP32 [X] or None, limit, and place [X], where the weights stand, or None. place with
    choices: the pair of each row, where x are tokens of so many pairs each."""

    x: Tensor
    up: Tensor | None = None
    weight: Tensor | None = None
    place: Tensor | None = None
    limit: float = 0.0
    choices: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.x) if self.place is None else len(self.place)


class Activations(NamedTuple):
    """Rounded activations. codes: E4M3 as uint8 [X, N]. scale: [slabs, stride], a column for each row of x. tiles: the
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


def round_activations(rows: Operands, counts_E: Tensor | None, tokens: int, permuted: bool) -> Activations:
    """Rows in E4M3 and, with counts, the tiles of at most `tokens` tokens."""
    num_rows, width, device = rows.num_rows, rows.x.shape[1], rows.x.device
    codes_XN = torch.empty(num_rows, width, dtype=torch.uint8, device=device)
    slabs, stride = triton.cdiv(width, SLAB), triton.cdiv(num_rows, ALIGNMENT) * ALIGNMENT
    scale = torch.empty(slabs, stride, device=device)
    experts = 0 if counts_E is None else len(counts_E)
    used = min(experts, num_rows)
    max_tiles = used + (num_rows + (ALIGNMENT - 1) * used) // tokens if experts else triton.cdiv(num_rows, tokens)
    tiles = torch.empty((max_tiles + 1) * TILE_FIELDS, dtype=torch.int32, device=device) if experts else None
    grid = (triton.cdiv(num_rows, ROW_BLOCK) + (tiles is not None), triton.cdiv(slabs, SLAB_BLOCK))
    early = starts_early(device)
    quantized_linear_round_kernel[grid](
        *rows[:4], codes_XN, scale, counts_E, tiles, num_rows, stride, rows.limit,
        width, rows.choices, experts, tokens, permuted, triton.next_power_of_2(max(experts, 1)), ROW_BLOCK, SLAB_BLOCK,
        early, launch_pdl=early, num_warps=4,
    )  # fmt: skip
    return Activations(codes_XN, scale, tiles, max_tiles, tokens)
