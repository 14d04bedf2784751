"""Rows of a small table, looked up by many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class PlaceRows(torch.autograd.Function):
    """Rows of a small table [R, E] for places 0 .. R - 1 [T]. The gradient is a product with R columns of ones and
    zeros: so many tokens share a row that adding them one by one would take longer than the attention."""

    @staticmethod
    def forward(ctx: Any, table_RE: Tensor, place_T: Tensor) -> Tensor:
        ctx.save_for_backward(place_T)
        ctx.rows = len(table_RE)
        return table_RE[place_T]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TE: Tensor) -> tuple[Tensor, None]:
        (place_T,) = ctx.saved_tensors
        is_at_RT = torch.arange(ctx.rows, device=place_T.device)[:, None] == place_T
        return is_at_RT.to(dy_TE.dtype) @ dy_TE, None
