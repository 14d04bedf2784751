"""Top-k in Triton: bisection on a row that stays in registers.

Reading the scores once is the floor in bytes, so a program loads a *part* of a row, at most 16,384 columns, and all that
follows happens in registers. Floating-point numbers become integers of the same order; the largest integer that at
least k columns reach is found by halving an interval, one comparison and one sum a step. A step halves the columns
that are undecided too, so that about log2(columns) + 2 steps find a threshold which exactly k columns reach; only ties
at the threshold need all 32. Then one running sum over the picked columns says where each of them is stored, in
ascending order, and among columns equal to the threshold the first ones are taken.

A longer row is a tournament. Every part keeps its k best, and the lists of the parts, laid one behind the other, are a
shorter row that is still ascending in its columns, so ties go to the lower column in every round. All parts but the
last are full, which leaves no gap between the lists: a round is the same kernel over a list of columns.

Nothing depends on the values: NaN has a place in the order of the integers (above every number, or below if its sign
bit is set), and a wild score cannot lead to an address outside of its row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.ops.opaque import opaque

LARGEST_PART = 16384  # columns that fit into the registers of one program
COLUMNS_PER_WARP = 1024


@triton.jit
def _image(scores):
    """Integers in the order of the scores; 0.0 and -0.0 are equal."""
    bits = scores.to(tl.int32, bitcast=True)
    return tl.where(scores == 0.0, 0, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def _threshold(image, low, high, K):
    """An integer in [low, high] that K images reach and none of them more; with ties, the largest that more do.

    At least K images reach low, and none is above high.
    """
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up; the sum could overflow
        reached = tl.sum((image >= middle).to(tl.int32))
        low = tl.where(reached >= K, middle, low)
        high = tl.where(reached == K, middle, tl.where(reached > K, high, middle - 1))
    return low


@triton.jit(do_not_specialize=["X", "K"])
def select_topk_kernel(
    scores_TC, columns_TX, visible_T, picked_TSK, left_T, C, X, K,
    PART: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The best K of columns s PART to (s + 1) PART - 1 of row t, of the first visible_T[t]; -1 behind them.

    columns_TX: the columns that are left of each row, None in the first round, which has all. left_T: how many there
    are in the next round; None in the last, in which one part holds the whole list. WIDTH: a power of two above K.
    """
    t, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    visible = tl.load(visible_T + t).to(tl.int32)
    here = tl.minimum(tl.maximum(visible - s * PART, 0), PART)
    if left_T is not None and s == 0:
        tl.store(left_T + t, visible // PART * K + tl.minimum(visible % PART, K))
    if left_T is None or here > 0:
        place = tl.arange(0, PART)
        real = place < here
        column = s * PART + place
        # What stands behind the visible columns is loaded too: 16 bytes at a time when C is a multiple of 16.
        loaded = column < C
        if columns_TX is not None:
            column = tl.load(columns_TX + t * X + column, mask=real, other=0)
            loaded = real
        scores = tl.load(scores_TC + t * C + column, mask=loaded, other=0.0)
        lowest = -(2**31)
        image = tl.where(real, _image(scores), lowest)
        # Where no more than K columns are visible all are picked, and their scores may be anything.
        threshold = tl.full((), lowest, tl.int32)
        if here > K:
            low = tl.min(tl.where(real, image, 2**31 - 1))
            threshold = _threshold(image, low, tl.max(image), K)
        above, equal = image > threshold, real & (image == threshold)
        wanted = K - tl.sum(above.to(tl.int32))
        picked = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= wanted))
        picked_TSK += (t * tl.num_programs(1) + s) * K
        rank = tl.cumsum(picked.to(tl.int32), 0) - 1
        tl.store(picked_TSK + rank, column, mask=picked)
        place = tl.arange(0, WIDTH)
        tl.store(picked_TSK + place, tl.full((WIDTH,), -1, column.dtype), mask=(place >= here) & (place < K))


def part_size(num_rows: int, length: int, k: int) -> int:
    """Columns of a part. Many rows fill the device: each gets few warps. Few rows want few rounds."""
    width = triton.next_power_of_2(k)
    if num_rows * triton.cdiv(length, LARGEST_PART) < 256:
        whole, part = max(LARGEST_PART, 4 * width), max(min(LARGEST_PART, 16 * width), 4 * width)
    else:
        whole = part = max(4096, 4 * width)
    return part if length > whole else max(16, triton.next_power_of_2(length))


def select_into(scores_TC: Tensor, visible_T: Tensor, picked_TK: Tensor) -> None:
    """Write the picks of each row into picked_TK, whose width is k. scores_TC: contiguous FP32; visible_T: int64."""
    (num_rows, num_columns), k = scores_TC.shape, picked_TK.shape[1]
    columns_TX: Tensor | None = None
    left_T: Tensor | None = None
    length, parts = num_columns, 0
    while parts != 1:
        part = part_size(num_rows, length, k)
        parts = triton.cdiv(length, part)
        if parts == 1:
            target, left_T = picked_TK, None
        else:
            target = torch.empty((num_rows, parts * k), dtype=torch.int32, device=scores_TC.device)
            left_T = torch.empty(num_rows, dtype=torch.int32, device=scores_TC.device)
        select_topk_kernel[(num_rows, parts)](
            scores_TC, columns_TX, visible_T, target, left_T, num_columns, length, k,
            PART=part, WIDTH=triton.next_power_of_2(k), num_warps=min(16, max(1, part // COLUMNS_PER_WARP)),
        )  # fmt: skip
        columns_TX, length = target, parts * k
        if left_T is not None:
            visible_T = left_T


def _empty_picks(scores_TC: Tensor, visible_T: Tensor, k: int) -> Tensor:
    return torch.empty((len(scores_TC), k), dtype=torch.int64, device=scores_TC.device)


@opaque(_empty_picks)
def select(scores_TC: Tensor, visible_T: Tensor, k: int) -> Tensor:
    """The operation of `select_topk_reference`, except that NaN is no error: it ranks above every number."""
    picked_Tk = _empty_picks(scores_TC, visible_T, k)
    if picked_Tk.numel():
        select_into(scores_TC.contiguous(), visible_T.contiguous(), picked_Tk)
    return picked_Tk
