"""Two products in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.ops.invariance import rows_times
from leadline.ops.precision import wide


@torch.no_grad()
def twin_product_reference(x_TN: Tensor, first_ON: Tensor, second_ON: Tensor) -> tuple[Tensor, Tensor]:
    x_TN = wide(x_TN)
    return rows_times(x_TN, wide(first_ON)), rows_times(x_TN, wide(second_ON))
