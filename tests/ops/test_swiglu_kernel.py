"""The SwiGLU kernel against the reference: interpreted in float32, compiled in bfloat16 and float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.dispatch import implementation
from leadline.ops.swiglu import swiglu

SHAPES = [(1, 1), (3, 4), (5, 127), (127, 3), (4001, 5), (2, 2100), (0, 4)]
GPU_SHAPES = [(1, 2048), (127, 2048), (4001, 2048), (4001, 3072), (127, 100), (0, 4)]


def op(gate: Tensor, up: Tensor, scale: Tensor | None) -> Tensor:
    return swiglu(gate, up, 2.0, scale)


@pytest.mark.interpret
@pytest.mark.parametrize("scaled", [True, False], ids=["gate-weight", "shared-expert"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted(shape: tuple[int, int], scaled: bool, against_reference: Callable[..., None]) -> None:
    gate, up = torch.randn(2, *shape) * 3
    against_reference(op, [gate, up, torch.rand(shape[0]) if scaled else None], 2e-6)


@pytest.mark.interpret
def test_any_layout_in(scattered: Callable[[Tensor], Tensor], against_reference: Callable[..., None]) -> None:
    against_reference(op, [scattered(x) for x in (torch.randn(6, 5), torch.randn(6, 5), torch.rand(6))], 2e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("rows", [1, 5, 129])
def test_scales_that_stand_elsewhere(rows: int, against_reference: Callable[..., None]) -> None:
    place = torch.randperm(rows)
    inputs = [torch.randn(rows, 6), torch.randn(rows, 6), torch.rand(rows)]
    against_reference(lambda gate, up, scale: swiglu(gate, up, 2.0, scale, place), inputs, 2e-6)


@pytest.mark.interpret
def test_nan_is_not_clamped_away() -> None:
    gate = torch.tensor([[float("nan"), 1.0, 1.0, 50.0]])
    up = torch.tensor([[1.0, float("nan"), -50.0, 50.0]])
    with implementation("kernel"):
        hidden = swiglu(gate, up, 2.0)
    assert hidden.isnan().tolist() == [[True, True, False, False]]
    torch.testing.assert_close(hidden[:, 2:], swiglu(gate, up, 2.0)[:, 2:])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("scaled", [True, False], ids=["gate-weight", "shared-expert"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float32, 3e-6)])
def test_compiled(
    shape: tuple[int, int], scaled: bool, dtype: torch.dtype, tolerance: float, against_reference: Callable[..., None]
) -> None:
    gate, up = (torch.randn(2, *shape, device="cuda") * 3).to(dtype)
    scale = torch.rand(shape[0], device="cuda") if scaled else None
    against_reference(op, [gate, up, scale], tolerance)


@pytest.mark.gpu
def test_scales_that_stand_elsewhere_compiled(against_reference: Callable[..., None]) -> None:
    place = torch.randperm(4001, device="cuda")
    gate, up = torch.randn(2, 4001, 2048, device="cuda").bfloat16()
    scale = torch.rand(4001, device="cuda")
    against_reference(lambda gate, up, scale: swiglu(gate, up, 2.0, scale, place), [gate, up, scale], 4e-3)
