"""The product of O maps side by side (report 2.3.3), on a card."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class GroupedProduct(torch.autograd.Function):
    """y_to = W_o x_to with results laid out as the inputs are, [T, O, ...]: the library writes them there, so nothing
    is copied afterwards."""

    @staticmethod
    def forward(ctx: Any, x_TOX: Tensor, weight_OLX: Tensor) -> Tensor:
        ctx.save_for_backward(x_TOX, weight_OLX)
        y_TOL = x_TOX.new_empty(*x_TOX.shape[:2], weight_OLX.shape[1])
        torch.bmm(x_TOX.transpose(0, 1), weight_OLX.mT, out=y_TOL.transpose(0, 1))
        return y_TOL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TOL: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TOX, weight_OLX = ctx.saved_tensors
        dy_OTL, dx_TOX, dweight_OLX = dy_TOL.transpose(0, 1), None, None
        if ctx.needs_input_grad[0]:
            dx_TOX = torch.empty_like(x_TOX, memory_format=torch.contiguous_format)
            torch.bmm(dy_OTL, weight_OLX, out=dx_TOX.transpose(0, 1))
        if ctx.needs_input_grad[1]:
            dweight_OLX = torch.bmm(dy_OTL.mT, x_TOX.transpose(0, 1))
        return dx_TOX, dweight_OLX
