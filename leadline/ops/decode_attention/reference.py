"""Attention of single queries in plain PyTorch: the rows of a few queries are gathered, and each query has its own."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.formats.cache_entry import PackedKeys
from leadline.ops.cache_rows.reference import read_rows_reference
from leadline.ops.invariance import COLUMNS, attend_blocks, is_batch_invariant, rowwise
from leadline.ops.precision import wide

VALUES_PER_TILE = 2**24  # gathered at once: 64 MiB of FP32


def _gathered(source: Tensor | PackedKeys, rows_bX: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Vectors [b, X, K] that any of some queries looks at, and which of them each query sees, bool [b, X]."""
    rows_bX = rows_bX[:, (rows_bX >= 0).any(0)]
    vectors_XK = read_rows_reference(source, rows_bX.flatten(), width, dtype)
    return vectors_XK.unflatten(0, rows_bX.shape), rows_bX >= 0


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
    o_THK = torch.empty_like(q_THK)
    lse_TH = wide(q_THK.new_empty(q_THK.shape[:2]))
    sink_H = sink_H.to(lse_TH.dtype)
    lists = [(window, window_rows_TW)]
    if entries is not None and entry_rows_TM is not None:
        lists.append((entries, entry_rows_TM))
    step = max(1, VALUES_PER_TILE // max(1, width * sum(rows.shape[1] for _, rows in lists)))
    for at in range(0, len(q_THK), step):
        tile = slice(at, at + step)
        if is_batch_invariant():
            blocks = [
                block
                for place, (source, rows) in enumerate(lists)
                for block in _blocks(source, rows[tile], width, q_THK.dtype, last_first=place == 0)
            ]
            o_THK[tile], lse_TH[tile] = _in_blocks(wide(q_THK[tile]) * width**-0.5, blocks, sink_H, q_THK.dtype)
            continue
        gathered = [_gathered(source, rows[tile], width, q_THK.dtype) for source, rows in lists]
        keys_bXK = wide(torch.cat([vectors for vectors, _ in gathered], dim=1))
        seen_bX = torch.cat([seen for _, seen in gathered], dim=1)
        scores_bHX = torch.matmul(wide(q_THK[tile]) * width**-0.5, keys_bXK.mT)
        scores_bHX.masked_fill_(~seen_bX[:, None], float("-inf"))
        blind_b = ~seen_bX.any(1)
        largest_bH = torch.cat([scores_bHX, scores_bHX.new_full((*scores_bHX.shape[:2], 1), float("-inf"))], -1).amax(
            -1
        )
        largest_bH[blind_b] = 0.0  # without a row, -inf, which can be subtracted from nothing
        weights_bHX = scores_bHX.sub_(largest_bH[..., None]).exp_()
        sum_bH = weights_bHX.sum(-1)
        # The published kernel rounds the probabilities to the dtype of the values before the second product.
        o_bHK = torch.matmul(wide(weights_bHX.to(q_THK.dtype)), keys_bXK)
        o_THK[tile] = o_bHK / (sum_bH + torch.exp(sink_H - largest_bH))[..., None]
        o_THK[tile][blind_b] = 0.0
        lse_TH[tile] = torch.logaddexp(largest_bH + sum_bH.log(), sink_H)
    return o_THK, lse_TH


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
