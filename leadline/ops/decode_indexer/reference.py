"""The indexer for single queries in plain PyTorch: the keys of a few queries are gathered, to each its own."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.formats.cache_entry import PackedIndex
from leadline.ops.cache_rows.reference import read_rows_reference
from leadline.ops.lightning_indexer.reference import index_scores
from leadline.ops.select_topk import select_topk

PAGE_KEYS = 32
VALUES_PER_TILE = 2**24  # gathered at once: 64 MiB of FP32


def rows_of(numbers_TX: Tensor, pages_TP: Tensor) -> Tensor:
    """Rows of entries by their numbers in the sequence of each query, -1 for -1."""
    number = numbers_TX.clamp_min(0)
    page_TX = pages_TP.gather(1, number // PAGE_KEYS)
    return torch.where(numbers_TX < 0, -1, page_TX * PAGE_KEYS + number % PAGE_KEYS)


def _scores(
    q_bJI: Tensor, weight_bJ: Tensor, keys: Tensor | PackedIndex, pages_bP: Tensor, visible_b: Tensor
) -> Tensor:
    """Score of each key in the pages of each query, [b, 32 P]."""
    width = q_bJI.shape[2]
    number_X = torch.arange(PAGE_KEYS * pages_bP.shape[1], device=q_bJI.device)
    rows_bX = rows_of(torch.where(number_X < visible_b[:, None], number_X, -1), pages_bP)
    keys_XI = read_rows_reference(keys, rows_bX.flatten(), width, q_bJI.dtype)
    return index_scores(q_bJI, weight_bJ, keys_XI.unflatten(0, rows_bX.shape))


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
    pages_TP = pages_NP.long().index_select(0, sequence_T)
    num_keys = PAGE_KEYS * pages_NP.shape[1]
    if num_keys <= k:  # everything visible is picked: nothing to score
        number_M = torch.arange(num_keys, device=q_TJI.device)
        picked_TM = torch.where(number_M < visible_T[:, None], number_M, -1)
    else:
        step = max(1, VALUES_PER_TILE // (num_keys * q_TJI.shape[2]))
        queries = zip(*(x.split(step) for x in (q_TJI, weight_TJ, pages_TP, visible_T)), strict=True)
        picked_TM = torch.cat(
            [
                select_topk(_scores(q_bJI, weight_bJ, keys, pages_bP, visible_b), visible_b, k)
                for q_bJI, weight_bJ, pages_bP, visible_b in queries
            ]
        )
    return picked_TM.int(), rows_of(picked_TM, pages_TP).int()
