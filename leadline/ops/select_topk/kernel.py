"""Top-k in Triton: bisection on a row that stays in registers.

Reading the scores once is the floor in bytes, so a program loads a *part* of a row, 4,096 columns as a rule, and all
that follows happens in registers. The threshold that at least k columns reach is found by halving an interval of the
integers that have the order of the floating-point numbers: one comparison and one sum a step. A step halves the columns
that are undecided too, so that about log2(columns) + 2 steps find a threshold which exactly k columns reach; only ties
at the threshold need all 32, and then the same search over the columns finds up to where they are taken. In the end one
running sum says where each pick is stored, in ascending order.

A longer row is a tournament. Every part keeps its k best, and the lists of the parts, laid one behind the other, are a
shorter row that is still ascending in its columns, so ties go to the lower column in every round. All parts but the
last are full, which leaves no gap between the lists: a round is the same kernel over a list of columns.

A thread holds neighbouring columns, in vectors of four that it loads at once, so that all but the last additions of the
running sum are its own. That is why a part is a tuple of vectors, [threads, 4] each.

What must not count, a column behind the visible ones or a score that is not a number, is NaN: it reaches no threshold.
A wild score cannot lead to an address outside of its row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.ops.opaque import opaque

FEW_PARTS = 512  # fewer leave room on a device for more threads


@triton.jit
def _flip(bits):
    """Between the bits of floating-point numbers and integers of the same order; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _places(v, PART: tl.constexpr, RUN: tl.constexpr):
    """Places in a part of vector v of each thread, [threads, 4]. RUN: columns of a thread."""
    return tl.arange(0, PART // RUN)[:, None] * RUN + v * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def _columns(columns_TX, t, place, X):
    """Columns of row t at some places of its list, -1 where there is none; without a list all columns are in place."""
    if columns_TX is None:
        return place
    else:
        return tl.load(columns_TX + t * X + place, mask=place < X, other=-1)


@triton.jit
def _reached(scores, threshold):
    """How many scores reach a threshold."""
    count = tl.where(scores[0] >= threshold, 1.0, 0.0)
    for v in tl.static_range(1, len(scores)):
        count += tl.where(scores[v] >= threshold, 1.0, 0.0)
    return tl.sum(tl.sum(count, 1), 0).to(tl.int32)


@triton.jit
def _threshold(scores, low, high, K):
    """A number in [low, high] that K scores reach; with ties, the largest that at least K reach.

    At least K scores reach low, and none is above high.
    """
    low, high = _flip(low.to(tl.int32, bitcast=True)), _flip(high.to(tl.int32, bitcast=True))
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up; the sum could overflow
        reached = _reached(scores, _flip(middle).to(tl.float32, bitcast=True))
        low = tl.where(reached >= K, middle, low)
        high = tl.where(reached == K, middle, tl.where(reached > K, high, middle - 1))
    return _flip(low).to(tl.float32, bitcast=True)


@triton.jit
def _picked(scores, v, threshold, last_tie, PART: tl.constexpr, RUN: tl.constexpr):
    """Which columns of vector v are picked, 1 or 0: above the threshold, or equal to it and not behind the last tie."""
    tied = (scores[v] == threshold) & (_places(v, PART, RUN) <= last_tie)
    return ((scores[v] > threshold) | tied).to(tl.int32)


@triton.jit
def _last_tie(scores, threshold, K, PART: tl.constexpr, RUN: tl.constexpr):
    """The first place for which there are K picks, where there are more without it."""
    low, high = 0, PART - 1
    while low < high:
        middle = (low + high) // 2
        count = _picked(scores, 0, threshold, middle, PART, RUN)
        for v in tl.static_range(1, len(scores)):
            count += _picked(scores, v, threshold, middle, PART, RUN)
        enough = tl.sum(tl.sum(count, 1), 0) >= K
        low, high = tl.where(enough, low, middle + 1), tl.where(enough, middle, high)
    return low


@triton.jit
def select_topk_kernel(
    scores_TC, columns_TX, visible_T, picked_TSK, left_T, C, X, K,
    PART: tl.constexpr, RUN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The best K of columns s PART to (s + 1) PART - 1 of row t, of the first visible_T[t]; -1 behind them.

    columns_TX: the columns that are left of each row, None in the first round, which has all. left_T: how many there
    are in the next round; None in the last, in which one part holds the whole list. WIDTH: a power of two, at least K.
    """
    t, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    visible = tl.load(visible_T + t).to(tl.int32)
    here = tl.minimum(tl.maximum(visible - s * PART, 0), PART)
    if left_T is not None and s == 0:
        tl.store(left_T + t, visible // PART * K + tl.minimum(visible % PART, K))
    if left_T is None or here > 0:
        scores = ()
        lowest = tl.full((PART // RUN, 4), float("inf"), tl.float32)
        highest = -lowest
        for v in tl.static_range(RUN // 4):
            place = _places(v, PART, RUN)
            column = _columns(columns_TX, t, s * PART + place, X)
            real = (place < here) & (column >= 0)
            # What stands behind the visible columns is loaded with them, 16 bytes at a time where rows are multiples of
            # that, and then ignored.
            score = tl.load(scores_TC + t * C + column, mask=column < C if columns_TX is None else real, other=0.0)
            # Where no more than K columns are visible all are picked, and their scores may be anything.
            score = tl.where(real, tl.where(here > K, score, 0.0), float("nan"))
            number = score == score
            lowest = tl.where(number & (score < lowest), score, lowest)
            highest = tl.where(number & (score > highest), score, highest)
            scores += (score,)
        threshold = _threshold(scores, tl.min(tl.min(lowest, 1), 0), tl.max(tl.max(highest, 1), 0), K)
        reached = _reached(scores, threshold)
        last_tie = PART
        if reached > K:
            last_tie = _last_tie(scores, threshold, K, PART, RUN)

        picked_TSK += (t * tl.num_programs(1) + s) * K
        count = tl.zeros((PART // RUN,), tl.int32)
        for v in tl.static_range(RUN // 4):
            count += tl.sum(_picked(scores, v, threshold, last_tie, PART, RUN), 1)
        before = tl.cumsum(count, 0) - count
        for v in tl.static_range(RUN // 4):
            picked = _picked(scores, v, threshold, last_tie, PART, RUN)
            column = _columns(columns_TX, t, s * PART + _places(v, PART, RUN), X)
            tl.store(picked_TSK + before[:, None] + tl.cumsum(picked, 1) - 1, column, mask=picked > 0)
            before += tl.sum(picked, 1)
        place = tl.arange(0, WIDTH)
        tl.store(picked_TSK + place, tl.full((WIDTH,), -1, tl.int32), mask=(place >= reached) & (place < K))


class Part(NamedTuple):
    """What a program takes of a row: columns, and how many of them a thread holds side by side."""

    columns: int
    run: int

    @property
    def warps(self) -> int:
        return self.columns // (32 * self.run)

    @property
    def registers(self) -> int:
        """Of a thread. They suffice without spilling, and four programs of four warps fit on a multiprocessor."""
        return min(128, 2**16 // (32 * self.warps))


def part_of(num_rows: int, length: int, k: int) -> Part:
    """Columns, so that a round leaves at most a quarter of a long list. Many rows fill the device: each gets few
    threads, with much to do between two sums over all of them; of few rows each gets many."""
    most = max(4096, 4 * triton.next_power_of_2(k))
    columns = most if length > most else max(128, triton.next_power_of_2(length))
    run = 16 if num_rows * triton.cdiv(length, columns) < FEW_PARTS else 32
    return Part(columns, min(max(run, columns // 1024), columns // 32))  # a program has at most 32 warps


def select_into(scores_TC: Tensor, visible_T: Tensor, picked_TK: Tensor) -> None:
    """Write the picks of each row into picked_TK, whose width is k. scores_TC: contiguous FP32; visible_T: int64."""
    (num_rows, num_columns), k = scores_TC.shape, picked_TK.shape[1]
    columns_TX: Tensor | None = None
    length, parts = num_columns, 0
    while parts != 1:
        part = part_of(num_rows, length, k)
        parts = triton.cdiv(length, part.columns)
        target, left_T = picked_TK, None
        if parts > 1:
            target = torch.empty((num_rows, parts * k), dtype=torch.int32, device=scores_TC.device)
            left_T = torch.empty(num_rows, dtype=torch.int32, device=scores_TC.device)
        select_topk_kernel[(num_rows, parts)](
            scores_TC, columns_TX, visible_T, target, left_T, num_columns, length, k,
            PART=part.columns, RUN=part.run, WIDTH=triton.next_power_of_2(k),
            num_warps=part.warps, maxnreg=part.registers,
        )  # fmt: skip
        columns_TX, length = target, parts * k
        visible_T = visible_T if left_T is None else left_T


def _empty_picks(scores_TC: Tensor, visible_T: Tensor, k: int) -> Tensor:
    return torch.empty((len(scores_TC), k), dtype=torch.int64, device=scores_TC.device)


@opaque(_empty_picks)
def select(scores_TC: Tensor, visible_T: Tensor, k: int) -> Tensor:
    """The operation of `select_topk_reference`, except that NaN is no error: it is never picked."""
    picked_Tk = _empty_picks(scores_TC, visible_T, k)
    if picked_Tk.numel():
        select_into(scores_TC.contiguous(), visible_T.contiguous(), picked_Tk)
    return picked_Tk
