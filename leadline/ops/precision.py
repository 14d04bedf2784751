"""The one rule of precision inside the ops: arithmetic that the report does in FP32 is never done in less."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32, or unchanged when it is float64 (gradient checks run in float64)."""
    return x if x.dtype == torch.float64 else x.float()
