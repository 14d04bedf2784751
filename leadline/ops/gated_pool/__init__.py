"""Gated pooling: the tokens of a window become one entry."""

from __future__ import annotations

from torch import Tensor

from leadline.ops.dispatch import use_kernel
from leadline.ops.gated_pool.reference import GatedPool


def gated_pool(values_YE: Tensor, scores_YE: Tensor, rows_CG: Tensor, width: int) -> Tensor:
    """e_c = sum over the slots g of softmax_g(score) * value, for each of `width` channels (report 2.3.1, 2.3.2).

    values_YE, scores_YE: FP32 [Y, E], one row per token; the scores already hold the position bias.
    rows_CG: int64 [C, G], the row of each slot of each entry, -1 = empty slot (value 0, score -inf); every entry has at
    least one filled slot.
    width: D. When E = D (ratio 128) every slot reads the whole row. When E = 2 D (ratio 4, overlapping windows) the
    first G/2 slots are the previous window and read the first half of the row, the last G/2 slots are the current
    window and read the second half.

    Returns FP32 [C, D]. Differentiable in values and scores, linear in memory: the backward recomputes the softmax.
    A (row, half) may appear in at most one entry, which is so for windows; this makes the backward free of additions.
    """
    if use_kernel("gated_pool", values_YE):
        from leadline.ops.gated_pool import kernel

        return kernel.GatedPool.apply(values_YE, scores_YE, rows_CG, width)
    return GatedPool.apply(values_YE, scores_YE, rows_CG, width)
