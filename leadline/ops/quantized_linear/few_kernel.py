"""Products of few tokens with eight-bit weights, in Triton, on any GPU: a step of decoding reads its weights and does
little else.

Bytes are the floor: every weight is read once and multiplied once. The matrix units do not help; what counts is that
all processors read at once, also from a small matrix. So a program takes a few rows of the weight over their whole
width, there are many programs, and each rounds the activations for itself, which are few and in the cache: one launch
does what otherwise takes two.

A code is turned into a float by moving its bits: E4M3 has the fields of a float32 with a shorter exponent, so shifted
into place it is the value times 2^-120. Half of the missing power is put into the activations and half into the result,
which keeps everything in between far from the ends of FP32. The values of a weight are read as words of four codes, and
products stay with the thread that read the word until all columns are done; one reduction at the end adds the threads.
The order of the sum therefore differs from that of the other kernels.

Four-bit weights are left to the other kernels: taking their codes apart costs more than reading them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.ops.cache_rows.format_kernel import (
    e8m0_inverse,
    e8m0_to_float,
    largest_magnitude,
    round_to_e4m3,
    scale_codes,
)
from leadline.ops.early_start import begin, starts_early
from leadline.ops.quantized_linear.round_kernel import Weight

MOST_TOKENS = 4
# Each token reads the weight, the later ones from the cache, so that small weights alone are worth it for several.
MOST_VALUES = 17 * 2**20
_HALF = 2.0**60  # of the power that a shifted code lacks
_WORD = 4  # codes


@triton.jit
def _rounded(x, SLABS: tl.constexpr, HALF: tl.constexpr):
    """x [W, 4] rounded to E4M3 in slabs, SLABS along W: the values with their scales, times HALF, and NaN in a slab
    with an infinity or NaN."""
    WORDS: tl.constexpr = x.shape[0]
    # The larger of two magnitudes' bits is that of the larger magnitude, in a word and in a slab.
    largest = tl.max(largest_magnitude(x).reshape(SLABS, WORDS // SLABS), 1)
    code = scale_codes(largest, 448.0, 1e-4)
    rounded = round_to_e4m3(x * _of_words(e8m0_inverse(code), WORDS)[:, None])
    return rounded * _of_words(e8m0_to_float(code) * HALF, WORDS)[:, None]


@triton.jit
def _of_words(of_slabs, WORDS: tl.constexpr):
    """[slabs] to [WORDS]."""
    SLABS: tl.constexpr = of_slabs.shape[0]
    return tl.broadcast_to(of_slabs[:, None], (SLABS, WORDS // SLABS)).reshape(WORDS)


@triton.jit
def _add(sums, words, a, PLACE: tl.constexpr):
    """sums [R, W] + code PLACE of words [R, W] x its column a [W]."""
    # The sign to bit 31, from where it fills what lies below, and the rest to the fields of a float32.
    value = (words << (24 - 8 * PLACE)) >> 4
    value = value & -0x78100000  # 0x87F00000
    return sums + value.to(tl.float32, bitcast=True) * a[None, :]


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
    x, w, w_scale, y, O: tl.constexpr, N: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y [T, O] = x W^T for token `program 0` and rows ROWS `program 1` .. of the weight, whose words hold the codes of
    four neighbouring columns."""
    SLABS_OF_ROW: tl.constexpr = (N + 127) // 128
    token = tl.program_id(0)
    o = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1) * ROWS // 128
    word = tl.arange(0, COLUMNS // 4)
    sums = tl.zeros((ROWS, COLUMNS // 4), tl.float32)
    w += o.to(tl.int64)[:, None] * (N // 4) + word[None, :]
    first = tl.load(w, mask=(o < O)[:, None] & (word * 4 < N)[None, :], other=0)
    begin(EARLY)  # the weight is on its way while the kernel before it still writes the activations
    for start in tl.static_range(0, N, COLUMNS):
        words = first
        if start > 0:
            words = tl.load(w + start // 4, mask=(o < O)[:, None] & (start + word * 4 < N)[None, :], other=0)
        n = start + (word * 4)[:, None] + tl.arange(0, 4)[None, :]
        a = tl.load(x + token * N + n, mask=n < N, other=0.0).to(tl.float32)
        a = _rounded(a, COLUMNS // 128, HALF)
        slab = start // 128 + word // 32
        scale = tl.load(w_scale + block * SLABS_OF_ROW + slab, mask=slab < SLABS_OF_ROW, other=0)
        a *= scale_value(scale)[:, None]
        even, odd = tl.split(a.reshape(COLUMNS // 4, 2, 2))
        a0, a2 = tl.split(even)
        a1, a3 = tl.split(odd)
        sums = _add(sums, words, a0, 0)
        sums = _add(sums, words, a1, 1)
        sums = _add(sums, words, a2, 2)
        sums = _add(sums, words, a3, 3)
    result = tl.sum(sums, 1) * HALF
    tl.store(y + token * O + o, result.to(y.dtype.element_ty), mask=o < O)


class Shape(NamedTuple):
    """Of a program: rows of the weight, columns at a time, warps."""

    rows: int
    columns: int
    warps: int


def takes(x_TN: Tensor, weight: Weight, counts_E: Tensor | None) -> bool:
    """Whether this is a product of few tokens with one eight-bit matrix of whole words."""
    alone = counts_E is None and weight.sub_scale is None and x_TN.shape[1] % _WORD == 0
    tokens = len(x_TN)
    return alone and tokens <= MOST_TOKENS and (tokens == 1 or tokens * weight.codes.numel() <= MOST_VALUES)


def shape_of(width: int) -> Shape:
    """Larger programs round the activations less often, smaller ones are more that read at once; measured for the
    widths of V4-Flash."""
    if 2048 < width <= 4096:
        return Shape(4, 4096, 8)
    return Shape(8, min(max(triton.next_power_of_2(width), 128), 2048), 4)


def multiply(x_TN: Tensor, weight: Weight, y_TO: Tensor) -> None:
    """y = x W^T."""
    (tokens, rows), shape, early = y_TO.shape, shape_of(x_TN.shape[1]), starts_early(y_TO.device)
    quantized_linear_few_kernel[(tokens, triton.cdiv(rows, shape.rows))](
        x_TN, weight.codes.view(torch.int32), weight.block_scale, y_TO, rows, x_TN.shape[1],
        shape.rows, shape.columns, _HALF, EARLY=early, launch_pdl=early, num_warps=shape.warps,
    )  # fmt: skip
