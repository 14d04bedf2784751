"""Arithmetic is float32, or float64 where the input is; and where matrix units do it, nothing is lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leadline.ops.precision import ExactProduct, bfloat16_parts, wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_at_least_float32(dtype: torch.dtype) -> None:
    x = torch.randn(3).to(dtype)
    assert wide(x).dtype == torch.float32
    assert torch.equal(wide(x), x.to(torch.float32))


def test_float64_stays() -> None:
    x = torch.randn(3, dtype=torch.float64)
    assert wide(x) is x


def test_parts_of_a_gradient_lose_nothing() -> None:
    """Three bfloat16 numbers hold the 24 bits of an FP32 number, whatever its size."""
    x = torch.randn(1000) * torch.logspace(-20, 20, 1000)
    parts = bfloat16_parts(x)
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert float(((sum(part.double() for part in parts) - x.double()) / x.double()).abs().max()) <= 2**-24


@pytest.fixture
def library_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of bfloat16 with an FP32 result, which torch has on CUDA only."""

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return (a.float() @ b.float()).to(out_dtype or a.dtype)

    monkeypatch.setattr(torch, "mm", mm)


def check_products(tokens: int, device: str) -> None:
    """Against float64: only the gradients are rounded to bfloat16, once."""
    operands = [torch.randn(rows, 256, device=device).bfloat16() for rows in (tokens, 96)]
    dy = torch.randn(tokens, 96, device=device)
    x, weight = (operand.clone().requires_grad_() for operand in operands)
    y = ExactProduct.apply(x, weight)
    wide_x, wide_weight = (operand.double().requires_grad_() for operand in operands)
    exact = wide_x @ wide_weight.T
    found = [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]
    wanted = [exact.detach(), *torch.autograd.grad(exact, (wide_x, wide_weight), dy.double())]
    assert [result.dtype for result in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for ours, theirs, bound in zip(found, wanted, (1e-6, 2e-3, 2e-3), strict=True):
        assert float((ours.double() - theirs).norm() / theirs.norm()) <= bound


@pytest.mark.usefixtures("library_on_cpu")
@pytest.mark.parametrize("tokens", [1, 127])
def test_exact_products(tokens: int) -> None:
    check_products(tokens, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 127, 4001])
def test_exact_products_on_gpu(tokens: int) -> None:
    check_products(tokens, "cuda")
