"""The RMS norm kernel against the reference: interpreted in float32, compiled in bfloat16 and float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.dispatch import implementation
from leadline.ops.rms_norm import rms_norm

SHAPES = [(1, 6), (3, 5), (2, 3, 127), (127, 8), (4001, 3), (9, 4096), (2, 7168), (0, 4)]
GPU_SHAPES = [(1, 4096), (127, 7168), (4001, 4096), (4001, 8, 512), (5, 384), (0, 4)]


def weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    return rms_norm(x, weight, 1e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_weight", [True, False], ids=["weight", "weightless"])
def test_interpreted(shape: tuple[int, ...], has_weight: bool, against_reference: Callable[..., None]) -> None:
    x, weight = torch.randn(shape), torch.randn(shape[-1]) if has_weight else None
    against_reference(weighted, [x, weight], 2e-6)


@pytest.mark.interpret
def test_any_layout_in(scattered: Callable[[Tensor], Tensor], against_reference: Callable[..., None]) -> None:
    against_reference(weighted, [scattered(torch.randn(5, 3, 8)), scattered(torch.randn(8))], 2e-6)


@pytest.mark.interpret
def test_more_rows_than_partial_sums(against_reference: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    from leadline.ops.rms_norm import kernel

    monkeypatch.setattr(kernel, "PARTIAL_SUMS", 3)
    monkeypatch.setattr(kernel, "VALUES_PER_TILE", 8)
    against_reference(weighted, [torch.randn(23, 7), torch.randn(7)], 2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("has_weight", [True, False], ids=["weight", "weightless"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float32, 2e-6)])
def test_compiled(
    shape: tuple[int, ...],
    has_weight: bool,
    dtype: torch.dtype,
    tolerance: float,
    against_reference: Callable[..., None],
) -> None:
    x = torch.randn(shape, device="cuda").to(dtype)
    weight = torch.randn(shape[-1], device="cuda").to(dtype) if has_weight else None
    against_reference(weighted, [x, weight], tolerance)


@pytest.mark.gpu
def test_bfloat16_rounds_once() -> None:
    x, weight = torch.randn(64, 4096, device="cuda").bfloat16(), torch.randn(4096, device="cuda")
    exact = rms_norm(x.double(), weight.double(), 1e-6)
    with implementation("kernel"):
        y = rms_norm(x, weight, 1e-6)
    assert ((y.double() - exact).abs() <= exact.abs() * (2**-8 + 1e-6)).all()
