"""Tokens to experts and back, against loops over tokens and choices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.token_permutation import ExpertOrder, combine, dispatch, expert_order

SIZES = [(1, 1, 1), (3, 2, 4), (4, 4, 4), (5, 3, 7), (127, 2, 3), (128, 1, 200), (129, 6, 8), (0, 2, 4)]


def random_choices(tokens: int, choices: int, experts: int) -> Tensor:
    """Different experts for each token, as a router picks them."""
    return torch.rand(tokens, experts).argsort(1)[:, :choices]


@pytest.mark.parametrize(("tokens", "choices", "experts"), SIZES)
def test_order(tokens: int, choices: int, experts: int) -> None:
    chosen = random_choices(tokens, choices, experts)
    order = expert_order(chosen, experts)
    pairs = [(token, choice) for token in range(tokens) for choice in range(choices)]
    expected = sorted(pairs, key=lambda pair: (int(chosen[pair]), pair))
    assert order.pair_X.tolist() == [token * choices + choice for token, choice in expected]
    assert order.row_TA.flatten()[order.pair_X].tolist() == list(range(tokens * choices))
    assert order.counts_E.tolist() == [int((chosen == expert).sum()) for expert in range(experts)]


@pytest.mark.parametrize(("tokens", "choices", "experts"), SIZES)
def test_values(tokens: int, choices: int, experts: int) -> None:
    order = expert_order(random_choices(tokens, choices, experts), experts)
    x, y = torch.randn(tokens, 5), torch.randn(tokens * choices, 5)
    sent = dispatch(x, order)
    assert torch.equal(sent, x[torch.tensor([pair // choices for pair in order.pair_X.tolist()], dtype=torch.int64)])
    expected = torch.zeros(tokens, 5, dtype=torch.float64)
    for row, pair in enumerate(order.pair_X.tolist()):
        expected[pair // choices] += y[row].double()
    torch.testing.assert_close(combine(y, order).double(), expected, rtol=1e-5, atol=1e-5)
    plus = torch.randn(tokens, 5)
    torch.testing.assert_close(combine(y, order, plus).double(), expected + plus, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "choices", "experts"), [(4, 2, 3), (3, 1, 5), (5, 3, 3)])
def test_gradcheck(tokens: int, choices: int, experts: int) -> None:
    order = expert_order(random_choices(tokens, choices, experts), experts)
    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(tokens * choices, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dispatch(x, order), (x,))
    assert torch.autograd.gradcheck(lambda y: combine(y, order), (y,))
    assert torch.autograd.gradcheck(lambda y, plus: combine(y, order, plus), (y, x))


def test_there_and_back_multiplies_by_the_choices() -> None:
    order = expert_order(random_choices(7, 3, 4), 4)
    x = torch.randn(7, 2)
    torch.testing.assert_close(combine(dispatch(x, order), order), 3 * x)


def test_low_precision_sums_in_float32() -> None:
    """256 + 1 is no bf16 number: a bf16 sum would lose the ones."""
    order = expert_order(torch.tensor([[0, 1, 2, 3]]), 4)
    y = torch.tensor([[256.0], [1.0], [1.0], [1.0]]).bfloat16()
    total = combine(y, order)
    assert total.dtype == torch.float32
    assert total.item() == 259.0
    total = combine(y, order, torch.tensor([[1.0]]).bfloat16())
    assert total.dtype == torch.bfloat16
    assert total.item() == 260.0


def test_the_sum_does_not_depend_on_the_other_tokens() -> None:
    """A token's own rows, in the order of its choices: bitwise the same whoever travels along."""
    chosen, y = random_choices(50, 4, 8), torch.randn(50, 4, 3)
    together = expert_order(chosen, 8)
    in_order = y.flatten(0, 1)[together.pair_X]
    for token in range(0, 50, 7):
        alone = expert_order(chosen[token : token + 1], 8)
        assert torch.equal(combine(y[token][alone.pair_X], alone)[0], combine(in_order, together)[token])


def test_any_layout_in(scattered: Callable[[Tensor], Tensor]) -> None:
    order = expert_order(random_choices(6, 2, 4), 4)
    x, y, plus = torch.randn(6, 3), torch.randn(12, 3), torch.randn(6, 3)
    strided = ExpertOrder(*map(scattered, order))
    assert torch.equal(dispatch(scattered(x), strided), dispatch(x, order))
    assert torch.equal(combine(scattered(y), strided, scattered(plus)), combine(y, order, plus))
