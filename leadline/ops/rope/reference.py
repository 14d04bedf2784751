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
    turn = _turn_parts if torch.compiler.is_compiling() else _turn_complex
    y = x.clone(memory_format=torch.contiguous_format)
    y[..., -width:] = rowwise(turn, pairs, cos, sin).flatten(-2)
    return y


def _turn_complex(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(2k, 2k+1) is a complex number."""
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))


def _turn_parts(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same written out, for torch.compile, which makes no code for complex numbers."""
    real, imaginary = pairs.unbind(-1)
    return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)


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
