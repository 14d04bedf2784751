"""What the rows of a product are made of, where they need not be written down before they are rounded.

Experts multiply copies of tokens, and then the SwiGLU of two products. Both are read once, to be rounded; without
gradients the kernels make them while they round, and no tensor holds them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from leadline.ops.swiglu import swiglu
from leadline.ops.token_permutation import ExpertOrder, dispatch


class Dispatched(NamedTuple):
    """The token of every row: `dispatch`."""

    x_TN: Tensor
    order: ExpertOrder

    def written(self) -> Tensor:
        """The rows as a tensor [X, N]."""
        return dispatch(self.x_TN, self.order)

    @property
    def requires_grad(self) -> bool:
        return self.x_TN.requires_grad


class Gated(NamedTuple):
    """Clamped SwiGLU: `swiglu`, whose arguments these are."""

    gate: Tensor
    up: Tensor
    limit: float
    scale: Tensor | None = None
    place_X: Tensor | None = None

    def written(self) -> Tensor:
        """The rows as a tensor [X, N]."""
        return swiglu(*self)

    @property
    def requires_grad(self) -> bool:
        tensors = self.gate, self.up, self.scale
        return any(tensor is not None and tensor.requires_grad for tensor in tensors)


Rows = Tensor | Dispatched | Gated


def written(rows: Rows) -> Tensor:
    """The rows as a tensor."""
    return rows if isinstance(rows, Tensor) else rows.written()
