"""Mixture of experts against a loop over tokens and choices; the balance loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leadline.model.config import TINY
from leadline.model.moe import Experts, MoE, balance_loss
from leadline.model.segment import Segment
from leadline.ops.route import Route
from leadline.ops.token_permutation import expert_order

CONFIG = TINY.replace(
    hidden_size=8, moe_intermediate_size=6, n_routed_experts=5, num_experts_per_tok=2, swiglu_limit=1.0
)


def route_of(experts_TA: Tensor, weights_TA: Tensor, scores_TE: Tensor) -> Route:
    return Route(experts_TA, weights_TA, scores_TE, expert_order(experts_TA, scores_TE.shape[1]))


def random_moe(hashed: bool = False) -> MoE:
    moe = MoE(CONFIG, hashed)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    if moe.gate.bias is not None:
        moe.gate.bias.normal_(std=0.1)
    if moe.gate.tid2eid is not None:
        moe.gate.tid2eid.copy_(torch.rand(CONFIG.vocab_size, 5).argsort(1)[:, :2])
    return moe


def expert(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, weight: float) -> Tensor:
    gate, up = (w1.double() @ x.double()).clamp(max=1.0), (w3.double() @ x.double()).clamp(-1.0, 1.0)
    return w2.double() @ (torch.nn.functional.silu(gate) * up * weight)


@pytest.mark.parametrize("hashed", [False, True], ids=["score", "hash"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_shared_and_routed_experts(tokens: int, hashed: bool) -> None:
    moe = random_moe(hashed)
    x, ids = torch.randn(tokens, 8), torch.randint(0, CONFIG.vocab_size, (tokens,))
    out, signals = moe(x, Segment.of(ids))
    assert signals is None
    route = moe.gate(x, ids)
    shared, routed = moe.shared_experts, moe.experts
    for t in range(tokens):
        expected = expert(x[t], shared.w1.weight, shared.w2.weight, shared.w3.weight, 1.0)
        for number, weight in zip(route.experts_TA[t].tolist(), route.weights_TA[t].tolist(), strict=True):
            expected = expected + expert(x[t], routed.w1[number], routed.w2[number], routed.w3[number], weight)
        torch.testing.assert_close(out[t].double(), expected, rtol=1e-4, atol=1e-5)


def test_signals() -> None:
    moe, ids = random_moe(), torch.randint(0, CONFIG.vocab_size, (30,))
    x = torch.randn(30, 8)
    _, signals = moe(x, Segment.of(ids), training=True)
    assert signals is not None
    route = moe.gate(x, ids)
    assert signals.counts_E.tolist() == [int((route.experts_TA == number).sum()) for number in range(5)]
    assert signals.balance_loss.requires_grad
    _, hashed = random_moe(hashed=True)(x, Segment.of(ids), training=True)
    assert hashed is not None
    assert float(hashed.balance_loss) == 0
    assert not hashed.balance_loss.requires_grad
    assert hashed.counts_E.sum() == 60


def test_an_expert_without_tokens_gets_a_zero_gradient() -> None:
    experts = Experts(CONFIG)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    route = route_of(torch.tensor([[0, 3], [3, 1]]), torch.rand(2, 2), torch.rand(2, 5))
    x, shared = torch.randn(2, 8), torch.zeros(2, 8)
    experts(x, route, lambda: shared).sum().backward()
    assert route.order.counts_E.tolist() == [1, 1, 0, 2, 0]
    for weight in experts.parameters():
        assert weight.grad is not None
        assert not weight.grad[[2, 4]].any()
        assert weight.grad[[0, 1, 3]].flatten(1).any(1).all()


def balance_formula(route: Route, lengths: tuple[int, ...]) -> Tensor:
    """sum_i f_i P_i of each sequence, averaged over the tokens."""
    total, start = torch.zeros((), dtype=torch.float64), 0
    num_experts, choices = route.scores_TE.shape[1], route.experts_TA.shape[1]
    for length in lengths:
        rows = slice(start, start + length)
        for number in range(num_experts):
            f = num_experts / (choices * length) * int((route.experts_TA[rows] == number).sum())
            share = route.scores_TE[rows].double() / route.scores_TE[rows].double().sum(1, keepdim=True)
            total = total + length * f * share[:, number].mean()
        start += length
    return total / start


@pytest.mark.parametrize("lengths", [(1,), (3, 1, 4), (40,), (5,) * 5])
def test_balance_loss(lengths: tuple[int, ...]) -> None:
    tokens = sum(lengths)
    scores = torch.rand(tokens, 5, requires_grad=True)
    route = route_of(torch.rand(tokens, 5).argsort(1)[:, :2], torch.rand(tokens, 2), scores)
    segment = Segment(torch.zeros(tokens, dtype=torch.int64), lengths, (0,) * len(lengths), tuple(range(len(lengths))))
    loss, expected = balance_loss(route, segment), balance_formula(route, lengths)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    (found,), (wanted,) = torch.autograd.grad(loss, scores), torch.autograd.grad(expected, scores)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_balance_loss_of_a_balanced_sequence_is_one() -> None:
    """Equal scores, or equal counts: either makes it 1."""
    even = torch.tensor([[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]])
    weights = torch.rand(5, 2)
    for experts, scores in ((even, torch.rand(5, 5)), (torch.zeros_like(even), torch.full((5, 5), 0.3))):
        loss = balance_loss(route_of(experts, weights, scores), Segment.of([0] * 5))
        torch.testing.assert_close(loss, torch.tensor(1.0))


def test_balance_loss_grows_with_concentration() -> None:
    """Everything on two experts, in scores and in counts: E / A."""
    scores = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0]]).repeat(6, 1)
    loss = balance_loss(route_of(torch.tensor([[0, 1]]).repeat(6, 1), torch.rand(6, 2), scores), Segment.of([0] * 6))
    torch.testing.assert_close(loss, torch.tensor(2.5))


@pytest.mark.parametrize("hashed", [False, True], ids=["score", "hash"])
def test_routing_and_balance_ask_the_host_for_nothing(hashed: bool) -> None:
    """Tensors without data, as a graph capture sees them: whatever reads a number from the device fails."""
    moe = MoE(CONFIG, hashed).to("meta")
    ids = torch.randint(0, CONFIG.vocab_size, (30,)).to("meta")
    route = moe.gate(torch.empty(30, 8, device="meta"), ids)
    assert route.experts_TA.shape == (30, 2)
    segment = Segment(ids, (10, 20), past=(0, 0), slots=(0, 1))
    assert balance_loss(route, segment).shape == ()


@pytest.mark.gpu
@pytest.mark.parametrize("hashed", [False, True], ids=["score", "hash"])
@pytest.mark.parametrize("training", [True, False])
def test_the_host_waits_for_no_number(hashed: bool, training: bool) -> None:
    moe = MoE(TINY, hashed).to("cuda")
    for parameter in moe.parameters():
        parameter.data = torch.randn(parameter.shape, device="cuda").bfloat16()
    for buffer in moe.buffers():
        buffer.zero_()
    x = torch.randn(40, TINY.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=training)
    segment = Segment.of(torch.randint(0, TINY.vocab_size, (40,)), device="cuda")
    assert segment.sequence_T.is_cuda
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, signals = moe(x, segment, training)
        if signals is not None:
            (out.float().sum() + signals.balance_loss).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
