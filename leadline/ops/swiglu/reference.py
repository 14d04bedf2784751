"""Clamped SwiGLU in plain PyTorch; the backward recomputes the activation."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.invariance import rowwise
from leadline.ops.precision import wide


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, scale: Tensor | None, place_X: Tensor | None, limit: float
    ) -> Tensor:
        ctx.save_for_backward(gate, up, scale, place_X)
        ctx.limit = limit
        silu = partial(torch.nn.functional.silu, inplace=True)
        hidden = rowwise(silu, wide(gate).clamp(max=limit)).mul_(wide(up).clamp(-limit, limit))
        if scale is not None:
            hidden *= (scale if place_X is None else scale[place_X])[:, None]
        return hidden.to(gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, scale, place_X = ctx.saved_tensors
        limit = ctx.limit
        dhidden = wide(dhidden)
        clamped_gate = wide(gate).clamp(max=limit)
        clamped_up = wide(up).clamp(-limit, limit)
        sigmoid = torch.sigmoid(clamped_gate)
        silu = clamped_gate * sigmoid
        dscale = None
        if scale is not None:
            dscale = (dhidden * silu * clamped_up).sum(-1).to(scale.dtype)
            if place_X is not None:
                scale = scale[place_X]
                dscale = torch.empty_like(dscale).index_copy_(0, place_X, dscale)
            dhidden = dhidden * scale[:, None]
        dgate = dhidden * clamped_up * (sigmoid + silu * (1 - sigmoid))
        dgate.masked_fill_(gate > limit, 0.0)
        dup = dhidden * silu
        dup.masked_fill_(up.abs() > limit, 0.0)
        return dgate.to(gate.dtype), dup.to(up.dtype), dscale, None, None
