"""RMS norm against its formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.rms_norm import rms_norm

EPS = 1e-6
SHAPES = [(8,), (1, 1), (1, 128), (3, 5), (4, 3, 127), (5, 4), (128, 1), (129, 2, 7), (0, 4)]


def formula(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x.double()
    y = x / (x * x).mean(-1, keepdim=True).add(eps).sqrt()
    return y if weight is None else y * weight.double()


def shape_id(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "weightless"])
def test_value_and_gradients(shape: tuple[int, ...], weighted: bool) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape[-1], requires_grad=True) if weighted else None
    inputs = [x] if weight is None else [x, weight]
    dy = torch.randn(shape)
    y, expected = rms_norm(x, weight, EPS), formula(x, weight, EPS)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    found, wanted = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy.double())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "weightless"])
def test_gradcheck(weighted: bool) -> None:
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True) if weighted else None
    inputs = [x] if weight is None else [x, weight]
    assert torch.autograd.gradcheck(lambda x, weight=None: rms_norm(x, weight, 1e-3), inputs)


def test_any_layout_in(scattered: Callable[[Tensor], Tensor]) -> None:
    x, weight, dy = torch.randn(5, 3, 8), torch.randn(8), torch.randn(5, 3, 8)
    results = []
    for layout in (torch.clone, scattered):
        inputs = [layout(x).requires_grad_(), layout(weight).requires_grad_()]
        y = rms_norm(inputs[0], inputs[1], EPS)
        results.append((y, *torch.autograd.grad(y, inputs, layout(dy))))
    for plain, strided in zip(*results, strict=True):
        torch.testing.assert_close(plain, strided, rtol=1e-6, atol=1e-6)


def test_low_precision_rounds_once() -> None:
    """A bf16 result lies within half a step of the exact value; any rounding on the way would take it further."""
    x, weight = torch.randn(64, 128).bfloat16(), torch.randn(128).bfloat16()
    y, exact = rms_norm(x, weight, EPS), formula(x, weight, EPS)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= exact.abs() * (2**-8 + 1e-6)).all()


def test_without_a_weight_every_step_rounds() -> None:
    """The published code norms query heads in the dtype of x; the golden numbers of served models depend on it."""
    x = torch.randn(64, 3, 128).bfloat16()
    square = (x.double() ** 2).bfloat16()
    mean = square.double().mean(-1, keepdim=True).bfloat16()
    scale = (mean.double() + EPS).bfloat16().double().rsqrt().bfloat16()
    # Means are summed in FP32 there, in FP64 here: a sum in the middle of two steps may round to either side.
    assert (rms_norm(x, None, EPS) == (x.double() * scale.double()).bfloat16()).all(-1).double().mean() > 0.98


def test_zeros_stay_zeros() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    y = rms_norm(x, torch.ones(4), EPS)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 4))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((2, 4), EPS**-0.5))


def test_keeps_its_input_only() -> None:
    """The backward recomputes: beside the output, the graph holds the very tensor that came in."""
    x = torch.randn(7, 16, requires_grad=True)
    y = rms_norm(x, None, EPS)
    assert y.grad_fn is not None
    saved = [tensor for tensor in y.grad_fn.saved_tensors if tensor is not None]  # pyright: ignore[reportAttributeAccessIssue]
    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr()]
