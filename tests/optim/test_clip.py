"""Gradient clipping: the norm, the scaling, and gradients that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from leadline.optim.clip import NonFiniteGradientError, clip_gradients


def with_gradients(*values: torch.Tensor | None) -> list[tuple[str, nn.Parameter]]:
    named = []
    for number, value in enumerate(values):
        parameter = nn.Parameter(torch.zeros(3) if value is None else torch.zeros_like(value))
        parameter.grad = value
        named.append((f"layers.{number}.weight", parameter))
    return named


def test_norm_is_global_and_gradients_shrink_to_it() -> None:
    named = with_gradients(torch.tensor([3.0, 0.0]), None, torch.tensor([[4.0]]))
    assert clip_gradients(named, 1.0) == pytest.approx(5.0)
    assert torch.allclose(named[0][1].grad, torch.tensor([0.6, 0.0]))  # type: ignore[arg-type]
    assert torch.allclose(named[2][1].grad, torch.tensor([[0.8]]))  # type: ignore[arg-type]


def test_small_gradients_are_untouched() -> None:
    value = torch.randn(5) * 1e-3
    named = with_gradients(value.clone())
    assert clip_gradients(named, 1.0) == pytest.approx(float(value.norm()))
    assert torch.equal(named[0][1].grad, value)  # type: ignore[arg-type]


def test_agrees_with_torch() -> None:
    values = [torch.randn(4, 5) * 10, torch.randn(7)]
    ours, theirs = with_gradients(*(v.clone() for v in values)), with_gradients(*(v.clone() for v in values))
    norm = torch.nn.utils.clip_grad_norm_([parameter for _, parameter in theirs], 0.5)
    assert clip_gradients(ours, 0.5) == pytest.approx(float(norm), rel=1e-6)
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=1e-5)


def test_squares_that_overflow_float32_do_not() -> None:
    named = with_gradients(torch.full((4,), 1e30), torch.full((2,), 1e-30))
    assert clip_gradients(named, 1.0) == pytest.approx(2e30)
    assert torch.allclose(named[0][1].grad, torch.full((4,), 0.5))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_first_bad_tensor_is_named_and_nothing_is_scaled(bad: float) -> None:
    good = torch.full((4,), 100.0)
    named = with_gradients(good.clone(), torch.tensor([[1.0, bad]]), torch.tensor([bad]))
    with pytest.raises(NonFiniteGradientError, match=r"layers\.1\.weight \(1, 2\).*1 .* of 2 elements"):
        clip_gradients(named, 1.0)
    assert torch.equal(named[0][1].grad, good)  # type: ignore[arg-type]


def test_no_gradients() -> None:
    assert clip_gradients(with_gradients(None, None), 1.0) == 0.0
    assert clip_gradients(with_gradients(torch.zeros(3)), 1.0) == 0.0


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_max_norm_must_be_positive(max_norm: float) -> None:
    with pytest.raises(ValueError, match="max_norm"):
        clip_gradients(with_gradients(torch.ones(1)), max_norm)
