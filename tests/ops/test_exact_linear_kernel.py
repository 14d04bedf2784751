"""The kernel for few rows against the reference: interpreted in float32, compiled in bfloat16 and float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.dispatch import implementation
from leadline.ops.exact_linear import exact_linear

# rows, outputs, width
SHAPES = [(1, 1, 1), (3, 5, 4), (4, 7, 127), (2, 4, 129), (1, 3, 1000), (0, 3, 4)]
GPU_SHAPES = [(1, 256, 4096), (4, 1024, 4096), (3, 257, 7168), (2, 384, 7168), (1, 3, 100)]


def few(x: Tensor, weight: Tensor) -> Tensor:
    return exact_linear(x.detach(), weight.detach())


@pytest.mark.interpret
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted(shape: tuple[int, int, int], against_reference: Callable[..., None]) -> None:
    rows, outputs, width = shape
    against_reference(few, [torch.randn(rows, width), torch.randn(outputs, width)], 1e-6)


@pytest.mark.interpret
def test_any_layout_in(scattered: Callable[[Tensor], Tensor], against_reference: Callable[..., None]) -> None:
    against_reference(few, [scattered(torch.randn(3, 6)), scattered(torch.randn(5, 6))], 1e-6)


@pytest.mark.interpret
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x, weight = torch.randn(4, 300), torch.randn(7, 300)
    with implementation("kernel"):
        assert torch.equal(few(x, weight)[2:3], few(x[2:3], weight))


@pytest.mark.interpret
def test_gradients_and_many_rows_go_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from leadline.ops.exact_linear import kernel

    monkeypatch.setattr(kernel, "few_rows", None)
    with implementation("kernel"):
        assert exact_linear(torch.randn(5, 8), torch.randn(3, 8)).shape == (5, 3)
        assert exact_linear(torch.randn(2, 8), torch.randn(3, 8, requires_grad=True)).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiled(shape: tuple[int, int, int], dtype: torch.dtype, against_reference: Callable[..., None]) -> None:
    rows, outputs, width = shape
    x, weight = (torch.randn(size, width, device="cuda").to(dtype) for size in (rows, outputs))
    against_reference(few, [x, weight], 1e-6)


@pytest.mark.gpu
def test_a_row_on_the_card_does_not_depend_on_its_neighbours() -> None:
    x, weight = (torch.randn(size, 4096, device="cuda").bfloat16() for size in (4, 256))
    assert torch.equal(few(x, weight)[2:3], few(x[2:3], weight))
