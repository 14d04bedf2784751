"""The lightning indexer in plain PyTorch: tiles of queries, each scored against its visible entries piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.ops.invariance import COLUMNS, is_batch_invariant
from leadline.ops.ordered_sums import ordered_bmm
from leadline.ops.precision import wide
from leadline.ops.reach import Reach, Tile, entry_columns, tiles
from leadline.ops.select_topk import select_topk

QUERIES_PER_TILE = 64
SCORES_PER_TILE = 8 * 2**20  # queries x entries held at once: 32 MiB of FP32
PRODUCTS_PER_PIECE = 2**19  # queries x heads x entries of one product: 2 MiB, so that it stays in the cache


def index_scores(q_bJI: Tensor, weight_bJ: Tensor, keys: Tensor) -> Tensor:
    """score_bX of a tile, FP32; keys [X, I] shared by its queries, or [b, X, I].

    The products of the J heads exist for a piece of the keys at a time, in one buffer: a fresh one for each piece would
    spend longer on page faults than on arithmetic.
    """
    if is_batch_invariant():
        return _scores_in_blocks(wide(q_bJI), wide(weight_bJ)[:, None], keys)
    num_queries, heads, _ = q_bJI.shape
    num_keys = keys.shape[-2]
    step = min(num_keys, max(64, PRODUCTS_PER_PIECE // (num_queries * heads)))
    q_bJI, weight_b1J = wide(q_bJI).contiguous(), wide(weight_bJ)[:, None]
    scores_bX = q_bJI.new_empty(num_queries, num_keys)
    buffer = q_bJI.new_empty(num_queries * heads * step)
    for at in range(0, num_keys, step):
        piece = wide(keys[..., at : at + step, :])
        products_bJX = buffer[: num_queries * heads * piece.shape[-2]].view(num_queries, heads, -1)
        if piece.ndim == 2:
            torch.mm(q_bJI.flatten(0, 1), piece.T, out=products_bJX.flatten(0, 1))
        else:
            torch.bmm(q_bJI, piece.mT, out=products_bJX)
        scores_bX[:, at : at + step] = torch.bmm(weight_b1J, products_bJX.relu_()).squeeze(1)
    return scores_bX


def _scores_in_blocks(q_bJI: Tensor, weight_b1J: Tensor, keys: Tensor) -> Tensor:
    """The same with products of one shape, whatever the number of queries and keys."""
    num_keys = keys.shape[-2]
    padded = torch.nn.functional.pad(wide(keys), (0, 0, 0, -num_keys % COLUMNS))
    scores = []
    for piece in padded.split(COLUMNS, dim=-2):
        products_bJX = ordered_bmm(q_bJI, piece.expand(len(q_bJI), -1, -1).mT).relu_()
        scores.append(ordered_bmm(weight_b1J, products_bJX).squeeze(1))
    return torch.cat(scores, dim=1)[:, :num_keys]


def _visible_keys(keys_CI: Tensor, reach: Reach, tile: Tile, most: int) -> Tensor:
    """The keys that some query of the tile sees: a slice when they are shared, else one list per query."""
    assert reach.first_entry_T is not None
    if not tile.shared:
        return entry_columns(keys_CI, reach, tile, None).vectors
    first = int(reach.first_entry_T[tile.start])
    return keys_CI[first : first + most]


@torch.no_grad()
def pick_entries_reference(q_TJI: Tensor, weight_TJ: Tensor, keys_CI: Tensor, reach: Reach, k: int) -> Tensor:
    assert reach.visible_T is not None
    assert reach.most_visible is not None
    most = reach.most_visible
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
        keys = _visible_keys(keys_CI, reach, tile, most_here)
        scores_bX = index_scores(q_TJI[tile.rows], weight_TJ[tile.rows], keys)
        picked_TM[tile.rows] = select_topk(scores_bX, visible_b, width)
    return picked_TM
