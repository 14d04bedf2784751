"""Linear maps in FP32 in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from leadline.ops.invariance import rows_times
from leadline.ops.precision import wide


def exact_linear(x_TN: Tensor, weight_ON: Tensor) -> Tensor:
    return rows_times(wide(x_TN), wide(weight_ON))
