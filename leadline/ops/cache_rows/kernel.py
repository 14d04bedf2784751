"""Rows of a cache in Triton, and the decoding of packed rows that the kernels of decoding share.

A program has a few rows and walks over their columns in chunks of one block of scales, so that a row's scale is one
byte a chunk. Floor: the bytes of the rows and of the vectors, each once; the arithmetic is a few operations a value.

Codes are turned into floats by moving their bits. E4M3 has the layout of a float with a smaller exponent field: its
seven bits behind the sign, put at the top of a float32's exponent and mantissa, are the value times 2^-120, subnormal
codes included, and one exact product repairs that. The same goes for E2M1, with 2^-126. It works alike on every GPU and
under the interpreter, and no rounding is involved. The way back rounds to nearest even with integer arithmetic: the
bits that are cut off are rounded into the rest, and below the smallest normal code the addition of 2^14 lets the adder
round at the place of the smallest subnormal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.formats import fp4, fp8
from leadline.formats.cache_entry import KEY_BLOCK
from leadline.ops.opaque import opaque

VALUES_PER_TILE = 2048


@triton.jit
def begin(EARLY: tl.constexpr):
    """The first line of a kernel that was started early (`starts_early`): waits until the kernel before it is done and
    what it wrote can be read, and lets the next one start."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def e8m0_to_float(code):
    """2^(code - 127) of uint8 codes; 255 is NaN."""
    bits = tl.where(code == 0, 0x400000, code.to(tl.int32) << 23)
    return tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_to_float(code):
    """Values of uint8 codes. The two codes of NaN become 480: a block that holds one has NaN for a scale."""
    code = code.to(tl.int32)
    bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def e2m1_to_float(code):
    """Values of codes 0..15 in int32."""
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


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


@triton.jit
def _scale_code(x, LARGEST: tl.constexpr, FLOOR: tl.constexpr):
    """E8M0 codes of the rows of x [R, block], as `formats.e8m0.block_scale` and `encode` give them, int32 [R]."""
    # Bits of magnitudes are ordered like them, and NaN is above infinity.
    amax = tl.max((x.to(tl.int32, bitcast=True) & 0x7FFFFFFF), 1)
    wanted = tl.maximum(amax.to(tl.float32, bitcast=True), FLOOR) * (1.0 / LARGEST)
    bits = wanted.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    return tl.where(amax < 0x7F800000, exponent, 255)


@triton.jit
def _inverse(scale_code):
    """2^(127 - code). The floors of the formats keep it normal."""
    return ((254 - scale_code) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3_codes(x):
    """Codes of FP32 values, at most 448 in magnitude but for rounding."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), 448.0)
    above = magnitude.to(tl.int32, bitcast=True)
    normal = ((above + 0x7FFFF + ((above >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) & 0x1F
    return (tl.where(magnitude < 0.015625, subnormal, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _e2m1_codes(x):
    """Codes 0..15 of FP32 values, in int32. Halfway between two values the even code is taken."""
    bits = x.to(tl.int32, bitcast=True)
    a = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32) + (a >= 1.75).to(tl.int32)
    code += (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32) + (a > 5.0).to(tl.int32)
    return code | ((bits >> 28) & 8)


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
                scale_R = _scale_code(block, LARGEST, FLOOR)
                tl.store(scales + row_R * groups + at // CHUNK, scale_R.to(tl.uint8), mask=row_R >= 0)
                block *= _inverse(scale_R)[:, None]
                if INDEX:
                    even, odd = tl.split(tl.reshape(_e2m1_codes(block), (ROWS, CHUNK // 2, 2)))
                    pair = at // 2 + tl.arange(0, CHUNK // 2)
                    tl.store(
                        target + row_R[:, None] * (K // 2) + pair[None, :], (even | (odd << 4)).to(tl.uint8), mask=real
                    )
                else:
                    place = target + row_R[:, None] * (K + R) + column[None, :]
                    tl.store(place, _e4m3_codes(block), mask=real & (column < coded)[None, :])
            if at + CHUNK > coded:
                place = rotary + row_R[:, None] * ((K + R) // 2) + (coded // 2 + column - coded)[None, :]
                tl.store(place, x.to(tl.bfloat16), mask=here & (column >= coded)[None, :])
    if scales is not None and not INDEX:
        blocks: tl.constexpr = (K - R + 63) // 64
        for group in tl.static_range(blocks, groups):
            tl.store(scales + row_R * groups + group, tl.zeros((ROWS,), tl.uint8), mask=row_R >= 0)


def starts_early(device: torch.device) -> bool:
    """Whether the kernels of decoding start while the one before is still running, which hides the time that a start
    takes; they wait before they read. GPUs can from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


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
