"""Grouped linear through the grouped matrix product of torch.

FLOPs are the floor: a row takes part in 2 D F of them in the forward and twice as many in the backward, and an expert
of V4-Flash has about 190 rows in a segment of 8,192 tokens, enough to keep its matrices off the critical path. torch
ships a persistent kernel that walks over the tiles of all groups, reading where each ends from the device, which is all
that this op needs: no loop over experts, no number that the host must know.

The three products are groups along the rows (forward, and the gradient of x) and groups along the summed axis (the
gradient of the weights, where an expert without rows sums nothing and gets zeros).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

ALIGNMENT = 8  # values: rows begin at multiples of 16 bytes


def takes(x_XD: Tensor, weight_EFD: Tensor) -> bool:
    """Whether the library has a product for these: bfloat16 with aligned rows on CUDA, anything on CPU, but not for no
    rows at all; the rest is for `tiled_kernel.py`."""
    aligned = x_XD.shape[1] % ALIGNMENT == 0 and weight_EFD.shape[1] % ALIGNMENT == 0
    fits = not x_XD.is_cuda or (aligned and x_XD.dtype == weight_EFD.dtype == torch.bfloat16)
    return fits and len(x_XD) > 0


def ends(counts_E: Tensor) -> Tensor:
    """Where the rows of each expert end, int32."""
    return counts_E.cumsum(0).to(torch.int32)


def weight_gradient(dy_XF: Tensor, x_XD: Tensor, ends_E: Tensor) -> Tensor:
    dweight_EFD = grouped_mm(dy_XF.T, x_XD, offs=ends_E)
    if x_XD.is_cuda and torch.cuda.get_device_capability(x_XD.device)[0] >= 10:
        # On Blackwell the product leaves something else than zeros for a group without rows (pytorch issue 172439).
        empty_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1)) == 0
        dweight_EFD.masked_fill_(empty_E[:, None, None], 0.0)
    return dweight_EFD


class GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
        x_XD, weight_EFD = x_XD.contiguous(), weight_EFD.contiguous()
        ends_E = ends(counts_E)
        ctx.save_for_backward(x_XD, weight_EFD, ends_E)
        return grouped_mm(x_XD, weight_EFD.mT, offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_XF: Tensor) -> tuple[Tensor | None, ...]:
        x_XD, weight_EFD, ends_E = ctx.saved_tensors
        dy_XF = dy_XF.contiguous()
        dx_XD = grouped_mm(dy_XF, weight_EFD, offs=ends_E) if ctx.needs_input_grad[0] else None
        dweight_EFD = weight_gradient(dy_XF, x_XD, ends_E) if ctx.needs_input_grad[1] else None
        return dx_XD, dweight_EFD, None
