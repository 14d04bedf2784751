"""The order of the experts, dispatch and combine in plain PyTorch; the last two are each other's backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.precision import wide


def expert_order(experts_TA: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = experts_TA.flatten()
    pair_X = flat.argsort(stable=True)
    row_X = torch.empty_like(pair_X)
    row_X[pair_X] = torch.arange(len(pair_X), device=pair_X.device)
    counts_E = flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))
    return pair_X, row_X.view(experts_TA.shape), counts_E


def _dispatch(x_TD: Tensor, pair_X: Tensor, row_TA: Tensor) -> Tensor:
    return x_TD.index_select(0, pair_X // row_TA.shape[1])


def _combine(y_XD: Tensor, row_TA: Tensor) -> Tensor:
    return wide(y_XD.index_select(0, row_TA.flatten()).unflatten(0, row_TA.shape)).sum(1)


class Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, pair_X: Tensor, row_TA: Tensor) -> Tensor:
        ctx.save_for_backward(row_TA)
        ctx.dtype = x_TD.dtype
        return _dispatch(x_TD, pair_X, row_TA)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_XD: Tensor) -> tuple[Tensor | None, ...]:
        return _combine(dy_XD, ctx.saved_tensors[0]).to(ctx.dtype), None, None


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_XD: Tensor, pair_X: Tensor, row_TA: Tensor, plus_TD: Tensor | None) -> Tensor:
        ctx.save_for_backward(pair_X, row_TA)
        ctx.dtype = y_XD.dtype
        sum_TD = _combine(y_XD, row_TA)
        return sum_TD if plus_TD is None else sum_TD.add_(wide(plus_TD)).to(plus_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        dy_XD = _dispatch(dout_TD, *ctx.saved_tensors).to(ctx.dtype)
        return dy_XD, None, None, dout_TD if ctx.needs_input_grad[3] else None
