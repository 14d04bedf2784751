"""Grouped linear in plain PyTorch: a loop over the experts that have rows, torch's own where it takes the operands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.invariance import is_batch_invariant, rows_times
from leadline.ops.opaque import opaque


def _runs(counts_E: Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _is_torchs(x_XD: Tensor, weight_EFD: Tensor) -> bool:
    """Whether torch has the product: matrices of at most 32 bits a number whose rows begin at multiples of 16 bytes."""
    rows = (x_XD.stride(0), *weight_EFD.stride()[:2])
    return (
        x_XD.dtype in (torch.float32, torch.bfloat16)
        and x_XD.stride(1) == weight_EFD.stride(2) == 1
        and all(row * x_XD.element_size() % 16 == 0 for row in rows)
    )


@opaque(lambda x_XD, weight_EFD, counts_E: x_XD.new_empty(len(x_XD), weight_EFD.shape[1]))
def grouped_product(x_XD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """The product without its gradient."""
    if not is_batch_invariant() and _is_torchs(x_XD, weight_EFD):
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        return torch.nn.functional.grouped_mm(x_XD, weight_EFD.mT, offs=ends_E)
    y_XF = x_XD.new_empty(len(x_XD), weight_EFD.shape[1])
    for expert, rows in _runs(counts_E):
        y_XF[rows] = rows_times(x_XD[rows], weight_EFD[expert])
    return y_XF


def weight_gradient(dy_XF: Tensor, x_XD: Tensor, counts_E: Tensor) -> Tensor:
    dweight_EFD = x_XD.new_zeros(len(counts_E), dy_XF.shape[1], x_XD.shape[1])
    for expert, rows in _runs(counts_E):
        torch.mm(dy_XF[rows].T, x_XD[rows], out=dweight_EFD[expert])
    return dweight_EFD


class GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_XD, weight_EFD, counts_E)
        return grouped_product(x_XD, weight_EFD, counts_E)

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
