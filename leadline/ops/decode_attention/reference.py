"""Attention of single queries in plain PyTorch: the rows of a few queries are gathered, and each query has its own."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.formats.cache_entry import PackedKeys
from leadline.ops.cache_rows.reference import read_rows_reference
from leadline.ops.precision import wide

VALUES_PER_TILE = 2**24  # gathered at once: 64 MiB of FP32


def _gathered(source: Tensor | PackedKeys, rows_bX: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Vectors [b, X, K] that any of some queries looks at, and which of them each query sees, bool [b, X]."""
    rows_bX = rows_bX[:, (rows_bX >= 0).any(0)]
    vectors_XK = read_rows_reference(source, rows_bX.flatten(), width, dtype)
    return vectors_XK.unflatten(0, rows_bX.shape), rows_bX >= 0


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
        gathered = [_gathered(source, rows[tile], width, q_THK.dtype) for source, rows in lists]
        keys_bXK = wide(torch.cat([vectors for vectors, _ in gathered], dim=1))
        seen_bX = torch.cat([seen for _, seen in gathered], dim=1)
        scores_bHX = torch.matmul(wide(q_THK[tile]) * width**-0.5, keys_bXK.mT)
        scores_bHX.masked_fill_(~seen_bX[:, None], float("-inf"))
        blind_b = ~seen_bX.any(1)
        largest_bH = torch.cat([scores_bHX, scores_bHX.new_full((*scores_bHX.shape[:2], 1), float("-inf"))], -1).amax(-1)
        largest_bH[blind_b] = 0.0  # without a row, -inf, which can be subtracted from nothing
        weights_bHX = scores_bHX.sub_(largest_bH[..., None]).exp_()
        sum_bH = weights_bHX.sum(-1)
        # The published kernel rounds the probabilities to the dtype of the values before the second product.
        o_bHK = torch.matmul(wide(weights_bHX.to(q_THK.dtype)), keys_bXK)
        o_THK[tile] = o_bHK / (sum_bH + torch.exp(sink_H - largest_bH))[..., None]
        o_THK[tile][blind_b] = 0.0
        lse_TH[tile] = torch.logaddexp(largest_bH + sum_bH.log(), sink_H)
    return o_THK, lse_TH
