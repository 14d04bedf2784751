"""Attention of single queries in plain PyTorch: the rows of a few queries are gathered, and each query has its own."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.formats.cache_entry import PackedKeys
from leadline.ops.cache_rows.reference import read_rows_reference
from leadline.ops.invariance import COLUMNS, attend_blocks, is_batch_invariant, rowwise
from leadline.ops.precision import wide

VALUES_PER_TILE = 2**24  # gathered at once: 64 MiB of FP32


def _gathered(source: Tensor | PackedKeys, rows_bX: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Vectors [b, X, K] of the rows that some queries look at, zeros for row -1."""
    return read_rows_reference(source, rows_bX.flatten(), width, dtype).unflatten(0, rows_bX.shape)


def _blocks(
    source: Tensor | PackedKeys, rows_bX: Tensor, width: int, dtype: torch.dtype, *, last_first: bool
) -> list[tuple[Tensor, Tensor]]:
    """The same in blocks of `COLUMNS`, counted from the end of the lists or from their beginning; blocks that no query
    looks into are left out."""
    missing = -rows_bX.shape[1] % COLUMNS
    padded = torch.nn.functional.pad(rows_bX, (missing, 0) if last_first else (0, missing), value=-1)
    blocks = []
    for rows_bC in padded.split(COLUMNS, dim=1):
        if bool((rows_bC >= 0).any()):
            vectors_XK = wide(read_rows_reference(source, rows_bC.flatten(), width, dtype))
            blocks.append((vectors_XK.unflatten(0, rows_bC.shape), rows_bC >= 0))
    return blocks


@torch.no_grad()
def decode_attention_reference(
    q_THK: Tensor,
    window: Tensor | PackedKeys,
    window_rows_TW: Tensor,
    entries: Tensor | PackedKeys | None,
    entry_rows_TM: Tensor | None,
    sink_H: Tensor,
) -> tuple[Tensor, Tensor]:
    width = q_THK.shape[2]
    sink_H = sink_H.to(wide(q_THK).dtype)
    lists = [(window, window_rows_TW)]
    if entries is not None and entry_rows_TM is not None:
        lists.append((entries, entry_rows_TM))
    step = max(1, VALUES_PER_TILE // max(1, width * sum(rows.shape[1] for _, rows in lists)))
    attend = _attend_invariant if is_batch_invariant() else _attend
    tiles = [
        attend(q_bHK, [(source, rows_TX[at : at + step]) for source, rows_TX in lists], sink_H)
        for at, q_bHK in zip(range(0, len(q_THK), step), q_THK.split(step), strict=True)
    ]
    if len(tiles) == 1:
        return tiles[0]
    return torch.cat([o_bHK for o_bHK, _ in tiles]), torch.cat([lse_bH for _, lse_bH in tiles])


def _attend(q_bHK: Tensor, lists: list[tuple[Tensor | PackedKeys, Tensor]], sink_H: Tensor) -> tuple[Tensor, Tensor]:
    """o and lse of some queries that look into the rows of one or two sources."""
    width, dtype = q_bHK.shape[2], q_bHK.dtype
    keys_bXK = wide(torch.cat([_gathered(source, rows_bX, width, dtype) for source, rows_bX in lists], dim=1))
    unseen_bX = torch.cat([rows_bX for _, rows_bX in lists], dim=1) < 0
    scores_bHX = torch.bmm(wide(q_bHK) * width**-0.5, keys_bXK.mT)
    scores_bHX = scores_bHX.masked_fill(unseen_bX[:, None], float("-inf"))
    largest_bH = scores_bHX.amax(-1)
    blind_bH = largest_bH == float("-inf")
    largest_bH = largest_bH.masked_fill(blind_bH, 0.0)  # -inf can be subtracted from nothing
    weights_bHX = torch.exp(scores_bHX - largest_bH[..., None])
    sum_bH = weights_bHX.sum(-1)
    # The published kernel rounds the probabilities to the dtype of the values before the second product.
    o_bHK = torch.bmm(wide(weights_bHX.to(dtype)), keys_bXK)
    o_bHK = o_bHK / (sum_bH + torch.exp(sink_H - largest_bH))[..., None]
    o_bHK = o_bHK.masked_fill(blind_bH[..., None], 0.0)
    return o_bHK.to(dtype), torch.logaddexp(largest_bH + sum_bH.log(), sink_H)


def _attend_invariant(
    q_bHK: Tensor, lists: list[tuple[Tensor | PackedKeys, Tensor]], sink_H: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, added up in blocks: the first list, the window's, from its end, so that blocks lie as positions do."""
    width, dtype = q_bHK.shape[2], q_bHK.dtype
    blocks = [
        block
        for place, (source, rows_bX) in enumerate(lists)
        for block in _blocks(source, rows_bX, width, dtype, last_first=place == 0)
    ]
    o_bHK, lse_bH = _in_blocks(wide(q_bHK) * width**-0.5, blocks, sink_H, dtype)
    return o_bHK.to(dtype), lse_bH


def _in_blocks(
    q_bHK: Tensor, blocks: list[tuple[Tensor, Tensor]], sink_H: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """o and lse of some queries; without a block, of queries that see nothing."""
    if not blocks:
        return torch.zeros_like(q_bHK), sink_H.expand(q_bHK.shape[:2])
    o_bHK, sum_bH, largest_bH = attend_blocks(q_bHK, blocks, dtype)
    blind_bH = largest_bH == float("-inf")
    denominator_bH = sum_bH + rowwise(torch.exp, sink_H - largest_bH.masked_fill(blind_bH, 0.0))
    return o_bHK / denominator_bH[..., None], torch.logaddexp(largest_bH + sum_bH.log(), sink_H)
