"""The indexer's KL loss and recall in plain PyTorch, tile by tile over the queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.precision import wide
from leadline.ops.reach import Columns, Reach, Tile, add_rows, entry_columns, tiles, weighted_columns

PRODUCTS_PER_TILE = 2 * 2**20  # queries x heads x entries


def _tile_size(num_heads: int, most: int) -> int:
    return max(1, min(64, PRODUCTS_PER_TILE // (num_heads * max(most, 1))))


def _target(q_THK: Tensor, lse_TH: Tensor, tile: Tile, columns: Columns) -> Tensor:
    """Attention mass of every column over all heads, divided by its sum: [b, X]."""
    q_bHK = wide(q_THK[tile.rows]) * q_THK.shape[-1] ** -0.5
    mass_bHX = torch.matmul(q_bHK, wide(columns.vectors).mT).sub_(lse_TH[tile.rows, :, None]).exp_()
    mass_bX = mass_bHX.sum(1).masked_fill_(~columns.seen, 0.0)
    return mass_bX / mass_bX.sum(-1, keepdim=True).clamp_min(torch.finfo(mass_bX.dtype).tiny)


def _same_columns(index_keys_CI: Tensor, columns: Columns) -> Tensor:
    return wide(index_keys_CI[columns.rows])


class IndexerLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        index_q_TJI: Tensor,
        index_weight_TJ: Tensor,
        index_keys_CI: Tensor,
        q_THK: Tensor,
        entries_CK: Tensor,
        lse_TH: Tensor,
        reach: Reach,
        picked_TM: Tensor | None,
    ) -> Tensor:
        assert reach.most_visible is not None
        ctx.save_for_backward(index_q_TJI, index_weight_TJ, index_keys_CI, q_THK, entries_CK, lse_TH, picked_TM)
        ctx.reach = reach
        ctx.size = _tile_size(max(q_THK.shape[1], index_q_TJI.shape[1]), reach.most_visible)
        kl_T = wide(index_q_TJI.new_zeros(len(index_q_TJI)))
        for tile in tiles(reach.lengths, ctx.size):
            columns = entry_columns(entries_CK, reach, tile, picked_TM)
            if columns.seen.shape[1] == 0:
                continue
            target_bX = _target(q_THK, lse_TH, tile, columns)
            products_bJX = torch.matmul(wide(index_q_TJI[tile.rows]), _same_columns(index_keys_CI, columns).mT).relu_()
            scores_bX = torch.matmul(wide(index_weight_TJ[tile.rows])[:, None], products_bJX).squeeze(1)
            log_guess_bX = torch.log_softmax(scores_bX.masked_fill_(~columns.seen, float("-inf")), dim=-1)
            # Unseen columns have target 0 and guess log 0; a row that sees nothing is all of them.
            log_guess_bX = log_guess_bX.masked_fill(~columns.seen, 0.0)
            kl_T[tile.rows] = (torch.xlogy(target_bX, target_bX) - target_bX * log_guess_bX).sum(-1)
        return kl_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dkl_T: Tensor) -> tuple[Tensor | None, ...]:
        index_q_TJI, index_weight_TJ, index_keys_CI, q_THK, entries_CK, lse_TH, picked_TM = ctx.saved_tensors
        dq_TJI = torch.zeros_like(index_q_TJI)
        dweight_TJ = torch.zeros_like(index_weight_TJ)
        dkeys_CI = torch.zeros_like(wide(index_keys_CI))
        for tile in tiles(ctx.reach.lengths, ctx.size):
            columns = entry_columns(entries_CK, ctx.reach, tile, picked_TM)
            if columns.seen.shape[1] == 0:
                continue
            keys = _same_columns(index_keys_CI, columns)
            q_bJI, weight_bJ = wide(index_q_TJI[tile.rows]), wide(index_weight_TJ[tile.rows])
            products_bJX = torch.matmul(q_bJI, keys.mT).relu_()
            scores_bX = torch.matmul(weight_bJ[:, None], products_bJX).squeeze(1)
            guess_bX = torch.softmax(scores_bX.masked_fill_(~columns.seen, float("-inf")), dim=-1)
            # A row that sees nothing has an all -inf softmax: NaN, and no gradient.
            dscores_bX = (guess_bX - _target(q_THK, lse_TH, tile, columns)) * dkl_T[tile.rows, None]
            dscores_bX.masked_fill_(~columns.seen, 0.0)
            dweight_TJ[tile.rows] = torch.matmul(products_bJX, dscores_bX[..., None]).squeeze(-1)
            dproducts_bJX = (products_bJX > 0) * (weight_bJ[..., None] * dscores_bX[:, None])
            dq_TJI[tile.rows] = torch.matmul(dproducts_bJX, keys).to(index_q_TJI.dtype)
            add_rows(dkeys_CI, columns.rows, weighted_columns(dproducts_bJX, q_bJI, columns.rows))
        return dq_TJI, dweight_TJ, dkeys_CI.to(index_keys_CI.dtype), None, None, None, None, None


@torch.no_grad()
def recall_reference(
    q_THK: Tensor, entries_CK: Tensor, lse_TH: Tensor, reach: Reach, picked_TM: Tensor, dense: bool, queries: Tensor
) -> Tensor:
    assert reach.first_entry_T is not None
    assert reach.visible_T is not None
    visible = reach.visible_T[queries]
    unsure = visible > (picked_TM[queries] >= 0).sum(1)
    # The one place that waits for the device: how many shares there are depends on the picks.
    rows = torch.stack([queries, reach.first_entry_T[queries], visible])[:, unsure].T.tolist()
    shares = []
    for query, first, visible_here in rows:
        entries = wide(entries_CK[first : first + visible_here])
        scores_HX = wide(q_THK[query]) @ entries.T * q_THK.shape[-1] ** -0.5
        # one spare column takes the marks of the missing picks
        kept = torch.zeros(visible_here + 1, dtype=torch.bool, device=entries.device)
        picked_M = picked_TM[query]
        kept = kept.scatter_(0, torch.where(picked_M < 0, visible_here, picked_M), True)[:-1]
        lse_H = lse_TH[query]
        if not dense:
            lse_H = torch.logaddexp(lse_H, scores_HX.masked_fill(kept, float("-inf")).logsumexp(-1))
        mass_X = torch.exp(scores_HX - lse_H[:, None]).sum(0)
        shares.append(mass_X.masked_fill(~kept, 0.0).sum() / mass_X.sum())
    return torch.stack(shares) if shares else lse_TH.new_zeros(0)
