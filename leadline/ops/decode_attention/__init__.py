"""Attention of single queries, each with a list of rows of its own: decoding, straight from the cache."""

from __future__ import annotations

from torch import Tensor

from leadline.formats.cache_entry import PackedKeys
from leadline.ops.cache_rows import operands
from leadline.ops.decode_attention.reference import decode_attention_reference
from leadline.ops.dispatch import use_kernel
from leadline.ops.rope import unrotate_


def decode_attention(
    q_THK: Tensor,
    window: Tensor | PackedKeys,
    window_rows_TW: Tensor,
    entries: Tensor | PackedKeys | None,
    entry_rows_TM: Tensor | None,
    sink_H: Tensor,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """o_th = sum_j p_j v_j with p_j = exp(s_j) / (sum_k exp(s_k) + exp(sink_h)), s_j = q . k_j / sqrt(K), v_j = k_j.

    The sum runs over the rows that the two lists of query t name (report 2.3.3). This is `sparse_attention` for queries
    that share nothing: the one new token of each sequence, or the few of one whose draft is being verified.

    q_THK: [T, H, K]. window, entries: rows of K floats in the dtype of q, or packed, both of one kind. entries None: no
    entries. window_rows_TW, entry_rows_TM: int32, rows of the two, -1 = none, at any place of a list. sink_H: FP32.
    rotation: cos and sin, FP32 [T, R/2], of the queries' positions; o is turned back by them, as `unrotate_` does.

    Returns o_THK in the dtype of q and lse_TH = log of the denominator, FP32. A query without any row gets o = 0 and
    lse = sink. Not differentiable. The bits of a query's result depend on its own lists, on their lengths W and M and
    on T, never on what the other queries are: more queries have their lists cut into fewer parts.
    """
    assert (entries is None) == (entry_rows_TM is None)
    assert entries is None or isinstance(entries, Tensor) == isinstance(window, Tensor)
    if use_kernel("decode_attention", q_THK):
        from leadline.ops.decode_attention.kernel import decode_attention_kernel

        entry_operands = (None, None) if entries is None else operands(entries)
        angles = (None, None) if rotation is None else rotation
        return decode_attention_kernel(
            q_THK, *operands(window), window_rows_TW, *entry_operands, entry_rows_TM, sink_H, *angles
        )
    o_THK, lse_TH = decode_attention_reference(q_THK, window, window_rows_TW, entries, entry_rows_TM, sink_H)
    return (o_THK if rotation is None else unrotate_(o_THK, *rotation)), lse_TH
