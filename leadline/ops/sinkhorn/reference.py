"""Sinkhorn in plain PyTorch.

The matrices are held tokens-last, [S, S, T]: sums over S = 4 rows or columns are then additions of long vectors, where
a reduction over an innermost axis of length 4 would be an order of magnitude slower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS, _COLUMNS = 1, 0  # the axis of [S, S, T] that is summed to get row sums or column sums


def _axes(rounds: int) -> list[int]:
    """The order of normalisations: columns, then (rows, columns) for every further round."""
    return [_COLUMNS, *([_ROWS, _COLUMNS] * (rounds - 1))]


class Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TSS: Tensor, rounds: int, eps: float) -> Tensor:
        ctx.save_for_backward(logits_TSS)
        ctx.rounds, ctx.eps = rounds, eps
        comb_SST = torch.softmax(logits_TSS.permute(1, 2, 0).contiguous(), dim=_ROWS).add_(eps)
        for axis in _axes(rounds):
            comb_SST /= comb_SST.sum(axis, keepdim=True).add_(eps)
        return comb_SST.permute(2, 0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dcomb_TSS: Tensor) -> tuple[Tensor | None, ...]:
        (logits_TSS,) = ctx.saved_tensors
        probabilities_SST = torch.softmax(logits_TSS.permute(1, 2, 0).contiguous(), dim=_ROWS)
        comb_SST = probabilities_SST + ctx.eps
        sums, results = [], []
        for axis in _axes(ctx.rounds):
            total = comb_SST.sum(axis, keepdim=True).add_(ctx.eps)
            comb_SST = comb_SST / total
            sums.append(total)
            results.append(comb_SST)
        d_SST = dcomb_TSS.permute(1, 2, 0).contiguous()
        for axis in reversed(_axes(ctx.rounds)):
            # y = x / s with s = sum(x) + eps: dx = (dy - sum(dy * y)) / s
            d_SST = (d_SST - (d_SST * results.pop()).sum(axis, keepdim=True)) / sums.pop()
        inner = (d_SST * probabilities_SST).sum(_ROWS, keepdim=True)
        dlogits_SST = probabilities_SST * (d_SST - inner)
        return dlogits_SST.permute(2, 0, 1).contiguous(), None, None
