"""Quantised products of few tokens, in Triton, on any GPU: a step of decoding reads its weights and does little else.

Bytes are the floor: every weight is read once and multiplied once for each token. The matrix units do not help; what
counts is that all processors read at once, also from a small matrix. So a program takes a few rows of the weight over
their whole width, there are many programs, and each rounds the activations for itself, which are few and in the cache:
one launch does what otherwise takes two.

A code is turned into a float by moving its bits: E4M3 and E2M1 have the fields of a float32 with shorter exponents, so
shifted into place they are the value times 2^-120 and 2^-126. Half of the missing power is put into the activations
and half into the result, which keeps everything in between far from the ends of FP32. The values of a weight are read
as words, four or eight codes each, and products stay with the thread that read the word until all columns are done;
one reduction at the end adds the threads. The order of the sum therefore differs from that of the other kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.ops.quantized_linear.round_kernel import Weight

MOST_TOKENS = 4  # of a dense product; each token reads the weight, the later ones from the cache
MOST_ROWS = 24  # of a grouped product
_HALF_E4M3 = 2.0**60
_HALF_E2M1 = 2.0**63


@triton.jit
def _rounded(x, SLABS: tl.constexpr, HALF: tl.constexpr):
    """x [W, EACH] rounded to E4M3 in slabs, SLABS along W: the values with their scales, times HALF, and NaN in a slab
    with an infinity or NaN."""
    WORDS: tl.constexpr = x.shape[0]
    # As integers, magnitudes are ordered as they are as floats, and NaN is above all of them.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    largest = tl.max(largest.reshape(SLABS, WORDS // SLABS), 1)
    bits = (tl.maximum(largest.to(tl.float32, bitcast=True), 1e-4) * (1.0 / 448.0)).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    scale = tl.where(largest < 0x7F800000, exponent << 23, 0x7FC00000).to(tl.float32, bitcast=True) * HALF
    value = x * _of_words(inverse, WORDS)[:, None]
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) & 0x7FF00000
    # Below 2^-6 values are multiples of 2^-9, which is the last bit of a sum with 2^14.
    small = ((tl.abs(value) + 16384.0) - 16384.0).to(tl.int32, bitcast=True)
    found = tl.where(magnitude < 0x3C800000, small, normal) | (bits & -0x80000000)
    return found.to(tl.float32, bitcast=True) * _of_words(scale, WORDS)[:, None]


@triton.jit
def _of_words(of_slabs, WORDS: tl.constexpr):
    """[slabs] to [WORDS]."""
    SLABS: tl.constexpr = of_slabs.shape[0]
    return tl.broadcast_to(of_slabs[:, None], (SLABS, WORDS // SLABS)).reshape(WORDS)


@triton.jit
def _split(x):
    """Even and odd places along the last axis of [W, places]."""
    if x.shape[1] == 2:
        return tl.split(x)
    else:
        return tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))


@triton.jit
def _add(sums, words, a, PLACE: tl.constexpr, FP4: tl.constexpr):
    """sums [R, W] + code PLACE of words [R, W] x its column a [W]."""
    if FP4:  # sign to bit 31, from where it fills what lies below, and the rest to the fields of a float32
        value = (words << (28 - 4 * PLACE)) >> 6
        value = value & -0x7E400000  # 0x81C00000
    else:
        value = (words << (24 - 8 * PLACE)) >> 4
        value = value & -0x78100000  # 0x87F00000
    return sums + value.to(tl.float32, bitcast=True) * a[None, :]


@triton.jit
def _power(bits):
    """Float32 of an exponent field, E8M0 included: field 0 is 2^-127."""
    return tl.where(bits == 0, 1 << 22, bits << 23).to(tl.float32, bitcast=True)


@triton.jit
def _block_scales(w_scale, block, slab, SLABS_OF_ROW: tl.constexpr):
    """Scales of the blocks of a row of blocks, float32 whether stored so or as E8M0."""
    scale = tl.load(w_scale + block * SLABS_OF_ROW + slab, mask=slab < SLABS_OF_ROW, other=0)
    if scale.dtype == tl.uint8:
        return _power(scale.to(tl.int32))
    else:
        return scale


@triton.jit
def quantized_linear_few_kernel(
    x, first_w, first_scale, first_sub, first_y, second_w, second_scale, second_sub, second_y, counts,
    O: tl.constexpr, N: tl.constexpr, E: tl.constexpr, EXPERTS: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """y [T, O] = x W^T for token `program 0` and rows ROWS `program 1` .. of the weight, of matrix `program 2` and with
    counts of the token's expert. Words of weights hold the codes of neighbouring columns."""
    w, w_scale, sub_scale, y = first_w, first_scale, first_sub, first_y
    if tl.program_id(2) == 1:
        w, w_scale, sub_scale, y = second_w, second_scale, second_sub, second_y
    FP4: tl.constexpr = first_sub is not None
    EACH: tl.constexpr = 8 if FP4 else 4  # codes of a word
    SLABS: tl.constexpr = COLUMNS // 128
    SLABS_OF_ROW: tl.constexpr = (N + 127) // 128
    token = tl.program_id(0)
    expert = token * 0
    if counts is not None:
        expert_E = tl.arange(0, EXPERTS)
        ends_E = tl.cumsum(tl.load(counts + expert_E, mask=expert_E < E, other=0).to(tl.int32), 0)
        expert = tl.sum(((ends_E <= token) & (expert_E < E)).to(tl.int32), 0)
    o = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = expert.to(tl.int64) * O + o
    block = expert * ((O + 127) // 128) + tl.program_id(1) * ROWS // 128
    word = tl.arange(0, COLUMNS // EACH)
    sums = tl.zeros((ROWS, COLUMNS // EACH), tl.float32)
    for start in range(0, N, COLUMNS):
        here = (o < O)[:, None] & (start + word * EACH < N)[None, :]
        words = tl.load(w + row[:, None] * (N // EACH) + (start // EACH + word)[None, :], mask=here, other=0)
        n = start + (word * EACH)[:, None] + tl.arange(0, EACH)[None, :]
        a = tl.load(x + token * N + n, mask=n < N, other=0.0).to(tl.float32)
        a = _rounded(a, SLABS, HALF)
        if FP4:
            part = tl.zeros((ROWS, COLUMNS // EACH), tl.float32)
            even, odd = _split(a)
            a04, a26 = _split(even)
            a15, a37 = _split(odd)
            a0, a4 = _split(a04)
            a2, a6 = _split(a26)
            a1, a5 = _split(a15)
            a3, a7 = _split(a37)
            part = _add(part, words, a0, 0, True)
            part = _add(part, words, a1, 1, True)
            part = _add(part, words, a2, 2, True)
            part = _add(part, words, a3, 3, True)
            part = _add(part, words, a4, 4, True)
            part = _add(part, words, a5, 5, True)
            part = _add(part, words, a6, 6, True)
            part = _add(part, words, a7, 7, True)
            sub = tl.load(sub_scale + row[:, None] * (N // 32) + (start // 32 + word // 4)[None, :], mask=here, other=0)
            sums += part * _power(sub.to(tl.int32))
        else:
            slab = start // 128 + word // 32
            a *= _block_scales(w_scale, block, slab, SLABS_OF_ROW)[:, None]
            a02, a13 = _split(a)
            a0, a2 = _split(a02)
            a1, a3 = _split(a13)
            sums = _add(sums, words, a0, 0, False)
            sums = _add(sums, words, a1, 1, False)
            sums = _add(sums, words, a2, 2, False)
            sums = _add(sums, words, a3, 3, False)
    result = tl.sum(sums, 1) * HALF
    tl.store(y + token * O + o, result.to(y.dtype.element_ty), mask=o < O)


class Shape(NamedTuple):
    """Of a program: rows of the weight, columns at a time, warps."""

    rows: int
    columns: int
    warps: int


def takes(x_TN: Tensor, weights: Sequence[Weight], counts_E: Tensor | None) -> bool:
    """Whether the product is one of few tokens, with whole words and at most two matrices of one shape."""
    few = len(x_TN) <= (MOST_TOKENS if counts_E is None else MOST_ROWS)
    alike = len(weights) == 1 or (len(weights) == 2 and weights[0].codes.shape == weights[1].codes.shape)
    return few and alike and x_TN.shape[1] % 8 == 0


def shape_of(width: int, fp4: bool) -> Shape:
    """Larger programs round the activations less often, smaller ones are more that read at once."""
    return Shape(8, min(max(triton.next_power_of_2(width), 128), 4096 if fp4 else 2048), 4)


def multiply(
    x_TN: Tensor,
    weights: Sequence[Weight],
    results_TO: Sequence[Tensor],
    counts_E: Tensor | None,
    shape: Shape | None = None,
) -> None:
    """y = x W^T for one or two weights of the same shape."""
    (num_rows, rows), width = results_TO[0].shape, x_TN.shape[1]
    fp4, experts = weights[0].sub_scale is not None, 0 if counts_E is None else len(counts_E)
    shape = shape or shape_of(width, fp4)
    first, second = (
        (weight.codes.view(torch.int32), weight.block_scale, weight.sub_scale, y_TO)
        for weight, y_TO in ((weights[0], results_TO[0]), (weights[-1], results_TO[-1]))
    )
    grid = (num_rows, triton.cdiv(rows, shape.rows), len(weights))
    quantized_linear_few_kernel[grid](
        x_TN, *first, *second, counts_E,
        rows, width, experts, triton.next_power_of_2(max(experts, 1)), shape.rows, shape.columns,
        _HALF_E2M1 if fp4 else _HALF_E4M3, num_warps=shape.warps,
    )  # fmt: skip
