"""RMS norm in plain PyTorch; the backward recomputes the scale from x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.invariance import rowwise
from leadline.ops.precision import wide


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    # A norm needs no square of x in memory.
    return torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        if weight is None and x.dtype != wide(x).dtype:
            return x * rowwise(torch.rsqrt, x.square().mean(-1, keepdim=True) + eps)
        y = wide(x)
        y = y * _inverse_rms(y, eps)
        if weight is not None:
            y *= wide(weight)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy, x_wide = wide(dy), wide(x)
        scale = _inverse_rms(x_wide, ctx.eps)
        normed = x_wide * scale
        dweight = None
        if weight is not None:
            dweight = (dy * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
            dy = dy * wide(weight)
        dx = scale * (dy - normed * (dy * normed).mean(-1, keepdim=True))
        return dx.to(x.dtype), dweight, None
