"""Linear: a weight matrix and how it is multiplied."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leadline.ops.precision import wide


class Linear(nn.Module):
    """y = x W^T without bias; weight [out, in] in the model's dtype."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T with FP32 arithmetic and an FP32 result, for the places where the report keeps full precision: compressor
    projections, router and head."""
    return nn.functional.linear(wide(x), wide(weight))


class Norm(nn.Module):
    """The learned weight of an RMS norm, [D]; applied with `ops.rms_norm`."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
