"""Tokens to experts and back, against loops over tokens and choices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.token_permutation import combine, dispatch, expert_order

SIZES = [(1, 1, 1), (3, 2, 4), (4, 4, 4), (5, 3, 7), (127, 2, 3), (128, 1, 200), (129, 6, 8), (0, 2, 4)]


def random_choices(tokens: int, choices: int, experts: int) -> Tensor:
    """Different experts for each token, as a router picks them."""
    return torch.rand(tokens, experts).argsort(1)[:, :choices]


@pytest.mark.parametrize(("tokens", "choices", "experts"), SIZES)
def test_order(tokens: int, choices: int, experts: int) -> None:
    chosen = random_choices(tokens, choices, experts)
    order, counts = expert_order(chosen, experts)
    pairs = [(token, choice) for token in range(tokens) for choice in range(choices)]
    expected = sorted(pairs, key=lambda pair: (int(chosen[pair]), pair))
    assert order.tolist() == [token * choices + choice for token, choice in expected]
    assert counts.tolist() == [int((chosen == expert).sum()) for expert in range(experts)]


@pytest.mark.parametrize(("tokens", "choices", "experts"), SIZES)
def test_values(tokens: int, choices: int, experts: int) -> None:
    order, _ = expert_order(random_choices(tokens, choices, experts), experts)
    x, y = torch.randn(tokens, 5), torch.randn(tokens * choices, 5)
    sent = dispatch(x, order, choices)
    assert torch.equal(sent, x[torch.tensor([pair // choices for pair in order.tolist()], dtype=torch.int64)])
    expected = torch.zeros(tokens, 5, dtype=torch.float64)
    for row, pair in enumerate(order.tolist()):
        expected[pair // choices] += y[row].double()
    torch.testing.assert_close(combine(y, order, choices).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "choices", "experts"), [(4, 2, 3), (3, 1, 5), (5, 3, 3)])
def test_gradcheck(tokens: int, choices: int, experts: int) -> None:
    order, _ = expert_order(random_choices(tokens, choices, experts), experts)
    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(tokens * choices, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dispatch(x, order, choices), (x,))
    assert torch.autograd.gradcheck(lambda y: combine(y, order, choices), (y,))


def test_there_and_back_multiplies_by_the_choices() -> None:
    order, _ = expert_order(random_choices(7, 3, 4), 4)
    x = torch.randn(7, 2)
    torch.testing.assert_close(combine(dispatch(x, order, 3), order, 3), 3 * x)


def test_low_precision_sums_in_float32() -> None:
    """256 + 1 is no bf16 number: a bf16 sum would lose the ones."""
    order, _ = expert_order(torch.tensor([[0, 1, 2, 3]]), 4)
    y = torch.tensor([[256.0], [1.0], [1.0], [1.0]]).bfloat16()
    total = combine(y, order, 4)
    assert total.dtype == torch.float32
    assert total.item() == 259.0


def test_the_sum_does_not_depend_on_the_other_tokens() -> None:
    """A token's own rows, in the order of its choices: bitwise the same whoever travels along."""
    chosen, y = random_choices(50, 4, 8), torch.randn(50, 4, 3)
    together, _ = expert_order(chosen, 8)
    in_order = y.flatten(0, 1)[together]
    for token in range(0, 50, 7):
        alone, _ = expert_order(chosen[token : token + 1], 8)
        assert torch.equal(combine(y[token][alone], alone, 4)[0], combine(in_order, together, 4)[token])


def test_any_layout_in(scattered: Callable[[Tensor], Tensor]) -> None:
    order, _ = expert_order(random_choices(6, 2, 4), 4)
    x, y = torch.randn(6, 3), torch.randn(12, 3)
    assert torch.equal(dispatch(scattered(x), scattered(order), 2), dispatch(x, order, 2))
    assert torch.equal(combine(scattered(y), scattered(order), 2), combine(y, order, 2))
