"""Two products in one launch: the reference, the kernel, and when the one is better than two."""

from __future__ import annotations

import pytest
import torch

from leadline.ops.dispatch import implementation
from leadline.ops.twin_product import suits, twin_product

SHAPES = [(1, 16, 512), (3, 32, 40), (16, 48, 640), (17, 16, 1000), (64, 16, 513)]


def check(tokens: int, columns: int, width: int, dtype: torch.dtype, device: str) -> None:
    x, *weights = (torch.randn(rows, width, device=device).to(dtype) for rows in (tokens, columns, columns))
    with implementation("kernel"):
        found, again = twin_product(x, *weights), twin_product(x, *weights)
    for ours, twice, weight in zip(found, again, weights, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, twice)
        wanted = x.double() @ weight.double().T
        assert float((ours - wanted).norm()) <= 2e-6 * float(wanted.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reference(dtype: torch.dtype) -> None:
    x, *weights = (torch.randn(rows, 64).to(dtype) for rows in (3, 16, 16))
    for found, weight in zip(twin_product(x, *weights), weights, strict=True):
        torch.testing.assert_close(found, x.float() @ weight.float().T)


@pytest.mark.interpret
@pytest.mark.parametrize(("tokens", "columns", "width"), SHAPES)
def test_interpreted(tokens: int, columns: int, width: int) -> None:
    check(tokens, columns, width, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "columns", "width"), [*SHAPES, (1, 1024, 4096), (64, 512, 4096), (33, 256, 4096)])
def test_compiled(tokens: int, columns: int, width: int, dtype: torch.dtype) -> None:
    check(tokens, columns, width, dtype, "cuda")


def test_suits_nothing_on_a_cpu() -> None:
    assert not suits(torch.zeros(1, 16, dtype=torch.bfloat16), torch.zeros(16, 16, dtype=torch.bfloat16))


@pytest.mark.gpu
def test_suits_few_rows_without_a_gradient() -> None:
    weight = torch.zeros(32, 16, dtype=torch.bfloat16, device="cuda")
    x = weight.new_zeros(64, 16)
    assert suits(x, weight)
    assert not suits(weight.new_zeros(65, 16), weight)
    assert not suits(x, weight[:24])
    assert not suits(x.float(), weight.float())
    assert not suits(x, weight.requires_grad_())
    with torch.no_grad():
        assert suits(x, weight)
