"""The lightning indexer for single queries: scores the paged index keys of a sequence and picks the best entries."""

from __future__ import annotations

from torch import Tensor

from leadline.formats.cache_entry import PackedIndex
from leadline.ops.cache_rows import operands
from leadline.ops.decode_indexer.reference import PAGE_KEYS, decode_pick_entries_reference
from leadline.ops.dispatch import use_kernel

__all__ = ["PAGE_KEYS", "decode_pick_entries"]


def decode_pick_entries(
    q_TJI: Tensor,
    weight_TJ: Tensor,
    keys: Tensor | PackedIndex,
    pages_NP: Tensor,
    sequence_T: Tensor,
    visible_T: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    """The k visible entries of largest score(t, c) = sum_j weight_tj * ReLU(q_tj . key_c) (report 2.3.1, eq. 13-17).

    This is `pick_entries` for queries that share nothing, with keys in pages of 32: key c of sequence n is row
    pages[n, c // 32] * 32 + c % 32.

    q_TJI: [T, J, I], rotated and rounded as the keys are. weight_TJ: FP32, already scaled. keys: rows of I floats in
    the dtype of q, or packed; I is a power of two from 32 on. pages_NP: int32, the table of all sequences; what stands
    behind the pages of one is not read. sequence_T: int32 or int64, the row of each query in the table. visible_T: the
    same, how many entries it sees, at most 32 P; 0 is allowed.

    Returns picked_TM, int32, numbers within the sequence in ascending order, -1 behind them, and rows_TM, int32, the
    rows of the same entries; M = min(k, 32 P), so that shapes do not depend on what is in the tensors. Ties go to the
    lower number. Not differentiable. A score that is not a number may be picked or not, but never leads to a row that
    the sequence does not have.
    """
    if use_kernel("decode_pick_entries", q_TJI):
        from leadline.ops.decode_indexer.kernel import decode_pick_entries_kernel

        return decode_pick_entries_kernel(q_TJI, weight_TJ, *operands(keys), pages_NP, sequence_T, visible_T, k)
    return decode_pick_entries_reference(q_TJI, weight_TJ, keys, pages_NP, sequence_T, visible_T, k)
