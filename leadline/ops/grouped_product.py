"""The product of O maps side by side (report 2.3.3), on a card."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.dispatch import use_kernel


def grouped_product(x_TOX: Tensor, weight_OLX: Tensor) -> Tensor:
    """y_to = W_o x_to: [T, O, L] in the dtype of both. Differentiable; a step's few rows without gradients have a
    kernel, where Triton runs."""
    groups, rows, _ = weight_OLX.shape
    recorded = torch.is_grad_enabled() and (x_TOX.requires_grad or weight_OLX.requires_grad)
    if use_kernel("grouped_product", x_TOX) and not recorded:
        from leadline.ops.exact_linear import kernel

        x_TN, weight_NX = x_TOX.flatten(1), weight_OLX.flatten(0, 1)
        if kernel.takes(x_TN, [weight_NX]) and rows % kernel.ROWS == 0:
            y_TN = kernel.few_rows_of_groups(x_TN.contiguous(), weight_NX.contiguous(), groups)
            return y_TN.unflatten(1, (groups, rows))
    return GroupedProduct.apply(x_TOX, weight_OLX)


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
