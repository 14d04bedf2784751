"""Quantised products in Triton: activations to E4M3, and a product that runs on any GPU.

Rounding the activations is bound by their bytes: a program reads a few rows of four slabs once and writes codes, and
scales with a slab to a row, so that the product reads those of a tile of tokens as one run. E4M3 codes are made by
integer arithmetic on the bits of the float, which is the same on every GPU. For a grouped product one more program
lists its tiles, because only the device knows how many rows an expert has.

The product decodes both operands to BF16, where E4M3 values are exact, as is an E2M1 value times sub-scale / block
scale; each slab is then one product in FP32, scaled and added. Hopper has a kernel of its own (`hopper.py`), with the
eight-bit matrix units and the order of work written out; this one is for every other card, and for the interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.formats import e8m0
from leadline.ops.opaque import opaque
from leadline.ops.quantized_linear.weight import SLAB, QuantizedWeight

ALIGNMENT = 4  # tokens: a run of scales begins at a multiple of 16 bytes
TILE_FIELDS = 4  # of the list of tiles: expert, first token, begin and end of the tokens that are stored
ROW_BLOCK, SLAB_BLOCK = 4, 4  # of a program that rounds activations
ROWS_OF_A_TILE = 64  # of the weight


@triton.jit
def _e4m3(value):
    """Codes of float32 values of at most 448, to nearest even."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are multiples of 2^-9, which is the last bit of a sum with 2^14.
    small = (tl.abs(value) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


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
    # As integers, magnitudes are ordered as they are as floats, and NaN is above all of them.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2)
    amax = largest.to(tl.float32, bitcast=True)
    bits = (tl.maximum(amax, 1e-4) * (1.0 / 448.0)).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    codes = _e4m3(x * inverse[:, :, None]).reshape(ROW_BLOCK, SLAB_BLOCK * 128)
    tl.store(codes_ptr + row[:, None] * N + column[None, :], codes, mask=real & (column < N)[None, :])
    scale = tl.where(largest < 0x7F800000, exponent << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    slab = tl.program_id(1) * SLAB_BLOCK + tl.arange(0, SLAB_BLOCK)
    pointers = scale_ptr + slab.to(tl.int64)[None, :] * stride + row[:, None]
    tl.store(pointers, scale, mask=real & (slab * 128 < N)[None, :])


@triton.jit
def _e4m3_value(codes):
    """Float32 values of E4M3 codes: their bits, moved to the fields of a float32 whose exponents count from 2^-120."""
    codes = codes.to(tl.int32)
    value = ((codes & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where(codes >= 128, -value, value)


@triton.jit
def _e2m1_value(codes):
    """Float32 values of E2M1 codes 0..15."""
    value = ((codes & 7) << 22).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
    return tl.where(codes >= 8, -value, value)


@triton.jit
def _e8m0_value(scale):
    """Float32 values of scales that may be stored as E8M0."""
    if scale.dtype == tl.uint8:
        bits = scale.to(tl.int32)
        return tl.where(bits == 0, 1 << 22, bits << 23).to(tl.float32, bitcast=True)
    else:
        return scale


@triton.jit
def quantized_linear_fwd_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, sub_scale_ptr, tiles_ptr, y_ptr, num_rows, stride,
    O: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, BLOCK_O: tl.constexpr, DOT: tl.constexpr,  # noqa: E741
):  # fmt: skip
    """y [T, O] = x W^T of a tile. DOT: dtype of the products, BF16 or, for the interpreter, FP32."""
    blocks = tl.cdiv(O, BLOCK_O)
    tile = tl.program_id(0) // blocks
    o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    first = tile * TOKENS
    begin = first
    end = num_rows
    expert = 0
    if tiles_ptr is not None:
        if tile >= tl.load(tiles_ptr):
            return
        entry = tiles_ptr + 4 + tile * 4
        expert = tl.load(entry)
        first, begin, end = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    t = first + tl.arange(0, TOKENS)
    stored = (t >= begin) & (t < end)
    rows = tl.cast(expert, tl.int64) * O + o
    slabs: tl.constexpr = (N + 127) // 128
    scale_rows = (tl.cast(expert, tl.int64) * ((O + 127) // 128) + o // 128) * slabs
    y = tl.zeros((TOKENS, BLOCK_O), tl.float32)
    for slab in range(slabs):
        n = slab * 128 + tl.arange(0, 128)
        inside = stored[:, None] & (n < N)[None, :]
        x = tl.load(x_ptr + t.to(tl.int64)[:, None] * N + n[None, :], mask=inside, other=0)
        w_scale = _e8m0_value(tl.load(w_scale_ptr + scale_rows + slab, mask=o < O, other=1))
        if sub_scale_ptr is None:
            w = tl.load(w_ptr + rows[:, None] * N + n[None, :], mask=(o < O)[:, None] & (n < N)[None, :], other=0)
            w = _e4m3_value(w)
        else:
            byte = slab * 64 + tl.arange(0, 64)
            here = (o < O)[:, None] & (2 * byte < N)[None, :]
            pairs = tl.load(w_ptr + rows[:, None] * (N // 2) + byte[None, :], mask=here, other=0).to(tl.int32)
            sub = tl.load(sub_scale_ptr + rows[:, None] * (N // 32) + (byte // 16)[None, :], mask=here, other=0)
            relative = _e8m0_value(sub) / w_scale[:, None]
            low, high = _e2m1_value(pairs & 15) * relative, _e2m1_value(pairs >> 4) * relative
            w = tl.join(low, high).reshape(BLOCK_O, 128)
        products = tl.dot(_e4m3_value(x).to(DOT), w.to(DOT).trans(1, 0), input_precision="ieee")
        x_scale = tl.load(x_scale_ptr + tl.cast(slab, tl.int64) * stride + t, mask=stored, other=0.0)
        y += products * (x_scale[:, None] * w_scale[None, :])
    pointers = y_ptr + t.to(tl.int64)[:, None] * O + o[None, :]
    tl.store(pointers, y.to(y_ptr.dtype.element_ty), mask=stored[:, None] & (o < O)[None, :])


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


def _multiply(rounded: Activations, weight: Weight, y_TO: Tensor) -> None:
    """y = x W^T on any GPU."""
    (num_rows, rows), width = y_TO.shape, rounded.codes.shape[1]
    quantized_linear_fwd_kernel[(rounded.max_tiles * triton.cdiv(rows, ROWS_OF_A_TILE),)](
        rounded.codes, rounded.scale, *weight, rounded.tiles, y_TO, num_rows, rounded.scale.shape[1],
        rows, width, rounded.tokens, ROWS_OF_A_TILE, tl.bfloat16 if y_TO.is_cuda else tl.float32,
        num_warps=4, num_stages=3,
    )  # fmt: skip


def _on_hopper(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


def _results(
    x_TN: Tensor, codes: list[Tensor], block_scales: list[Tensor], sub_scales: list[Tensor], counts_E: Tensor | None
) -> list[Tensor]:
    return [x_TN.new_empty(len(x_TN), one.shape[-2]) for one in codes]


@opaque(_results)
def launch(
    x_TN: Tensor, codes: list[Tensor], block_scales: list[Tensor], sub_scales: list[Tensor], counts_E: Tensor | None
) -> list[Tensor]:
    """x W^T for each weight; x and the parts of `Weight` are contiguous, sub_scales are none for FP8."""
    results = _results(x_TN, codes, block_scales, sub_scales, counts_E)
    if len(x_TN) == 0:
        return results
    weights = list(map(Weight, codes, block_scales, sub_scales or [None] * len(codes)))
    experts = 0 if counts_E is None else len(counts_E)
    if _on_hopper(x_TN):
        from leadline.ops.quantized_linear import hopper

        if all(hopper.takes(y_TO.shape[1], x_TN.shape[1]) for y_TO in results):
            tokens = hopper.tokens_of_a_tile(len(x_TN), experts)
            rounded = round_activations(x_TN, counts_E, tokens, permuted=bool(sub_scales))
            for weight, y_TO in zip(weights, results, strict=True):
                hopper.multiply(rounded, weight, y_TO)
            return results
    tokens = min(max(triton.next_power_of_2(len(x_TN) // max(experts, 1)), 16), 64)
    rounded = round_activations(x_TN, counts_E, tokens, permuted=False)
    for weight, y_TO in zip(weights, results, strict=True):
        _multiply(rounded, weight, y_TO)
    return results


def products(x_TN: Tensor, weights: Sequence[QuantizedWeight], counts_E: Tensor | None) -> tuple[Tensor, ...]:
    """The contract of `reference.products`."""
    codes = [_bytes(weight.codes) for weight in weights]
    block_scales = [_bytes(weight.scale if weight.block_scale is None else weight.block_scale) for weight in weights]
    sub_scales = [_exponents(weight.scale) for weight in weights if weight.block_scale is not None]
    counts_E = None if counts_E is None else counts_E.contiguous()
    return tuple(launch(x_TN.contiguous(), codes, block_scales, sub_scales, counts_E))


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous() if x.dtype == torch.float32 else x.contiguous().view(torch.uint8)


def _exponents(scale: Tensor) -> Tensor:
    """Powers of two as E8M0 bytes; they are that already in a released model."""
    return e8m0.encode(scale) if scale.dtype == torch.float32 else _bytes(scale)
