"""Sparse attention: one softmax over window keys, compressed entries and a sink."""

from __future__ import annotations

from torch import Tensor

from leadline.ops.dispatch import use_kernel
from leadline.ops.reach import Reach
from leadline.ops.rope import unrotated
from leadline.ops.sparse_attention.reference import SparseAttention


def sparse_attention(
    q_THK: Tensor,
    keys_XK: Tensor,
    entries_CK: Tensor | None,
    sink_H: Tensor,
    reach: Reach,
    picked_TM: Tensor | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """o_th = sum_j p_j v_j with p_j = exp(s_j) / (sum_k exp(s_k) + exp(sink_h)), s_j = q . k_j / sqrt(K), v_j = k_j.

    The sum runs over the window keys of the query and over its entries, together (report 2.3.3).

    q_THK: [T, H, K]. keys_XK: [X, K], the window keys; one shared head is key and value. entries_CK: [C, K] or None.
    sink_H: FP32, enters the denominator alone. reach: which rows each query sees.
    picked_TM: int64, the entries each query sees, as numbers within its sequence, -1 = no pick; None = all visible.
    rotation: cos and sin, FP32 [T, R/2], by which the last R values of each o are turned back (`ops.rope`), as they
    must be where keys that are rotated are values too. It costs less here than afterwards.

    Returns o_THK in the dtype of q and lse_TH = log of the denominator, FP32, not differentiable. Differentiable in q,
    keys, entries and sink. Linear in memory: scores exist for one tile of queries, and again in the backward.
    """
    if use_kernel("sparse_attention", q_THK):
        from leadline.ops.sparse_attention.kernel import SparseAttentionKernel

        runs = reach.first_key_T, reach.last_key_T, reach.first_entry_T, reach.visible_T
        rest = len(reach.lengths), picked_TM, *(rotation or (None, None))
        return SparseAttentionKernel.apply(q_THK, keys_XK, entries_CK, sink_H, *runs, *rest)
    o_THK, lse_TH = SparseAttention.apply(q_THK, keys_XK, entries_CK, sink_H, reach, picked_TM)
    return o_THK if rotation is None else unrotated(o_THK, *rotation), lse_TH
