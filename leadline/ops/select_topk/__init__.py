"""The k largest scores of each row, with ties decided."""

from __future__ import annotations

from torch import Tensor

from leadline.ops.dispatch import use_kernel
from leadline.ops.select_topk.reference import NonFiniteScoresError, select_topk_reference

__all__ = ["NonFiniteScoresError", "select_topk"]


def select_topk(scores_TC: Tensor, visible_T: Tensor, k: int) -> Tensor:
    """Columns of the k largest of the first visible_t scores of each row; ties go to the lower column.

    scores_TC: FP32 [T, C]. visible_T: int64 [T], at most C. Returns int64 [T, k], columns in ascending order, -1 behind
    them when fewer than k are visible. The order is fixed so that sums over the picks do not depend on the scores.
    Raises NonFiniteScoresError on a score that is not a number; on a GPU, where that would mean to wait for the scores,
    such a score is never picked instead.
    """
    if use_kernel("select_topk", scores_TC):
        from leadline.ops.select_topk import kernel

        return kernel.select(scores_TC, visible_T, k)
    return select_topk_reference(scores_TC, visible_T, k)
