from __future__ import annotations

import pytest
import torch

from leadline.model.config import TINY
from leadline.model.init import initialize
from leadline.model.segment import Segment
from leadline.model.signals import Training
from leadline.model.transformer import Transformer
from leadline.optim.clip import NonFiniteGradientError
from leadline.optim.groups import build_optimizers
from leadline.train.balance import moe_layers, update_selection_bias
from leadline.train.health import NonFiniteLossError
from leadline.train.losses import LossWeights
from leadline.train.step import train_step


@pytest.fixture
def model() -> Transformer:
    model = Transformer(TINY)
    initialize(model, seed=0)
    return model


def batches(count: int, seed: int = 0) -> list[tuple[Segment, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 16, (65,), generator=generator) for _ in range(count)]
    return [(Segment.of(row[:-1]), row[1:]) for row in rows]


def update(model: Transformer, optimizers, microbatches):
    return train_step(
        model,
        optimizers,
        microbatches,
        weights=LossWeights(),
        training=Training(recall_queries=8),
        clip_norm=1.0,
        bias_speed=0.01,
    )


def test_repeated_steps_learn_a_batch_by_heart(model):
    optimizers = build_optimizers(model.named_parameters(), TINY, 1e-2)
    losses = [update(model, optimizers, batches(1)).next_token for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


def test_gradients_of_microbatches_are_averaged(model):
    both = batches(2)
    separate = []
    for batch in both:
        fresh = Transformer(TINY)
        fresh.load_state_dict(model.state_dict())
        train_step(fresh, [], [batch], weights=LossWeights(), training=Training(), clip_norm=1e9, bias_speed=0.0)
        separate.append(dict(fresh.named_parameters()))
    train_step(model, [], both, weights=LossWeights(), training=Training(), clip_norm=1e9, bias_speed=0.0)
    for name, parameter in model.named_parameters():
        grads = [named[name].grad for named in separate]
        mean = sum(g for g in grads if g is not None) / 2
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, mean, rtol=1e-4, atol=1e-7)


def test_selection_bias_moves_against_the_load(model):
    counts_LE = torch.zeros(len(moe_layers(model)), TINY.n_routed_experts, dtype=torch.int64)
    counts_LE[:, 0] = 8
    update_selection_bias(model, counts_LE, 0.5)
    for moe in moe_layers(model):
        if moe.gate.bias is None:
            assert moe.hashed
        else:
            assert moe.gate.bias.tolist() == [-0.5] + [0.5] * (TINY.n_routed_experts - 1)
    assert sum(moe.hashed for moe in moe_layers(model)) == TINY.num_hash_layers


def test_a_bad_weight_stops_the_step_by_name_before_any_change(model):
    with torch.no_grad():
        model.get_parameter("layers.2.attn.wkv.weight")[3, 5] = float("nan")
    optimizers = build_optimizers(model.named_parameters(), TINY, 1e-2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(NonFiniteLossError, match=r"layers\.2\.attn\.wkv\.weight: 1 of"):
        update(model, optimizers, batches(1))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


def test_an_overflow_inside_names_the_module(model):
    with torch.no_grad():
        model.get_parameter("layers.1.attn.wq_a.weight").fill_(3e38)  # finite, but its products are not
    with pytest.raises(NonFiniteLossError, match=r"layers\.1\.attn\.wq_a: \d+ of \d+ values of its output"):
        update(model, [], batches(1))


def test_a_bad_gradient_stops_the_step_by_name(model):
    model.get_parameter("layers.0.ffn.shared_experts.w1.weight").register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteGradientError, match=r"layers\.0\.ffn\.shared_experts\.w1\.weight"):
        update(model, [], batches(1))


def test_clipping_and_bias_are_reported(model):
    result = train_step(
        model, [], batches(1), weights=LossWeights(), training=Training(), clip_norm=1e-3, bias_speed=0.25
    )
    assert result.grad_norm > 1e-3
    assert result.clip_scale == pytest.approx(1e-3 / result.grad_norm)
    clipped = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
    assert clipped == pytest.approx(1e-3, rel=1e-3)
    assert result.bias_largest == 0.25


def test_microbatches_side_by_side_give_the_same_bits(model):
    def step(threads: int) -> dict[str, torch.Tensor]:
        fresh = Transformer(TINY)
        fresh.load_state_dict(model.state_dict())
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            update(fresh, build_optimizers(fresh.named_parameters(), TINY, 1e-2), batches(3))
        finally:
            torch.set_num_threads(before)
        return fresh.state_dict()

    alone, together = step(1), step(3)
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_a_bad_weight_is_named_from_a_side_thread_too(model):
    with torch.no_grad():
        model.get_parameter("layers.2.attn.wkv.weight")[3, 5] = float("nan")
    torch.set_num_threads(2)
    try:
        with pytest.raises(NonFiniteLossError, match=r"layers\.2\.attn\.wkv\.weight: 1 of"):
            update(model, [], batches(2))
    finally:
        torch.set_num_threads(1)
