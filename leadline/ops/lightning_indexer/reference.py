"""The lightning indexer in plain PyTorch: tiles of queries, each scored against its visible entries piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.ops.precision import wide
from leadline.ops.reach import Columns, Reach, entry_columns, tiles
from leadline.ops.select_topk import select_topk

QUERIES_PER_TILE = 64
SCORES_PER_TILE = 8 * 2**20  # queries x entries held at once: 32 MiB of FP32
PRODUCTS_PER_PIECE = 2**20  # queries x heads x entries of one product: 4 MiB, so that it stays in the cache


def index_scores(q_bJI: Tensor, weight_bJ: Tensor, columns: Columns) -> Tensor:
    """score_bX of a tile, FP32; the products of the J heads exist for a piece of the columns at a time."""
    num_columns = columns.seen.shape[1]
    step = max(64, PRODUCTS_PER_PIECE // (q_bJI.shape[0] * q_bJI.shape[1]))
    q_bJI, weight_b1J = wide(q_bJI), wide(weight_bJ)[:, None]
    scores_bX = q_bJI.new_empty(len(q_bJI), num_columns)
    for at in range(0, num_columns, step):
        piece = wide(columns.vectors[..., at : at + step, :])
        products_bJX = torch.matmul(q_bJI, piece.mT).relu_()
        scores_bX[:, at : at + step] = torch.matmul(weight_b1J, products_bJX).squeeze(1)
    return scores_bX


@torch.no_grad()
def pick_entries_reference(q_TJI: Tensor, weight_TJ: Tensor, keys_CI: Tensor, reach: Reach, k: int) -> Tensor:
    assert reach.visible_T is not None
    most = int(reach.visible_T.max())
    picked_TM = torch.full((len(q_TJI), min(k, most)), -1, dtype=torch.int64, device=q_TJI.device)
    width = picked_TM.shape[1]
    if width == 0:
        return picked_TM
    size = max(1, min(QUERIES_PER_TILE, SCORES_PER_TILE // most))
    for tile in tiles(reach.lengths, size):
        visible_b = reach.visible_T[tile.rows]
        most_here = int(visible_b.max())
        if most_here <= width:  # everything visible is picked: nothing to score
            number = torch.arange(width, device=visible_b.device)
            picked_TM[tile.rows] = torch.where(number < visible_b[:, None], number, -1)
            continue
        columns = entry_columns(keys_CI, reach, tile, None)
        scores_bX = index_scores(q_TJI[tile.rows], weight_TJ[tile.rows], columns)
        picked_TM[tile.rows] = select_topk(scores_bX, visible_b, width)
    return picked_TM
