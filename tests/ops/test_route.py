"""The choice of experts against loops over tokens; what is special about its order, its gradient and its extremes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.route import route

SIZES = [(1, 1, 1), (3, 2, 4), (5, 3, 7), (127, 6, 8), (2, 6, 256), (0, 2, 4)]


def given_experts(tokens: int, choices: int, experts: int) -> Tensor:
    return torch.rand(tokens, experts).argsort(1)[:, :choices]


@pytest.mark.parametrize("given", [False, True], ids=["picked", "given"])
@pytest.mark.parametrize(("tokens", "choices", "experts"), SIZES)
def test_formula(tokens: int, choices: int, experts: int, given: bool) -> None:
    logits, bias = torch.randn(tokens, experts) * 3, torch.randn(experts)
    table = given_experts(tokens, choices, experts) if given else None
    found = route(logits, None if given else bias, table, choices, 2.5)
    scores = torch.log1p(torch.exp(logits.double())).sqrt()
    torch.testing.assert_close(found.scores_TE.double(), scores, rtol=1e-6, atol=1e-7)
    for token in range(tokens):
        ranked = sorted(range(experts), key=lambda expert: -float(found.scores_TE[token, expert] + bias[expert]))
        expected = ranked[:choices] if table is None else table[token].tolist()
        assert found.experts_TA[token].tolist() == expected
        chosen = scores[token, expected]
        torch.testing.assert_close(found.weights_TA[token].double(), 2.5 * chosen / chosen.sum(), rtol=1e-5, atol=1e-7)
    assert found.order.counts_E.tolist() == [int((found.experts_TA == expert).sum()) for expert in range(experts)]
    assert torch.equal(found.experts_TA.flatten()[found.order.pair_X], found.experts_TA.flatten().sort().values)


@pytest.mark.parametrize("given", [False, True], ids=["picked", "given"])
def test_gradcheck(given: bool) -> None:
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    bias, table = (None, given_experts(3, 2, 6)) if given else (torch.randn(6, dtype=torch.float64), None)
    assert torch.autograd.gradcheck(lambda logits: route(logits, bias, table, 2, 1.5)[1:3], (logits,))


def test_equal_scores_go_to_the_lower_expert() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0]])
    assert route(logits, torch.zeros(5), None, 4, 1.0).experts_TA.tolist() == [[1, 2, 4, 0]]


def test_any_layout_in(scattered: Callable[[Tensor], Tensor]) -> None:
    logits, bias, table = torch.randn(7, 5), torch.randn(5), given_experts(7, 2, 5)
    for strided, plain in (
        (route(scattered(logits), scattered(bias), None, 2, 1.0), route(logits, bias, None, 2, 1.0)),
        (route(scattered(logits), None, scattered(table), 2, 1.0), route(logits, None, table, 2, 1.0)),
    ):
        for one, other in zip(strided[:3], plain[:3], strict=True):
            torch.testing.assert_close(one, other)


def test_experts_are_picked_or_given() -> None:
    with pytest.raises(AssertionError, match="by a bias or given"):
        route(torch.randn(2, 4), None, None, 2, 1.0)
