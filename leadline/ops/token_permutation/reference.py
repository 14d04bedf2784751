"""The order of the experts, dispatch and combine in plain PyTorch; the last two are each other's backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.precision import wide


def expert_order(experts_TA: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    flat = experts_TA.flatten()
    counts_E = flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))
    return flat.argsort(stable=True), counts_E


def _dispatch(x_TD: Tensor, order_X: Tensor, choices: int) -> Tensor:
    return x_TD.index_select(0, order_X // choices)


def _combine(y_XD: Tensor, order_X: Tensor, choices: int) -> Tensor:
    place_X = torch.empty_like(order_X)
    place_X[order_X] = torch.arange(len(order_X), device=order_X.device)
    return wide(y_XD.index_select(0, place_X).unflatten(0, (-1, choices))).sum(1)


class Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_X: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(order_X)
        ctx.choices, ctx.dtype = choices, x_TD.dtype
        return _dispatch(x_TD, order_X, choices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_XD: Tensor) -> tuple[Tensor | None, ...]:
        return _combine(dy_XD, ctx.saved_tensors[0], ctx.choices).to(ctx.dtype), None, None


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_XD: Tensor, order_X: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(order_X)
        ctx.choices, ctx.dtype = choices, y_XD.dtype
        return _combine(y_XD, order_X, choices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_TD: Tensor) -> tuple[Tensor | None, ...]:
        return _dispatch(dx_TD, ctx.saved_tensors[0], ctx.choices).to(ctx.dtype), None, None
