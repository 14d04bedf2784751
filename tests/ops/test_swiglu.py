"""Clamped SwiGLU against its formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.swiglu import swiglu


def formula(gate: Tensor, up: Tensor, limit: float, scale: Tensor | None) -> Tensor:
    gate = torch.minimum(gate.double(), torch.tensor(limit, dtype=torch.float64))
    up = up.double().clamp(-limit, limit)
    hidden = gate / (1 + torch.exp(-gate)) * up
    return hidden if scale is None else hidden * scale.double()[:, None]


@pytest.mark.parametrize("scaled", [True, False], ids=["gate-weight", "shared-expert"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (5, 127), (128, 3), (129, 1), (0, 4)])
def test_value_and_gradients(shape: tuple[int, int], scaled: bool) -> None:
    gate, up = (torch.randn(2, *shape) * 3).requires_grad_().unbind()
    inputs = [gate, up]
    if scaled:
        inputs.append(torch.rand(shape[0], requires_grad=True))
    scale = inputs[2] if scaled else None
    dy = torch.randn(shape)
    y, expected = swiglu(gate, up, 2.0, scale), formula(gate, up, 2.0, scale)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    found, wanted = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy.double())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaled", [True, False], ids=["gate-weight", "shared-expert"])
def test_gradcheck_on_both_sides_of_the_clamps(scaled: bool) -> None:
    grid = torch.tensor([-9.0, -2.6, -0.4, 0.3, 2.4, 2.6, 9.0], dtype=torch.float64)
    gate, up = torch.cartesian_prod(grid, grid).T.reshape(2, 7, 7).clone()
    inputs = [gate.requires_grad_(), up.requires_grad_()]
    if scaled:
        inputs.append(torch.rand(7, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(lambda gate, up, scale=None: swiglu(gate, up, 2.5, scale), inputs)


def test_the_gate_is_clamped_from_above_alone() -> None:
    gate, up = torch.tensor([[-50.0, -3.0, 3.0, 50.0]]), torch.ones(1, 4)
    expected = torch.nn.functional.silu(torch.tensor([[-50.0, -3.0, 2.0, 2.0]]))
    torch.testing.assert_close(swiglu(gate, up, 2.0), expected)
    torch.testing.assert_close(
        swiglu(torch.ones(1, 2), torch.tensor([[-50.0, 50.0]]), 2.0)[0, 0], -expected.new_tensor(2 / (1 + torch.e**-1))
    )


def test_any_layout_in(scattered: Callable[[Tensor], Tensor]) -> None:
    values = [torch.randn(6, 5), torch.randn(6, 5), torch.rand(6)]
    dy = torch.randn(6, 5)
    results = []
    for layout in (torch.clone, scattered):
        gate, up, scale = inputs = [layout(value).requires_grad_() for value in values]
        y = swiglu(gate, up, 10.0, scale)
        results.append((y, *torch.autograd.grad(y, inputs, layout(dy))))
    for plain, strided in zip(*results, strict=True):
        torch.testing.assert_close(plain, strided, rtol=1e-6, atol=1e-6)


def test_scales_that_stand_elsewhere() -> None:
    values = [torch.randn(6, 5), torch.randn(6, 5), torch.rand(6)]
    place, dy = torch.tensor([3, 0, 5, 1, 4, 2]), torch.randn(6, 5)
    gate, up, scale = inputs = [value.requires_grad_() for value in values]
    y, expected = swiglu(gate, up, 1.0, scale, place), swiglu(gate, up, 1.0, scale[place])
    assert torch.equal(y, expected)
    found, wanted = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_low_precision_rounds_once() -> None:
    gate, up, scale = torch.randn(64, 32).bfloat16(), torch.randn(64, 32).bfloat16(), torch.rand(64)
    y, exact = swiglu(gate, up, 10.0, scale), formula(gate, up, 10.0, scale)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= exact.abs() * (2**-8 + 1e-5)).all()
