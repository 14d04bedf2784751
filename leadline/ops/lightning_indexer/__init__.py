"""The lightning indexer: which entries each query attends to."""

from __future__ import annotations

from torch import Tensor

from leadline.ops.dispatch import use_kernel
from leadline.ops.lightning_indexer.reference import pick_entries_reference
from leadline.ops.reach import Reach


def pick_entries(q_TJI: Tensor, weight_TJ: Tensor, keys_CI: Tensor, reach: Reach, k: int) -> Tensor:
    """The k visible entries of largest score(t, c) = sum_j weight_tj * ReLU(q_tj . key_c) (report 2.3.1, eq. 13-17).

    q_TJI: [T, J, I]. weight_TJ: FP32 [T, J], already scaled. keys_CI: [C, I], one shared head. reach: first entry and
    number of visible entries of each query. k: picks per query.

    Returns picked_TM int64 [T, M], numbers within the sequence, ascending, -1 = no pick, with M = min(k,
    reach.most_visible). Ties go to the lower number. Not differentiable: `indexer_loss` trains the scores. The
    workspace is bounded, on a GPU by 512 MiB; no [T, C] matrix exists. Raises NonFiniteScoresError on a score that is
    not a number; on a GPU, where that would mean to wait for the scores, such an entry is never picked instead, unless
    all that are visible are.
    """
    if use_kernel("lightning_indexer", q_TJI):
        from leadline.ops.lightning_indexer import kernel

        assert reach.first_entry_T is not None
        assert reach.visible_T is not None
        assert reach.most_visible is not None
        seen = reach.first_entry_T, reach.visible_T, reach.most_visible, len(reach.lengths)
        return kernel.pick(q_TJI.detach(), weight_TJ.detach(), keys_CI.detach(), *seen, k)
    return pick_entries_reference(q_TJI, weight_TJ, keys_CI, reach, k)
