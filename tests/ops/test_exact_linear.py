"""FP32 products of matrices in any dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.exact_linear import exact_linear


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 4), (4, 7, 127), (17, 2, 128), (0, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, outputs, width = shape
    x, weight = torch.randn(rows, width).to(dtype).requires_grad_(), torch.randn(outputs, width).to(dtype)
    weight.requires_grad_()
    y, expected = exact_linear(x, weight), x.double() @ weight.double().T
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, weight), dy)
    wanted = torch.autograd.grad(expected, (x, weight), dy.double())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_scaled() -> None:
    x, weight = torch.randn(3, 6), torch.randn(4, 6)
    torch.testing.assert_close(exact_linear(x, weight, 0.3), 0.3 * (x @ weight.T))


def test_float64_stays() -> None:
    x, weight = torch.randn(2, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    assert exact_linear(x, weight).dtype == torch.float64


def test_any_layout_in(scattered: Callable[[Tensor], Tensor]) -> None:
    x, weight = torch.randn(3, 6), torch.randn(4, 6)
    torch.testing.assert_close(exact_linear(scattered(x), scattered(weight)), exact_linear(x, weight))
