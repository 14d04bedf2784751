"""Cross entropy against torch's, which holds all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from leadline.ops.cross_entropy import cross_entropy, reference


def formula(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden.double() @ weight.double().T
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="none")


def some_targets(tokens: int, vocabulary: int, kind: str) -> Tensor:
    targets = torch.randint(0, vocabulary, (tokens,))
    if kind == "none":
        targets[:] = -1
    elif kind == "some":
        targets[::3] = -1
    return targets


@pytest.mark.parametrize("kind", ["all", "some", "none"])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (3, 2), (4, 129), (5, 128), (127, 5), (129, 40), (0, 7)])
def test_value_and_gradients(tokens: int, vocabulary: int, kind: str) -> None:
    hidden = torch.randn(tokens, 6, requires_grad=True)
    weight = torch.randn(vocabulary, 6, requires_grad=True)
    targets = some_targets(tokens, vocabulary, kind)
    nll, expected = cross_entropy(hidden, weight, targets), formula(hidden, weight, targets)
    torch.testing.assert_close(nll.double(), expected, rtol=1e-4, atol=1e-5)
    assert not nll[targets < 0].any()
    dnll = torch.randn(tokens)
    found = torch.autograd.grad(nll, [hidden, weight], dnll)
    wanted = torch.autograd.grad(expected, [hidden, weight], dnll.double())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["all", "some", "none"])
def test_gradcheck(kind: str) -> None:
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cross_entropy, (hidden, weight, some_targets(5, 7, kind)))


def test_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of two tokens: the four that have a target of five make two tiles, six of seven make three."""
    monkeypatch.setattr(reference, "LOGITS_PER_TILE", 21)
    for targets in (torch.tensor([0, 9, -1, 7, 4]), torch.tensor([0, 9, 3, 7, -1, 4, 5])):
        hidden, weight = torch.randn(len(targets), 2, requires_grad=True), torch.randn(10, 2, requires_grad=True)
        nll, expected = cross_entropy(hidden, weight, targets), formula(hidden, weight, targets)
        torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-5)
        found = torch.autograd.grad(nll.sum(), [hidden, weight])
        for ours, theirs in zip(found, torch.autograd.grad(expected.sum(), [hidden, weight]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("height", [1e2, 1e4])
def test_large_logits_do_not_overflow(height: float) -> None:
    hidden = torch.tensor([[height], [height], [-height]], requires_grad=True)
    weight, targets = torch.tensor([[1.0], [0.0], [-1.0]]), torch.tensor([0, 2, 1])
    nll = cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(nll, torch.tensor([0.0, 2 * height, height]))
    (grad,) = torch.autograd.grad(nll.sum(), hidden)
    torch.testing.assert_close(grad, torch.tensor([[0.0], [2.0], [-1.0]]))


def test_a_nan_without_target_does_not_spread() -> None:
    hidden = torch.randn(3, 2)
    hidden[1] = float("nan")
    hidden.requires_grad_()
    weight = torch.randn(5, 2, requires_grad=True)
    nll = cross_entropy(hidden, weight, torch.tensor([1, -1, 4]))
    assert torch.isfinite(nll).all()
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(nll.sum(), [hidden, weight]))


def test_any_layout_in(scattered: Callable[[Tensor], Tensor]) -> None:
    values, targets, dnll = [torch.randn(6, 4), torch.randn(9, 4)], some_targets(6, 9, "some"), torch.randn(6)
    results = []
    for layout in (torch.clone, scattered):
        inputs = [layout(value).requires_grad_() for value in values]
        nll = cross_entropy(inputs[0], inputs[1], layout(targets))
        results.append((nll, *torch.autograd.grad(nll, inputs, layout(dnll))))
    for plain, strided in zip(*results, strict=True):
        torch.testing.assert_close(plain, strided, rtol=1e-5, atol=1e-6)


def test_low_precision_in_float32_out() -> None:
    hidden, weight = torch.randn(20, 64).bfloat16(), torch.randn(50, 64).bfloat16()
    targets = some_targets(20, 50, "all")
    nll = cross_entropy(hidden, weight, targets)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), formula(hidden, weight, targets), rtol=1e-5, atol=1e-4)


def test_the_logits_of_all_tokens_never_exist(largest_tensor: Any) -> None:
    tokens, vocabulary = 4 * 1024, 4 * 1024  # 16 million logits, four tiles
    hidden, weight = torch.randn(tokens, 2, requires_grad=True), torch.randn(vocabulary, 2, requires_grad=True)
    with largest_tensor:
        cross_entropy(hidden, weight, torch.arange(tokens)).sum().backward()
    assert largest_tensor.elements <= reference.LOGITS_PER_TILE
