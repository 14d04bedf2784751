"""The kernels of routing against the reference: interpreted, and compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.dispatch import implementation
from leadline.ops.route import route

# tokens, choices, experts; up to 8 tokens are a single program
SIZES = [(1, 1, 1), (1, 6, 256), (3, 2, 5), (8, 6, 9), (9, 2, 4), (31, 6, 20), (0, 2, 4)]
GPU_SIZES = [(1, 6, 256), (5, 6, 256), (8, 6, 384), (9, 6, 256), (127, 6, 384), (4001, 6, 256), (0, 6, 256)]


def spread_logits(tokens: int, experts: int, device: str = "cpu") -> Tensor:
    """Every score far from all others, so that rounding changes no choice."""
    places = torch.rand(tokens, experts, device=device).argsort(1)
    return places * (8.0 / experts) - 4.0


def steps(experts: int, device: str = "cpu") -> Tensor:
    """A bias that puts every fourth expert first."""
    return (torch.arange(experts, device=device) % 4 == 1) * 10.0


def given_experts(tokens: int, choices: int, experts: int, device: str = "cpu") -> Tensor:
    return torch.rand(tokens, experts, device=device).argsort(1)[:, :choices]


def flat(logits: Tensor, bias: Tensor | None, table: Tensor | None, choices: int) -> tuple[Tensor, ...]:
    found = route(logits, bias, table, choices, 1.5)
    return *found[:3], *found.order


def check(
    size: tuple[int, int, int], given: bool, device: str, tolerance: float, against_reference: Callable[..., None]
) -> None:
    tokens, choices, experts = size
    logits = spread_logits(tokens, experts, device)
    if given:
        table = given_experts(*size, device)
        against_reference(lambda logits: flat(logits, None, table, choices), [logits], tolerance)
    else:
        bias = steps(experts, device)
        against_reference(lambda logits: flat(logits, bias, None, choices), [logits], tolerance)


@pytest.mark.interpret
@pytest.mark.parametrize("given", [False, True], ids=["picked", "given"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_interpreted(size: tuple[int, int, int], given: bool, against_reference: Callable[..., None]) -> None:
    check(size, given, "cpu", 2e-6, against_reference)


@pytest.mark.interpret
@pytest.mark.parametrize("tokens", [1, 9])
def test_hostile_logits(tokens: int) -> None:
    """Ties, both zeros, infinities and NaN: the picks of the reference, different experts that exist."""
    rows = torch.tensor(
        [
            [0.0, -0.0, 1.0, 1.0, 0.0],
            [-200.0, -150.0, -1e4, -200.0, -90.0],
            [float("nan"), 1.0, float("inf"), 2.0, float("-inf")],
            [float("nan")] * 5,
        ]
    )
    bias = torch.tensor([0.0, -0.0, 0.0, 0.0, -0.0])
    for row in rows:
        logits = row.repeat(tokens, 1)
        with implementation("kernel"):
            found = route(logits, bias, None, 3, 1.0)
        expected = route(logits, bias, None, 3, 1.0)
        assert torch.equal(found.experts_TA, expected.experts_TA)
        torch.testing.assert_close(found.weights_TA, expected.weights_TA, equal_nan=True)
        torch.testing.assert_close(found.scores_TE, expected.scores_TE, equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.interpret
@pytest.mark.parametrize("logit", [-1e4, -150.0, -85.0, -80.0, -20.0, 20.0, 1e4])
def test_gradients_of_extreme_logits(logit: float) -> None:
    gradients = []
    for name in ("kernel", "reference"):
        logits = torch.tensor([[logit, logit + 1.0, 0.3, logit - 1.0]]).requires_grad_()
        with implementation(name):
            found = route(logits, torch.zeros(4), None, 2, 1.0)
            loss = (found.weights_TA * torch.tensor([[1.0, -0.5]])).sum() + found.scores_TE.sum()
            gradients += torch.autograd.grad(loss, logits)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-12)


@pytest.mark.interpret
def test_any_layout_in(scattered: Callable[[Tensor], Tensor], against_reference: Callable[..., None]) -> None:
    bias, table = scattered(steps(6)), scattered(given_experts(5, 2, 6))
    against_reference(lambda logits: flat(logits, bias, None, 2), [scattered(spread_logits(5, 6))], 2e-6)
    against_reference(lambda logits: flat(logits, None, table, 2), [scattered(spread_logits(5, 6))], 2e-6)


@pytest.mark.interpret
def test_a_token_does_not_depend_on_its_neighbours() -> None:
    logits, bias = torch.randn(20, 9), torch.randn(9)
    with implementation("kernel"):
        together, alone = route(logits, bias, None, 3, 1.0), route(logits[7:8], bias, None, 3, 1.0)
    for all_tokens, one in zip(together[:3], alone[:3], strict=True):
        assert torch.equal(all_tokens[7:8], one)


@pytest.mark.gpu
@pytest.mark.parametrize("given", [False, True], ids=["picked", "given"])
@pytest.mark.parametrize("size", GPU_SIZES, ids=str)
def test_compiled(size: tuple[int, int, int], given: bool, against_reference: Callable[..., None]) -> None:
    check(size, given, "cuda", 5e-6, against_reference)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_order_of_equal_scores_compiled(tokens: int) -> None:
    logits = torch.randint(0, 3, (tokens, 256), device="cuda").float()
    bias = torch.zeros(256, device="cuda")
    with implementation("reference"):
        expected = route(logits, bias, None, 6, 1.0)
    found = route(logits, bias, None, 6, 1.0)
    assert torch.equal(found.experts_TA, expected.experts_TA)
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(found.order, expected.order, strict=True))
