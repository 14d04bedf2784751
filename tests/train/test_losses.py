from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from leadline.model.config import TINY
from leadline.model.init import initialize
from leadline.model.segment import Segment
from leadline.model.signals import Training
from leadline.model.transformer import Transformer
from leadline.train.losses import LossWeights, compute_losses, second_targets

LENGTHS = (70, 1, 57)


@pytest.fixture
def model() -> Transformer:
    model = Transformer(TINY)
    initialize(model, seed=1)
    with torch.no_grad():  # move away from the identity of the start, so that every path matters
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def batch() -> tuple[Segment, torch.Tensor]:
    rows = [torch.randint(0, TINY.vocab_size, (n + 1,)) for n in LENGTHS]
    return Segment.of(*(row[:-1] for row in rows)), torch.cat([row[1:] for row in rows])


def test_second_targets_stay_inside_their_sequence(batch):
    segment, targets_T = batch
    second_T = second_targets(segment, targets_T)
    for start, length in zip(segment.starts, LENGTHS, strict=True):
        inside = targets_T[start : start + length]
        assert second_T[start : start + length].tolist() == [*inside[1:].tolist(), -1]


def test_second_targets_skip_unknown_targets():
    segment = Segment.of([1, 2, 3, 4])
    assert second_targets(segment, torch.tensor([5, 6, 7, -1])).tolist() == [6, 7, -1, -1]


def test_next_token_loss_is_the_mean_over_scored_tokens(model, batch):
    segment, targets_T = batch
    targets_T = targets_T.clone()
    targets_T[3] = -1
    losses = compute_losses(model, segment, targets_T, LossWeights(), Training())
    logits = model.logits(model.hidden(model(segment).streams_TSD))
    assert losses.next_token.item() == pytest.approx(
        F.cross_entropy(logits, targets_T, ignore_index=-1).item(), rel=1e-5
    )
    assert losses.scored_tokens == sum(LENGTHS) - 1
    assert losses.nll_sum.item() == pytest.approx(losses.next_token.item() * losses.scored_tokens, rel=1e-5)


def test_extra_token_loss_is_that_of_the_mtp_block(model, batch):
    segment, targets_T = batch
    losses = compute_losses(model, segment, targets_T, LossWeights(), Training())
    hidden_TD, _ = model.predict_second(model(segment), targets_T)
    expected = F.cross_entropy(model.logits(hidden_TD), second_targets(segment, targets_T), ignore_index=-1)
    assert losses.extra_token.item() == pytest.approx(expected.item(), rel=1e-5)


def test_total_is_the_weighted_sum(model, batch):
    segment, targets_T = batch
    weights = LossWeights(mtp=0.7, balance=0.11, index=0.3)
    losses = compute_losses(model, segment, targets_T, weights, Training())
    expected = losses.next_token + 0.7 * losses.extra_token + 0.11 * losses.balance + 0.3 * losses.indexer
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert all(math.isfinite(x.item()) and x.item() > 0 for x in (losses.extra_token, losses.balance, losses.indexer))


def test_every_parameter_receives_a_gradient(model, batch):
    segment, targets_T = batch
    compute_losses(model, segment, targets_T, LossWeights(), Training()).total.backward()
    # A segment of 128 tokens per sequence at most makes no ratio-128 entry: that compressor is out of reach here.
    silent = {name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())}
    assert {name for name in silent if ".attn.compressor." not in name or not name.startswith("layers.2.")} == set()


def test_experts_are_counted_for_every_block(model, batch):
    segment, targets_T = batch
    losses = compute_losses(model, segment, targets_T, LossWeights(), Training())
    blocks = TINY.num_hidden_layers + TINY.num_nextn_predict_layers
    assert losses.counts_LE.shape == (blocks, TINY.n_routed_experts)
    assert losses.counts_LE.sum(1).tolist() == [sum(LENGTHS) * TINY.num_experts_per_tok] * blocks


def test_a_model_without_mtp_has_no_extra_token_loss(batch):
    segment, targets_T = batch
    model = Transformer(TINY, with_mtp=False)
    initialize(model, seed=0)
    assert compute_losses(model, segment, targets_T, LossWeights(), Training()).extra_token.item() == 0
