"""Rows of a cache in Triton, and the decoding of packed rows that the kernels of decoding share.

A program has a few rows and walks over their columns in chunks of one block of scales, so that a row's scale is one
byte a chunk. Floor: the bytes of the rows and of the vectors, each once; the arithmetic is a few operations a value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.formats import fp4, fp8
from leadline.formats.cache_entry import KEY_BLOCK
from leadline.ops.cache_rows.format_kernel import (
    e2m1_codes,
    e2m1_to_float,
    e4m3_codes,
    e4m3_to_float,
    e8m0_inverse,
    e8m0_to_float,
    largest_magnitude,
    scale_codes,
)
from leadline.ops.opaque import opaque

VALUES_PER_TILE = 2048


@triton.jit
def load_rows(
    vectors, rotary, scales, rows_R, real_R,
    K: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr, AT: tl.constexpr,
):  # fmt: skip
    """Columns AT to AT + CHUNK - 1 of some rows of [rows, K] floats, or of packed keys when there are scales; zero
    where a row is not real. Packed: FP32, and CHUNK divides a block of scales. rotary: the payload as bfloat16."""
    column = AT + tl.arange(0, CHUNK)
    here = real_R[:, None] & (column < K)[None, :]
    if scales is None:
        values = tl.load(vectors + rows_R[:, None] * K + column[None, :], mask=here, other=0.0)
    else:
        values = tl.zeros((rows_R.shape[0], CHUNK), tl.float32)
        if AT < K - R:
            coded = here & (column < K - R)[None, :]
            code = tl.load(vectors + rows_R[:, None] * (K + R) + column[None, :], mask=coded, other=0)
            groups: tl.constexpr = ((K - R + 63) // 64 + 7) // 8 * 8
            scale = tl.load(scales + rows_R * groups + AT // 64, mask=real_R, other=127)
            values = e4m3_to_float(code) * e8m0_to_float(scale)[:, None]
        if AT + CHUNK > K - R:
            turned = here & (column >= K - R)[None, :]
            place = (K - R) // 2 + column - (K - R)
            tail = tl.load(rotary + rows_R[:, None] * ((K + R) // 2) + place[None, :], mask=turned, other=0.0)
            values = tl.where((column >= K - R)[None, :], tail.to(tl.float32), values)
    return values


@triton.jit
def load_index_rows(codes, scales, rows_R, real_R, I: tl.constexpr):  # noqa: E741
    """Packed index keys of some rows: the values with an even index and those with an odd one, FP32 [R, I / 2] each."""
    pair = tl.arange(0, I // 2)
    here = real_R[:, None]
    code = tl.load(codes + rows_R[:, None] * (I // 2) + pair[None, :], mask=here, other=0).to(tl.int32)
    scale = e8m0_to_float(tl.load(scales + rows_R[:, None] * (I // 32) + (pair // 16)[None, :], mask=here, other=127))
    return e2m1_to_float(code & 15) * scale, e2m1_to_float(code >> 4) * scale


@triton.jit(do_not_specialize=["X"])
def read_rows_fwd_kernel(
    vectors, rotary, scales, rows_X, out_XK, X,
    K: tl.constexpr, R: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out = source[rows] of one tile of rows. INDEX: the source holds packed index keys; K is a power of two then."""
    x_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_R = tl.load(rows_X + x_R, mask=x_R < X, other=-1).to(tl.int64)
    real_R = row_R >= 0
    here = (x_R < X)[:, None]
    dtype: tl.constexpr = out_XK.dtype.element_ty
    if INDEX:
        even, odd = load_index_rows(vectors, scales, row_R, real_R, K)
        both = tl.reshape(tl.join(even, odd), (ROWS, K))
        tl.store(out_XK + x_R[:, None] * K + tl.arange(0, K)[None, :], both.to(dtype), mask=here)
    else:
        for at in tl.static_range(0, K, CHUNK):
            column = at + tl.arange(0, CHUNK)
            values = load_rows(vectors, rotary, scales, row_R, real_R, K, R, CHUNK, at)
            mask = here & (column < K)[None, :]
            tl.store(out_XK + x_R[:, None] * K + column[None, :], values.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["X"])
def write_rows_fwd_kernel(
    vectors_XK, rows_X, target, rotary, scales, X,
    K: tl.constexpr, R: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    LARGEST: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """target[rows] = vectors of one tile of rows. CHUNK: a block of scales, where there are any. Packed keys also get
    zeros for the scales that only fill up their row."""
    x_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_R = tl.load(rows_X + x_R, mask=x_R < X, other=-1).to(tl.int64)
    real = (row_R >= 0)[:, None]
    groups: tl.constexpr = K // 32 if INDEX else ((K - R + 63) // 64 + 7) // 8 * 8
    coded: tl.constexpr = K if INDEX else K - R
    for at in tl.static_range(0, K, CHUNK):
        column = at + tl.arange(0, CHUNK)
        here = real & (column < K)[None, :]
        x = tl.load(vectors_XK + x_R[:, None] * K + column[None, :], mask=here, other=0.0)
        if scales is None:
            tl.store(target + row_R[:, None] * K + column[None, :], x.to(target.dtype.element_ty), mask=here)
        else:
            if at < coded:
                block = tl.where((column < coded)[None, :], x.to(tl.float32), 0.0)
                scale_R = scale_codes(largest_magnitude(block), LARGEST, FLOOR)
                tl.store(scales + row_R * groups + at // CHUNK, scale_R.to(tl.uint8), mask=row_R >= 0)
                block *= e8m0_inverse(scale_R)[:, None]
                if INDEX:
                    even, odd = tl.split(tl.reshape(e2m1_codes(block), (ROWS, CHUNK // 2, 2)))
                    pair = at // 2 + tl.arange(0, CHUNK // 2)
                    tl.store(
                        target + row_R[:, None] * (K // 2) + pair[None, :], (even | (odd << 4)).to(tl.uint8), mask=real
                    )
                else:
                    place = target + row_R[:, None] * (K + R) + column[None, :]
                    tl.store(place, e4m3_codes(block), mask=real & (column < coded)[None, :])
            if at + CHUNK > coded:
                place = rotary + row_R[:, None] * ((K + R) // 2) + (coded // 2 + column - coded)[None, :]
                tl.store(place, x.to(tl.bfloat16), mask=here & (column >= coded)[None, :])
    if scales is not None and not INDEX:
        blocks: tl.constexpr = (K - R + 63) // 64
        for group in tl.static_range(blocks, groups):
            tl.store(scales + row_R * groups + group, tl.zeros((ROWS,), tl.uint8), mask=row_R >= 0)


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; the interpreter has few programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def rotary_view(values: Tensor, scales: Tensor | None) -> Tensor:
    """The payload of packed keys as bfloat16, of which its last R values are the rotary part; else as it is."""
    return values if scales is None or values.shape[1] % 2 else values.view(torch.bfloat16)


def is_index(values: Tensor, scales: Tensor | None, width: int) -> bool:
    """Whether a source of this width holds packed index keys: two values a byte, where keys have more than one each."""
    return scales is not None and 2 * values.shape[1] == width


def chunk_of(width: int) -> int:
    """Columns of a chunk of packed keys or floats: a block of scales, less for narrower vectors."""
    return min(KEY_BLOCK, max(16, triton.next_power_of_2(width)))


def _shape(values: Tensor, scales: Tensor | None, width: int) -> dict[str, int | bool]:
    index = is_index(values, scales, width)
    rotary_width = 0 if index or scales is None else values.shape[1] - width
    return {
        "K": width,
        "R": rotary_width,
        "INDEX": index,
        "ROWS": max(1, VALUES_PER_TILE // triton.next_power_of_2(width)),
    }


def _new_rows(values: Tensor, scales: Tensor | None, rows_X: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return values.new_empty((len(rows_X), width), dtype=dtype)


@opaque(_new_rows)
def read_rows_kernel(values: Tensor, scales: Tensor | None, rows_X: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """`read_rows` for a source as `operands` gives it."""
    out_XK = _new_rows(values, scales, rows_X, width, dtype)
    shape = _shape(values, scales, width)
    read_rows_fwd_kernel[(triton.cdiv(len(rows_X), shape["ROWS"]),)](
        values, rotary_view(values, scales), scales, rows_X, out_XK, len(rows_X),
        **shape, CHUNK=chunk_of(width), num_warps=4,
    )  # fmt: skip
    return out_XK


def _nothing(values: Tensor, scales: Tensor | None, rows_X: Tensor, vectors_XK: Tensor) -> None:
    return None


@opaque(_nothing, changes=("values", "scales"))
def write_rows_kernel(values: Tensor, scales: Tensor | None, rows_X: Tensor, vectors_XK: Tensor) -> None:
    """`write_rows` for a target as `operands` gives it."""
    width = vectors_XK.shape[1]
    shape = _shape(values, scales, width)
    chunk, number_format = (fp4.BLOCK, fp4) if shape["INDEX"] else (chunk_of(width), fp8)
    write_rows_fwd_kernel[(triton.cdiv(len(rows_X), shape["ROWS"]),)](
        vectors_XK.contiguous(), rows_X, values, rotary_view(values, scales), scales, len(rows_X),
        **shape, CHUNK=chunk, LARGEST=number_format.LARGEST, FLOOR=number_format.AMAX_FLOOR, num_warps=4,
    )  # fmt: skip
