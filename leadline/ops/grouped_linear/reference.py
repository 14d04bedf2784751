"""Grouped linear in plain PyTorch: a loop over the experts that have rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.invariance import rows_times


def _runs(counts_E: Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            yield expert, slice(start, start + count)
        start += count


def weight_gradient(dy_XF: Tensor, x_XD: Tensor, counts_E: Tensor) -> Tensor:
    dweight_EFD = x_XD.new_zeros(len(counts_E), dy_XF.shape[1], x_XD.shape[1])
    for expert, rows in _runs(counts_E):
        torch.mm(dy_XF[rows].T, x_XD[rows], out=dweight_EFD[expert])
    return dweight_EFD


class GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_XD, weight_EFD, counts_E)
        y_XF = x_XD.new_empty(len(x_XD), weight_EFD.shape[1])
        for expert, rows in _runs(counts_E):
            y_XF[rows] = rows_times(x_XD[rows], weight_EFD[expert])
        return y_XF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_XF: Tensor) -> tuple[Tensor | None, ...]:
        x_XD, weight_EFD, counts_E = ctx.saved_tensors
        dy_XF = dy_XF.contiguous()
        dx_XD = None
        if ctx.needs_input_grad[0]:
            dx_XD = torch.empty_like(x_XD)
            for expert, rows in _runs(counts_E):
                torch.mm(dy_XF[rows], weight_EFD[expert], out=dx_XD[rows])
        dweight_EFD = weight_gradient(dy_XF, x_XD, counts_E) if ctx.needs_input_grad[1] else None
        return dx_XD, dweight_EFD, None
