"""Sinkhorn normalisation: the published order of divisions, and what it guarantees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.sinkhorn import sinkhorn

EPS = 1e-6


def one_matrix(logits: Tensor, rounds: int, eps: float) -> Tensor:
    """The published loop on one S x S matrix, number by number."""
    size = len(logits)
    comb = [[float(x) for x in row] for row in torch.softmax(logits.double(), dim=-1) + eps]

    def divide_columns() -> None:
        for k in range(size):
            total = sum(comb[j][k] for j in range(size)) + eps
            for j in range(size):
                comb[j][k] /= total

    def divide_rows() -> None:
        for j in range(size):
            total = sum(comb[j]) + eps
            comb[j] = [x / total for x in comb[j]]

    divide_columns()
    for _ in range(rounds - 1):
        divide_rows()
        divide_columns()
    return torch.tensor(comb, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 4, 5])
@pytest.mark.parametrize("rounds", [1, 2, 20])
@pytest.mark.parametrize("tokens", [0, 1, 3, 17])
def test_value(tokens: int, rounds: int, size: int) -> None:
    logits = torch.randn(tokens, size, size) * 3
    comb = sinkhorn(logits, rounds, EPS)
    assert comb.shape == logits.shape
    for found, row in zip(comb, logits, strict=True):
        torch.testing.assert_close(found.double(), one_matrix(row, rounds, EPS), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rounds", [1, 2, 20])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_gradcheck(rounds: int, eps: float) -> None:
    logits = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda logits: sinkhorn(logits, rounds, eps), (logits,))


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 10.0, 100.0])
def test_columns_always_sum_to_one(spread: float) -> None:
    comb = sinkhorn(torch.randn(500, 4, 4) * spread, 20, EPS)
    assert (comb >= 0).all()
    torch.testing.assert_close(comb.sum(1), torch.ones(500, 4), rtol=0, atol=5e-6)


@pytest.mark.parametrize(("spread", "error"), [(0.1, 1e-5), (1.0, 1e-3)])
def test_rows_converge_for_moderate_logits(spread: float, error: float) -> None:
    comb = sinkhorn(torch.randn(500, 4, 4) * spread, 20, EPS)
    torch.testing.assert_close(comb.sum(2), torch.ones(500, 4), rtol=0, atol=error)


def test_rows_do_not_converge_for_wild_logits() -> None:
    """Twenty rounds are not enough there: nothing may be built on exact row sums."""
    comb = sinkhorn(torch.randn(2000, 4, 4) * 10, 20, EPS)
    assert (comb.sum(2) - 1).abs().max() > 1e-2


def test_equal_logits_mix_evenly() -> None:
    torch.testing.assert_close(sinkhorn(torch.full((2, 4, 4), 3.0), 20, EPS), torch.full((2, 4, 4), 0.25))


def test_rows_are_the_stream_read() -> None:
    """The last division is by column sums, over the first index; the transpose would have exact rows instead."""
    comb = sinkhorn(torch.randn(1, 4, 4) * 2, 1, EPS)[0]
    torch.testing.assert_close(comb.sum(0), torch.ones(4), rtol=0, atol=1e-4)
    assert (comb.sum(1) - 1).abs().max() > 1e-2


def test_any_layout_in(scattered: Callable[[Tensor], Tensor]) -> None:
    logits, dcomb = torch.randn(2, 7, 4, 4)
    results = []
    for layout in (torch.clone, scattered):
        x = layout(logits).requires_grad_()
        y = sinkhorn(x, 20, EPS)
        results.append((y, *torch.autograd.grad(y, x, layout(dcomb))))
    for plain, strided in zip(*results, strict=True):
        torch.testing.assert_close(plain, strided, rtol=1e-6, atol=1e-6)
