"""The rotation in plain PyTorch. Its backward is the opposite rotation, so nothing but the angles is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leadline.ops.invariance import rowwise
from leadline.ops.precision import wide


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = 2 * cos.shape[-1]
    if x.ndim == 3:  # one angle for all heads of a token
        cos, sin = cos[:, None], sin[:, None]
    pairs = wide(x[..., -width:]).unflatten(-1, (-1, 2)).contiguous()
    # (2k, 2k+1) is a complex number
    turned = rowwise(lambda p, c, s: torch.view_as_complex(p) * torch.complex(c, s), pairs, cos, sin)
    y = x.clone(memory_format=torch.contiguous_format)
    y[..., -width:] = torch.view_as_real(turned).flatten(-2)
    return y


class Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.inverse = inverse
        return rotate(x, cos, -sin if inverse else sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return rotate(dy, cos, sin if ctx.inverse else -sin), None, None, None
