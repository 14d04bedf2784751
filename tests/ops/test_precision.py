"""Arithmetic is float32, or float64 where the input is."""

from __future__ import annotations

import pytest
import torch

from leadline.ops.precision import wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_at_least_float32(dtype: torch.dtype) -> None:
    x = torch.randn(3).to(dtype)
    assert wide(x).dtype == torch.float32
    assert torch.equal(wide(x), x.to(torch.float32))


def test_float64_stays() -> None:
    x = torch.randn(3, dtype=torch.float64)
    assert wide(x) is x
