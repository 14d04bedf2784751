"""Sparse attention in plain PyTorch, tile by tile over the queries; the backward recomputes the scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.decode_attention.reference import decode_attention_reference
from leadline.ops.invariance import is_batch_invariant
from leadline.ops.precision import wide
from leadline.ops.reach import (
    Columns,
    Reach,
    Tile,
    add_rows,
    entry_columns,
    key_columns,
    tiles,
    weighted_columns,
)

ROWS_PER_TILE = 256  # queries x heads of one tile


def tile_size(num_heads: int) -> int:
    """Queries per tile: enough rows for a matrix product, few enough that a tile's window is not mostly masked."""
    return max(8, min(128, ROWS_PER_TILE // num_heads))


def _columns(
    keys_XK: Tensor, entries_CK: Tensor | None, reach: Reach, tile: Tile, picked: Tensor | None
) -> list[Columns]:
    columns = [key_columns(keys_XK, reach, tile)]
    if entries_CK is not None:
        columns.append(entry_columns(entries_CK, reach, tile, picked))
    return [part for part in columns if part.seen.shape[1]]


def _scores(q_bHK: Tensor, part: Columns) -> Tensor:
    scores_bHX = torch.matmul(q_bHK, wide(part.vectors).mT)
    # Adding one mask for all heads is several times faster than a masked fill that is broadcast over them.
    mask_bX = torch.zeros(part.seen.shape, dtype=scores_bHX.dtype, device=scores_bHX.device)
    return scores_bHX.add_(mask_bX.masked_fill_(~part.seen, float("-inf"))[:, None])


def row_lists(reach: Reach, picked_TM: Tensor | None, entries_CK: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The rows of window keys that each query sees, its own last, and those of its entries; -1 = none."""
    first, last = reach.first_key_T[:, None], reach.last_key_T[:, None]
    behind = torch.arange(1 - int((last - first).max()) - 1, 1, device=last.device)
    window_rows = torch.where(last + behind < first, -1, last + behind)
    if entries_CK is None:
        return window_rows, None
    assert reach.first_entry_T is not None
    assert reach.visible_T is not None
    if picked_TM is None:
        number = torch.arange(int(reach.visible_T.max()), device=last.device)
        picked_TM = torch.where(number < reach.visible_T[:, None], number, -1)
    return window_rows, torch.where(picked_TM < 0, -1, reach.first_entry_T[:, None] + picked_TM)


class SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THK: Tensor,
        keys_XK: Tensor,
        entries_CK: Tensor | None,
        sink_H: Tensor,
        reach: Reach,
        picked_TM: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.reach = reach
        if is_batch_invariant():
            window_rows, entry_rows = row_lists(reach, picked_TM if entries_CK is not None else None, entries_CK)
            o_THK, lse_TH = decode_attention_reference(q_THK, keys_XK, window_rows, entries_CK, entry_rows, sink_H)
            ctx.save_for_backward(q_THK, keys_XK, entries_CK, sink_H, picked_TM, o_THK, lse_TH)
            ctx.mark_non_differentiable(lse_TH)
            return o_THK, lse_TH
        _, num_heads, width = q_THK.shape
        o_THK = torch.empty_like(q_THK)
        lse_TH = wide(q_THK.new_empty(q_THK.shape[:2]))
        sink_H = sink_H.to(lse_TH.dtype)
        for tile in tiles(reach.lengths, tile_size(num_heads)):
            parts = _columns(keys_XK, entries_CK, reach, tile, picked_TM)
            q_bHK = wide(q_THK[tile.rows]) * width**-0.5
            scores = [_scores(q_bHK, part) for part in parts]
            largest_bH = torch.stack([s.amax(-1) for s in scores]).amax(0)
            weights = [s.sub_(largest_bH[..., None]).exp_() for s in scores]
            sum_bH = torch.stack([w.sum(-1) for w in weights]).sum(0)
            # The published kernel rounds the probabilities to the dtype of the values before the second product.
            o_bHK = sum(
                torch.matmul(wide(w.to(q_THK.dtype)), wide(part.vectors))
                for w, part in zip(weights, parts, strict=True)
            )
            # A sink far above all scores makes the denominator infinite: the output is rightly 0, but its log must not
            # be taken from there.
            o_THK[tile.rows] = o_bHK / (sum_bH + torch.exp(sink_H - largest_bH))[..., None]
            lse_TH[tile.rows] = torch.logaddexp(largest_bH + sum_bH.log(), sink_H)
        ctx.save_for_backward(q_THK, keys_XK, entries_CK, sink_H, picked_TM, o_THK, lse_TH)
        ctx.mark_non_differentiable(lse_TH)
        return o_THK, lse_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_THK: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
        q_THK, keys_XK, entries_CK, sink_H, picked_TM, o_THK, lse_TH = ctx.saved_tensors
        reach: Reach = ctx.reach
        num_heads, width = q_THK.shape[1:]
        dq_THK = torch.empty_like(q_THK)
        dkeys_XK = torch.zeros_like(wide(keys_XK))
        dentries_CK = None if entries_CK is None else torch.zeros_like(wide(entries_CK))
        inner_TH = (wide(do_THK) * wide(o_THK)).sum(-1)
        dsink_H = -(torch.exp(sink_H - lse_TH) * inner_TH).sum(0)
        for tile in tiles(reach.lengths, tile_size(num_heads)):
            q_bHK, do_bHK = wide(q_THK[tile.rows]) * width**-0.5, wide(do_THK[tile.rows])
            lse_bH1, inner_bH1 = lse_TH[tile.rows, :, None], inner_TH[tile.rows, :, None]
            dq_bHK = torch.zeros_like(q_bHK)
            targets = [dkeys_XK, dentries_CK]
            for part, target in zip(_columns(keys_XK, entries_CK, reach, tile, picked_TM), targets, strict=False):
                vectors = wide(part.vectors)
                probability = _scores(q_bHK, part).sub_(lse_bH1).exp_()
                dscores = torch.matmul(do_bHK, vectors.mT).sub_(inner_bH1).mul_(probability)
                dq_bHK += torch.matmul(dscores, vectors)
                dvectors = weighted_columns(dscores, q_bHK, part.rows)
                dvectors += weighted_columns(probability, do_bHK, part.rows)
                assert target is not None
                add_rows(target, part.rows, dvectors)
            dq_THK[tile.rows] = dq_bHK * width**-0.5
        dentries = None if dentries_CK is None or entries_CK is None else dentries_CK.to(entries_CK.dtype)
        return dq_THK, dkeys_XK.to(keys_XK.dtype), dentries, dsink_H, None, None
