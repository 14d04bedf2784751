"""Grouped linear against one matrix product per row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.grouped_linear import grouped_linear

COUNTS = {
    "one expert": [5],
    "even": [3, 3, 3],
    "experts without rows": [0, 4, 0, 0, 1, 0],
    "no rows": [0, 0],
    "one row": [0, 1],
    "uneven": [127, 1, 129, 128],
}


def row_by_row(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    expert_of_row = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return torch.einsum("xd,xfd->xf", x.double(), weight.double()[expert_of_row])


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize(("width_in", "width_out"), [(1, 1), (5, 3), (4, 64)])
def test_value_and_gradients(counts: list[int], width_in: int, width_out: int) -> None:
    x = torch.randn(sum(counts), width_in, requires_grad=True)
    weight = torch.randn(len(counts), width_out, width_in, requires_grad=True)
    dy = torch.randn(sum(counts), width_out)
    y, expected = (
        grouped_linear(x, weight, torch.tensor(counts)),
        row_by_row(x, weight, torch.tensor(counts)),
    )
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    found, wanted = torch.autograd.grad(y, [x, weight], dy), torch.autograd.grad(expected, [x, weight], dy.double())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for expert, count in enumerate(counts):
        assert count or not found[1][expert].any()


@pytest.mark.parametrize("frozen", ["x", "weight", "neither"])
def test_gradcheck(frozen: str) -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=frozen != "x")
    weight = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=frozen != "weight")
    assert torch.autograd.gradcheck(grouped_linear, (x, weight, torch.tensor([2, 0, 3, 0])))


def test_any_layout_in(scattered: Callable[[Tensor], Tensor]) -> None:
    values, counts = [torch.randn(6, 4), torch.randn(3, 5, 4)], torch.tensor([4, 0, 2])
    dy = torch.randn(6, 5)
    results = []
    for layout in (torch.clone, scattered):
        inputs = [layout(value).requires_grad_() for value in values]
        y = grouped_linear(inputs[0], inputs[1], layout(counts))
        results.append((y, *torch.autograd.grad(y, inputs, layout(dy))))
    for plain, strided in zip(*results, strict=True):
        torch.testing.assert_close(plain, strided, rtol=1e-6, atol=1e-6)


def test_an_expanded_gradient() -> None:
    """`sum().backward()` sends a gradient without memory of its own."""
    x, weight = torch.randn(5, 3, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    grouped_linear(x, weight, torch.tensor([2, 3])).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(1)[[0, 0, 1, 1, 1]])
