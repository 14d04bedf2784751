"""The one rule of precision inside the ops: arithmetic that the report does in FP32 is never done in less."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.dispatch import is_batch_invariant
from leadline.ops.ordered_sums import ordered_bmm


def wide(x: Tensor) -> Tensor:
    """x in float32, or unchanged when it is float64 (gradient checks run in float64)."""
    return x if x.dtype == torch.float64 else x.float()


class ExactProduct(torch.autograd.Function):
    """x W^T in FP32 for bfloat16 matrices on CUDA: their products are exact in FP32, so the matrix units may make them.

    The gradient that comes back is FP32, which these units do not take. But to its last bit it is the sum of three
    bfloat16 numbers, and each of them has exact products with the other operand.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        if is_batch_invariant():
            return ordered_bmm(x_TD[None], weight_ED.T[None], torch.float32)[0]
        return torch.mm(x_TD, weight_ED.T, out_dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        parts = bfloat16_parts(dy_TE)
        dx_TD = dweight_ED = None
        if ctx.needs_input_grad[0]:
            # One product over all parts, so that the sum is rounded once.
            dx_TD = torch.mm(torch.cat(parts, dim=1), weight_ED.repeat(len(parts), 1))
        if ctx.needs_input_grad[1]:
            products = [torch.mm(part.T, x_TD, out_dtype=torch.float32) for part in parts]
            dweight_ED = torch.stack(products).sum(0).to(weight_ED.dtype)
        return dx_TD, dweight_ED


def bfloat16_parts(x: Tensor) -> list[Tensor]:
    """Three bfloat16 tensors whose sum is x, FP32: 8 bits of it each."""
    parts = []
    for _ in range(3):
        parts.append(x.bfloat16())
        x = x - parts[-1]
    return parts
