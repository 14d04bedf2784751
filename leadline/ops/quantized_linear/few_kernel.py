"""Products of few tokens with eight-bit weights, in Triton, on any GPU: a step of decoding reads its weights and does
little else.

Bytes are the floor: every weight is read once and multiplied once. The matrix units do not help; what counts is that
all processors read at once, also from a small matrix. So a program takes a few rows of the weight over their whole
width, there are many programs, and each rounds the activations for itself, which are few and in the cache: one launch
does what otherwise takes two, and it takes two weights where they meet the same tokens.

To turn codes into floats is most of the work, unless the GPU has an instruction for it. A thread multiplies the sixteen
codes that it has read at once and keeps their sum, and one reduction at the end adds the threads. The order of the sum
therefore differs from that of the other kernels.

Four-bit weights are left to the other kernels: taking their codes apart costs more than reading them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.ops.cache_rows.format_kernel import (
    e4m3_to_float,
    e8m0_inverse,
    e8m0_to_float,
    largest_magnitude,
    round_to_e4m3,
    scale_codes,
)
from leadline.ops.early_start import let_next_start, starts_early, wait_for_earlier
from leadline.ops.quantized_linear.round_kernel import Operands, Weight
from leadline.ops.swiglu.kernel import swiglu_values

MOST_TOKENS = 4
# Each token reads the weight, the later ones from the cache, so that small weights alone are worth it for several.
MOST_VALUES = 17 * 2**20
FEW_WEIGHT_ROWS = 2048
TOGETHER = 16  # columns that a thread adds up before it keeps the sum


@triton.jit
def _rounded(x, w_scale, NATIVE: tl.constexpr):
    """x [N] rounded to E4M3 in slabs: the values with their scales and those of the weight, w_scale [slabs], and NaN in
    a slab with an infinity or NaN."""
    x = x.reshape(w_scale.shape[0], 128)
    code = scale_codes(largest_magnitude(x), 448.0, 1e-4)
    x = x * e8m0_inverse(code)[:, None]
    x = x.to(tl.float8e4nv).to(tl.float32) if NATIVE else round_to_e4m3(x)
    return (x * (e8m0_to_float(code) * w_scale)[:, None]).reshape(x.shape[0] * 128)


@triton.jit
def _values(codes, NATIVE: tl.constexpr):
    """Codes as floats, by the converter of GPUs that have one."""
    if NATIVE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        return e4m3_to_float(codes)


@triton.jit
def scale_value(scale):
    """Float32 values of a weight's scales, which may be stored as E8M0."""
    if scale.dtype == tl.uint8:
        bits = scale.to(tl.int32)
        return tl.where(bits == 0, 1 << 22, bits << 23).to(tl.float32, bitcast=True)
    else:
        return scale


@triton.jit
def quantized_linear_few_kernel(
    x, up, w, other_w, w_scale, other_w_scale, y, other_y, limit,
    O: tl.constexpr, OTHER_O: tl.constexpr, N: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr, NATIVE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y [T, O] = x W^T for token `program 0` and some ROWS of the weight, or, behind its last, of the other one. With
    up, x is the SwiGLU of itself and up."""
    let_next_start(EARLY)
    SLABS_OF_ROW: tl.constexpr = (N + 127) // 128
    token, program = tl.program_id(0), tl.program_id(1)
    rows = O
    if OTHER_O > 0:
        PROGRAMS: tl.constexpr = (O + ROWS - 1) // ROWS
        if program >= PROGRAMS:
            w, w_scale, y, rows, program = other_w, other_w_scale, other_y, OTHER_O, program - PROGRAMS
    o = program * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    w += o.to(tl.int64)[:, None] * N + column[None, :]
    w_scale += program * ROWS // 128 * SLABS_OF_ROW
    next_codes = tl.load(w, mask=(o < rows)[:, None] & (column < N)[None, :], other=0)
    slab = tl.arange(0, COLUMNS // 128)
    next_scale = tl.load(w_scale + slab, mask=slab < SLABS_OF_ROW, other=0)
    wait_for_earlier(EARLY)  # the weight is on its way while other kernels still write the activations
    sums = tl.zeros((ROWS, COLUMNS // TOGETHER), tl.float32)
    for start in range(0, N, COLUMNS):
        codes, scale = next_codes, next_scale
        after = start + COLUMNS
        if N > COLUMNS:
            next_codes = tl.load(w + after, mask=(o < rows)[:, None] & (column < N - after)[None, :], other=0)
            next_scale = tl.load(w_scale + after // 128 + slab, mask=slab < SLABS_OF_ROW - after // 128, other=0)
        n = start + column
        a = tl.load(x + token * N + n, mask=n < N, other=0.0).to(tl.float32)
        if up is not None:
            a = swiglu_values(a, tl.load(up + token * N + n, mask=n < N, other=0.0).to(tl.float32), limit)
            a = a.to(x.dtype.element_ty).to(tl.float32)
        products = _values(codes, NATIVE) * _rounded(a, scale_value(scale), NATIVE)[None, :]
        sums += tl.sum(products.reshape(ROWS, COLUMNS // TOGETHER, TOGETHER), 2)
    tl.store(y + token * rows + o, tl.sum(sums, 1).to(y.dtype.element_ty), mask=o < rows)


class Shape(NamedTuple):
    """Of a program: rows of the weight, columns at a time, warps."""

    rows: int
    columns: int
    warps: int


def takes(rows: Operands, weight: Weight, counts_E: Tensor | None) -> bool:
    """Whether this is a product of few tokens with one eight-bit matrix."""
    tokens = rows.num_rows
    plain = rows.place is None and rows.weight is None
    alone = plain and counts_E is None and weight.sub_scale is None
    return alone and tokens <= MOST_TOKENS and (tokens == 1 or tokens * weight.codes.numel() <= MOST_VALUES)


def shape_of(width: int, rows: int) -> Shape:
    """For this many rows of both weights. Larger programs round the activations less often, smaller ones are more that
    read at once; measured for the widths of V4-Flash."""
    columns = max(triton.next_power_of_2(width), 128)
    if columns <= 1024:
        return Shape(16, columns, 8)
    if columns <= 4096:
        return Shape(8, columns, 8) if rows >= FEW_WEIGHT_ROWS else Shape(4, columns, 4)
    return Shape(8, 8192, 16)


def multiply(rows: Operands, weights: Sequence[Weight], results_TO: Sequence[Tensor]) -> None:
    """y = x W^T for each weight, in launches of two."""
    (tokens, width), device = rows.x.shape, rows.x.device
    early, native = starts_early(device), _converts(device)
    for pair in range(0, len(weights), 2):
        (first, *other), (y_TO, *other_y) = weights[pair : pair + 2], results_TO[pair : pair + 2]
        heights = [result.shape[1] for result in (y_TO, *other_y)]
        shape = shape_of(width, sum(heights))
        second, second_y = (other or [first])[0], (other_y or [y_TO])[0]
        quantized_linear_few_kernel[(tokens, sum(triton.cdiv(count, shape.rows) for count in heights))](
            rows.x, rows.up, first.codes, second.codes, first.block_scale, second.block_scale, y_TO, second_y,
            rows.limit, heights[0], sum(heights[1:]), width, shape.rows, shape.columns, TOGETHER, native, early,
            launch_pdl=early, num_warps=shape.warps,
        )  # fmt: skip


def _converts(device: torch.device) -> bool:
    """Whether the GPU converts E4M3 itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
