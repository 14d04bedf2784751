"""Gated pooling in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.invariance import rowwise


def _halves(num_slots: int, num_columns: int, width: int) -> list[tuple[slice, slice]]:
    """Which columns each group of slots reads."""
    if num_columns == width:
        return [(slice(0, num_slots), slice(0, width))]
    half = num_slots // 2
    return [(slice(0, half), slice(0, width)), (slice(half, num_slots), slice(width, 2 * width))]


def _gather(source_YE: Tensor, rows_CG: Tensor, width: int, empty: float) -> Tensor:
    parts = [
        source_YE[:, columns][rows_CG[:, slots].clamp_min(0)]
        for slots, columns in _halves(rows_CG.shape[1], source_YE.shape[1], width)
    ]
    # Row 0 stood in for the empty slots. It may belong to another sequence and hold NaN, which a gate of 0 does not
    # stop.
    return torch.cat(parts, dim=1).masked_fill_((rows_CG < 0)[..., None], empty)


def _gates(scores_YE: Tensor, rows_CG: Tensor, width: int) -> Tensor:
    return torch.softmax(_gather(scores_YE, rows_CG, width, float("-inf")), dim=1)


def _scatter(d_CGD: Tensor, rows_CG: Tensor, like_YE: Tensor) -> Tensor:
    d_YE = torch.zeros_like(like_YE)
    for slots, columns in _halves(rows_CG.shape[1], like_YE.shape[1], d_CGD.shape[-1]):
        filled = rows_CG[:, slots] >= 0
        d_YE[:, columns][rows_CG[:, slots][filled]] = d_CGD[:, slots][filled]
    return d_YE


class GatedPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_YE: Tensor, scores_YE: Tensor, rows_CG: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(values_YE, scores_YE, rows_CG)
        ctx.width = width
        return rowwise(
            lambda rows: (_gates(scores_YE, rows, width) * _gather(values_YE, rows, width, 0.0)).sum(1), rows_CG
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_CD: Tensor) -> tuple[Tensor | None, ...]:
        values_YE, scores_YE, rows_CG = ctx.saved_tensors
        gates_CGD = _gates(scores_YE, rows_CG, ctx.width)
        weighted_CGD = gates_CGD * d_CD[:, None]
        values_CGD = _gather(values_YE, rows_CG, ctx.width, 0.0)
        values_CGD *= weighted_CGD  # the gradient of gate x value, before the softmax
        dscores_CGD = values_CGD - gates_CGD * values_CGD.sum(1, keepdim=True)
        return _scatter(weighted_CGD, rows_CG, values_YE), _scatter(dscores_CGD, rows_CG, scores_YE), None, None
