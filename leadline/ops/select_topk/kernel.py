"""Top-k in Triton: bisection on a row that stays in registers.

Reading the scores once is the floor in bytes, so a program loads a *part* of a row, at most 16,384 columns, and all that
follows happens in registers. Floating-point numbers become integers of the same order; the largest integer that at
least k columns reach is found by halving an interval, one comparison and one sum a step. A step halves the columns
that are undecided too, so that about log2(columns) + 2 steps find a threshold which exactly k columns reach; only ties
at the threshold need all 32. Then one running sum over the picked columns says where each of them is stored, in
ascending order; among columns equal to the threshold the first ones are taken. A thread holds a run of neighbouring
columns, in vectors of 16 bytes, so that all but one of the additions of the running sum are its own. That is why a part
has three axes, [threads, vectors, 4].

A longer row is a tournament. Every part keeps its k best, and the lists of the parts, laid one behind the other, are a
shorter row that is still ascending in its columns, so ties go to the lower column in every round. All parts but the
last are full, which leaves no gap between the lists: a round is the same kernel over a list of columns.

Nothing depends on the values: NaN has a place in the order of the integers (above every number, or below if its sign
bit is set), and a wild score cannot lead to an address outside of its row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.ops.opaque import opaque

LARGEST_PART = 16384  # columns that fit into the registers of one program


@triton.jit
def _image(scores):
    """Integers above -2^31 in the order of the scores; 0.0 and -0.0 are equal."""
    bits = scores.to(tl.int32, bitcast=True)
    image = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(scores == 0.0, 0, tl.maximum(image, -(2**31) + 1))


@triton.jit
def _count(flags):
    """How many of [rows, vectors, 4] flags are set."""
    return tl.sum(tl.sum(tl.sum(flags.to(tl.int32), 2), 1), 0)


@triton.jit
def _rank(flags):
    """How many flags are set up to each place, itself included, in the order of the columns."""
    in_vector = tl.cumsum(flags.to(tl.int32), 2)
    vectors = tl.sum(flags.to(tl.int32), 2)
    rows = tl.sum(vectors, 1)
    before = (tl.cumsum(rows, 0) - rows)[:, None] + tl.cumsum(vectors, 1) - vectors
    return in_vector + before[:, :, None]


@triton.jit
def _threshold(image, low, high, K):
    """An integer in [low, high] that K images reach; with ties, the largest that at least K reach.

    At least K images reach low, and none is above high.
    """
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up; the sum could overflow
        reached = _count(image >= middle)
        low = tl.where(reached >= K, middle, low)
        high = tl.where(reached == K, middle, tl.where(reached > K, high, middle - 1))
    return low


@triton.jit
def select_topk_kernel(
    scores_TC, columns_TX, visible_T, picked_TSK, left_T, C, X, K,
    PART: tl.constexpr, RUN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The best K of columns s PART to (s + 1) PART - 1 of row t, of the first visible_T[t]; -1 behind them.

    columns_TX: the columns that are left of each row, None in the first round, which has all. left_T: how many there
    are in the next round; None in the last, in which one part holds the whole list. RUN: neighbouring columns that a
    thread holds, in vectors of four. WIDTH: a power of two, at least K.
    """
    t, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    visible = tl.load(visible_T + t).to(tl.int32)
    here = tl.minimum(tl.maximum(visible - s * PART, 0), PART)
    if left_T is not None and s == 0:
        tl.store(left_T + t, visible // PART * K + tl.minimum(visible % PART, K))
    if left_T is None or here > 0:
        run, vector = tl.arange(0, PART // RUN)[:, None, None], tl.arange(0, RUN // 4)[None, :, None]
        place = run * RUN + vector * 4 + tl.arange(0, 4)[None, None, :]
        real = place < here
        # What stands behind the visible columns is loaded too, 16 bytes at a time when rows are multiples of that, and
        # then ignored.
        column = s * PART + place
        if columns_TX is None:
            scores = tl.load(scores_TC + t * C + column, mask=column < C, other=0.0)
        else:
            column = tl.load(columns_TX + t * X + column, mask=column < X, other=0)
            scores = tl.load(scores_TC + t * C + column, mask=real, other=0.0)
        # Below every score, and all that there is where no column is real.
        lowest = -(2**31)
        image = tl.where(real, _image(scores), lowest)
        threshold = lowest + 1
        # Where no more than K columns are visible all are picked, and their scores may be anything.
        if here > K:
            low = tl.min(tl.min(tl.min(tl.where(real, image, 2**31 - 1), 2), 1), 0)
            threshold = _threshold(image, low, tl.max(tl.max(tl.max(image, 2), 1), 0), K)
            surplus = _count(image >= threshold) - K
            if surplus > 0:
                equal = image == threshold
                image = tl.where(equal & (_rank(equal) > _count(equal) - surplus), lowest, image)
        picked = image >= threshold
        picked_TSK += (t * tl.num_programs(1) + s) * K
        tl.store(picked_TSK + _rank(picked) - 1, column, mask=picked)
        place = tl.arange(0, WIDTH)
        tl.store(picked_TSK + place, tl.full((WIDTH,), -1, column.dtype), mask=(place >= here) & (place < K))


class Part(NamedTuple):
    """What a program takes of a row: columns, and how many of them a thread holds side by side."""

    columns: int
    run: int

    @property
    def warps(self) -> int:
        return self.columns // (32 * self.run)


def part_of(num_rows: int, length: int, k: int) -> Part:
    """Many rows fill the device: each gets few threads, with much to do between two sums over all of them. Few rows
    want few rounds, and many threads."""
    width = triton.next_power_of_2(k)
    few = num_rows * triton.cdiv(length, LARGEST_PART) < 256
    whole = max(LARGEST_PART if few else 4096, 4 * width)
    part = max(min(LARGEST_PART, 16 * width), 4 * width) if few else whole
    columns = part if length > whole else max(128, triton.next_power_of_2(length))
    run = max(16 if few else 32, columns // 2**10)  # a program has at most 32 warps
    return Part(columns, min(run, columns // 32))


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
            PART=part.columns, RUN=part.run, WIDTH=triton.next_power_of_2(k), num_warps=part.warps,
        )  # fmt: skip
        columns_TX, length = target, parts * k
        visible_T = visible_T if left_T is None else left_T


def _empty_picks(scores_TC: Tensor, visible_T: Tensor, k: int) -> Tensor:
    return torch.empty((len(scores_TC), k), dtype=torch.int64, device=scores_TC.device)


@opaque(_empty_picks)
def select(scores_TC: Tensor, visible_T: Tensor, k: int) -> Tensor:
    """The operation of `select_topk_reference`, except that NaN is no error: it ranks above every number."""
    picked_Tk = _empty_picks(scores_TC, visible_T, k)
    if picked_Tk.numel():
        select_into(scores_TC.contiguous(), visible_T.contiguous(), picked_Tk)
    return picked_Tk
