"""The Hadamard rotation against the Sylvester matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leadline.formats import fp4, hadamard

WIDTHS = [1, 2, 4, 32, 128]


def sylvester(width: int) -> Tensor:
    """Entry (i, j) is the parity of the bits that i and j share."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(width)] for i in range(width)]
    return torch.tensor(signs, dtype=torch.float64) * width**-0.5


@pytest.mark.parametrize("width", WIDTHS)
def test_equals_the_matrix(width: int) -> None:
    x = torch.randn(3, 2, width)
    torch.testing.assert_close(hadamard.rotate(x).double(), x.double() @ sylvester(width), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_its_own_inverse_and_products_stay(width: int) -> None:
    q, k = torch.randn(2, 5, width)
    torch.testing.assert_close(hadamard.rotate(hadamard.rotate(q)), q, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hadamard.rotate(q) @ hadamard.rotate(k).T, q @ k.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [3, 6, 96, 127])
def test_other_widths_are_an_error(width: int) -> None:
    with pytest.raises(ValueError, match=f"power of two, got width {width}"):
        hadamard.rotate(torch.zeros(width))


def test_nothing_in_nothing_out() -> None:
    """A chunk may finish no entry."""
    assert hadamard.rotate(torch.zeros(2, 0, 8)).shape == (2, 0, 8)


def test_shape_dtype_and_input_stay() -> None:
    x = torch.randn(2, 3, 16).bfloat16()
    kept = x.clone()
    y = hadamard.rotate(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert torch.equal(x, kept)


def test_an_outlier_no_longer_costs_the_others_their_bits() -> None:
    """The point of it: products survive four bits better after the rotation when one channel is large."""
    q, k = torch.randn(2, 200, 128)
    q[:, 0] *= 100
    exact = q @ k.T

    def error(q: Tensor, k: Tensor) -> float:
        return float((fp4.fake_quantize(q) @ fp4.fake_quantize(k).T - exact).square().mean())

    assert error(hadamard.rotate(q), hadamard.rotate(k)) < error(q, k)
