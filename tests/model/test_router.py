"""The router: what the bias may and may not do, hash layers, and the balanced table."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.model.config import TINY, ModelConfig
from leadline.model.router import Gate, balanced_hash_table

CONFIG = TINY.replace(n_routed_experts=9, num_experts_per_tok=3, routed_scaling_factor=2.5)


def score_gate(config: ModelConfig = CONFIG) -> Gate:
    gate = Gate(config, hashed=False)
    torch.nn.init.normal_(gate.weight, std=0.3)
    assert gate.bias is not None
    gate.bias.normal_(std=0.2)
    return gate


def hash_gate(config: ModelConfig = CONFIG) -> Gate:
    gate = Gate(config, hashed=True)
    torch.nn.init.normal_(gate.weight, std=0.3)
    assert gate.tid2eid is not None
    gate.tid2eid.copy_(
        torch.rand(config.vocab_size, config.n_routed_experts).argsort(1)[:, : config.num_experts_per_tok]
    )
    return gate


def scores_of(gate: Gate, x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x.double() @ gate.weight.double().T)).sqrt()


@pytest.mark.parametrize("hashed", [False, True], ids=["score", "hash"])
def test_weights_are_the_chosen_scores_and_sum_to_the_route_scale(hashed: bool) -> None:
    gate = hash_gate() if hashed else score_gate()
    x, tokens = torch.randn(50, CONFIG.hidden_size), torch.randint(0, CONFIG.vocab_size, (50,))
    route = gate(x, tokens)
    scores = scores_of(gate, x)
    torch.testing.assert_close(route.scores_TE.double(), scores, rtol=1e-5, atol=1e-6)
    chosen = scores.gather(1, route.experts_TA)
    expected = chosen / chosen.sum(1, keepdim=True) * CONFIG.routed_scaling_factor
    torch.testing.assert_close(route.weights_TA.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(route.weights_TA.sum(1), torch.full((50,), CONFIG.routed_scaling_factor))
    assert all(len(set(experts)) == CONFIG.num_experts_per_tok for experts in route.experts_TA.tolist())


def test_the_bias_steers_the_choice_alone() -> None:
    gate, x, tokens = score_gate(), torch.randn(200, CONFIG.hidden_size), torch.zeros(200, dtype=torch.int64)
    assert gate.bias is not None
    before = gate(x, tokens)
    expected = (scores_of(gate, x) + gate.bias).topk(3, dim=1).indices
    assert torch.equal(before.experts_TA, expected)
    gate.bias[4] += 100.0
    after = gate(x, tokens)
    assert (after.experts_TA[:, 0] == 4).all(), "a large bias is always chosen"
    assert torch.equal(after.scores_TE, before.scores_TE)
    # its weight is still that of its score, which may be the smallest
    chosen = after.scores_TE.gather(1, after.experts_TA)
    torch.testing.assert_close(after.weights_TA, chosen / chosen.sum(1, keepdim=True) * CONFIG.routed_scaling_factor)
    gate.bias.add_(7.0)
    assert torch.equal(gate(x, tokens).experts_TA, after.experts_TA), "only differences of the bias count"


def test_the_bias_has_no_gradient_and_the_scores_have() -> None:
    gate, x = score_gate(), torch.randn(5, CONFIG.hidden_size, requires_grad=True)
    assert gate.bias is not None
    assert not gate.bias.requires_grad
    (gate(x, torch.zeros(5, dtype=torch.int64)).weights_TA * torch.randn(5, 3)).sum().backward()
    assert gate.weight.grad is not None
    assert gate.weight.grad.any()
    assert x.grad is not None
    assert x.grad.any()


def test_equal_scores_go_to_the_lower_expert() -> None:
    gate = score_gate()
    assert gate.bias is not None
    gate.bias.zero_()
    route = gate(torch.zeros(4, CONFIG.hidden_size), torch.zeros(4, dtype=torch.int64))
    assert route.experts_TA.tolist() == [[0, 1, 2]] * 4


def test_a_hash_layer_looks_at_the_token_alone() -> None:
    gate, tokens = hash_gate(), torch.randint(0, CONFIG.vocab_size, (30,))
    assert gate.tid2eid is not None
    routes = [gate(torch.randn(30, CONFIG.hidden_size), tokens) for _ in range(2)]
    for route in routes:
        assert torch.equal(route.experts_TA, gate.tid2eid[tokens])
    assert not torch.equal(routes[0].weights_TA, routes[1].weights_TA), "the weights are those of the hidden state"


@pytest.mark.parametrize("hashed", [False, True], ids=["score", "hash"])
@pytest.mark.parametrize("logit", [-1e4, -150.0, -20.0, 0.0, 20.0, 1e4])
def test_extreme_logits_stay_finite(hashed: bool, logit: float) -> None:
    """sqrt(softplus) underflows for very negative logits: no weight and no gradient may become NaN."""
    gate = hash_gate() if hashed else score_gate()
    x = torch.full((2, CONFIG.hidden_size), 1.0)
    with torch.no_grad():
        gate.weight.fill_(logit / CONFIG.hidden_size)
        gate.weight[5].mul_(0.5)
    x.requires_grad_()
    route = gate(x, torch.tensor([0, 1]))
    assert torch.isfinite(route.weights_TA).all()
    assert (route.weights_TA.sum(1) <= CONFIG.routed_scaling_factor * (1 + 1e-5)).all()
    grads = torch.autograd.grad((route.weights_TA * torch.randn(2, 3)).sum() + route.scores_TE.sum(), [x, gate.weight])
    assert all(torch.isfinite(grad).all() for grad in grads)


# -- the balanced table ----------------------------------------------------------------------------------------------


def loads(table: Tensor, frequencies: Tensor, num_experts: int) -> Tensor:
    """Tokens of the corpus that each expert gets."""
    load = torch.zeros(num_experts, dtype=torch.float64)
    return load.index_add_(0, table.flatten(), frequencies.double().repeat_interleave(table.shape[1]))


def modulo_table(vocabulary: int, num_experts: int, choices: int) -> Tensor:
    """Row i holds (choices x i + o) mod experts: it deals out ids, not tokens."""
    return (torch.arange(vocabulary)[:, None] * choices + torch.arange(choices)) % num_experts


@settings(max_examples=40)
@given(
    frequencies=st.lists(st.integers(0, 10**6), min_size=1, max_size=60),
    num_experts=st.integers(1, 12),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_balanced_table(frequencies: list[int], num_experts: int, seed: int, data: st.DataObject) -> None:
    """Different experts in every row, and no two loads further apart than one id's tokens."""
    choices = data.draw(st.integers(1, num_experts))
    counts = torch.tensor(frequencies)
    table = balanced_hash_table(counts, num_experts, choices, seed)
    assert table.shape == (len(frequencies), choices)
    assert table.dtype == torch.int64
    assert all(len(set(row)) == choices and 0 <= min(row) <= max(row) < num_experts for row in table.tolist())
    load = loads(table, counts, num_experts)
    assert load.max() - load.min() <= max(frequencies) + 2
    assert torch.equal(balanced_hash_table(counts, num_experts, choices, seed), table)


def test_better_than_dealing_out_ids() -> None:
    """A text by Zipf's law, as real ones are: the fullest expert is nearly as full as the mean."""
    vocabulary, num_experts, choices = 2000, 16, 2
    frequencies = 1e6 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    frequencies = frequencies[torch.randperm(vocabulary)]
    mean = float(frequencies.sum()) * choices / num_experts
    balanced = loads(balanced_hash_table(frequencies, num_experts, choices, 0), frequencies, num_experts).max()
    modulo = loads(modulo_table(vocabulary, num_experts, choices), frequencies, num_experts).max()
    assert balanced < 1.1 * mean
    assert modulo > 1.3 * mean


def test_unseen_ids_are_dealt_out_too() -> None:
    frequencies = torch.zeros(1600)
    frequencies[:10] = 1000
    table = balanced_hash_table(frequencies, 16, 2, 0)
    ids = torch.bincount(table[10:].flatten(), minlength=16)
    assert ids.max() <= 2 * ids.float().mean(), "an unseen id may turn up in other texts"


def test_seeds_give_different_tables() -> None:
    tables = [balanced_hash_table(torch.ones(500), 8, 2, seed) for seed in range(2)]
    assert not torch.equal(tables[0], tables[1])
    assert math.isclose(float((tables[0] == tables[1]).float().mean()), 1 / 8, abs_tol=0.1)
