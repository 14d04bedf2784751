"""The indexer for single queries in plain PyTorch: one query after the other, all its keys at once."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.formats.cache_entry import PackedIndex
from leadline.ops.cache_rows.reference import read_rows_reference
from leadline.ops.lightning_indexer.reference import index_scores
from leadline.ops.select_topk import select_topk

PAGE_KEYS = 32


def rows_of(numbers: Tensor, pages_P: Tensor) -> Tensor:
    """Rows of the entries of a sequence by their numbers, -1 for -1."""
    page = pages_P[numbers.clamp_min(0) // PAGE_KEYS].to(numbers.dtype)
    return torch.where(numbers < 0, -1, page * PAGE_KEYS + numbers % PAGE_KEYS)


def _keys(keys: Tensor | PackedIndex, pages_P: Tensor, visible: int, width: int, dtype: torch.dtype) -> Tensor:
    """The visible keys of a sequence [visible, I]; in place where they are floats that lie one behind the other."""
    pages_p = pages_P[: -(-visible // PAGE_KEYS)]
    if isinstance(keys, Tensor) and bool((pages_p.diff() == 1).all()):
        first = int(pages_p[0]) * PAGE_KEYS
        return keys[first : first + visible]
    rows = rows_of(torch.arange(visible, device=pages_P.device), pages_P)
    return read_rows_reference(keys, rows, width, dtype)


@torch.no_grad()
def decode_pick_entries_reference(
    q_TJI: Tensor,
    weight_TJ: Tensor,
    keys: Tensor | PackedIndex,
    pages_NP: Tensor,
    sequence_T: Tensor,
    visible_T: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    num_queries, _, width = q_TJI.shape
    picked_TM = torch.full(
        (num_queries, min(k, PAGE_KEYS * pages_NP.shape[1])), -1, dtype=torch.int32, device=q_TJI.device
    )
    rows_TM = picked_TM.clone()
    most = picked_TM.shape[1]
    for t in range(num_queries):
        pages_P, visible = pages_NP[int(sequence_T[t])], int(visible_T[t])
        if visible <= most:  # everything visible is picked: nothing to score
            picked_TM[t, :visible] = torch.arange(visible, device=q_TJI.device)
        else:
            here = slice(t, t + 1)
            scores_1C = index_scores(q_TJI[here], weight_TJ[here], _keys(keys, pages_P, visible, width, q_TJI.dtype))
            picked_TM[t] = select_topk(scores_1C, visible_T[here], most)[0]
        rows_TM[t] = rows_of(picked_TM[t], pages_P)
    return picked_TM, rows_TM
