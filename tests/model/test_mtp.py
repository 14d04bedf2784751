"""The MTP block: what goes in, what it shares, what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from leadline.model.config import TINY, ModelConfig
from leadline.model.segment import Segment
from leadline.model.transformer import Output, Transformer

RandomModel = Callable[[ModelConfig, int], Transformer]


def test_the_collapsed_state_is_refused(random_model: RandomModel) -> None:
    """It takes the streams before their collapse; a [T, D] vector has lost what it needs."""
    model, segment = random_model(TINY, 0), Segment.of([1, 2, 3])
    output = model(segment)
    collapsed = Output(model.hidden(output.streams_TSD), output.index, [])
    with pytest.raises(ValueError, match=r"\[T, S, D\] before their collapse, got \(3, 64\)"):
        model.predict_second(collapsed, torch.tensor([2, 3, 4]))


def test_a_model_without_its_block_says_so() -> None:
    model = Transformer(TINY, with_mtp=False)
    assert not model.mtp
    output = Output(torch.zeros(1, TINY.hc_mult, TINY.hidden_size), model.index(Segment.of([1]), None), [])
    with pytest.raises(ValueError, match="without its MTP block"):
        model.predict_second(output, torch.tensor([1]))


@torch.no_grad()
def test_it_depends_on_streams_and_next_tokens(random_model: RandomModel) -> None:
    """Position i sees the next tokens up to i + 1 and no later one; every stream counts. (Every token visits all
    experts here, so that other tokens cannot change the shape of a matrix product.)"""
    config = TINY.replace(n_routed_experts=3, num_experts_per_tok=3)
    model, tokens = random_model(config, 0), torch.arange(20)
    output = model(Segment.of(tokens))
    base, _ = model.predict_second(output, tokens + 1)
    following = tokens + 1
    following[12] = 200
    changed, _ = model.predict_second(output, following)
    assert torch.equal(base[:12], changed[:12])
    assert not torch.isclose(base[12], changed[12]).all()
    for stream in range(TINY.hc_mult):
        streams = output.streams_TSD.clone()
        streams[5, stream] += 1.0
        moved, _ = model.predict_second(Output(streams, output.index, []), tokens + 1)
        assert torch.equal(base[:5], moved[:5])
        assert not torch.isclose(base[5], moved[5]).all()


def test_embedding_and_head_are_the_trunks(random_model: RandomModel) -> None:
    """The block has no table of its own, and its loss moves the trunk's."""
    model, tokens = random_model(TINY, 0), torch.arange(20)
    assert not any("embed" in name or ".head." in name for name, _ in model.mtp.named_parameters())
    hidden, _ = model.predict_second(model(Segment.of(tokens)), tokens + 1)
    model.logits(hidden).square().mean().backward()
    assert model.embed.weight.grad is not None
    assert model.embed.weight.grad[1:21].any(1).all()
    assert not model.embed.weight.grad[21:].any()
    assert model.head.weight.grad is not None
    assert model.norm.weight.grad is None, "the trunk's last norm is not on the way"


def test_gradient_reaches_every_parameter_of_the_block(random_model: RandomModel) -> None:
    model, tokens = random_model(TINY, 0), torch.arange(200) % 250
    hidden, _ = model.predict_second(model(Segment.of(tokens)), tokens + 1)
    model.logits(hidden).logsumexp(-1).sum().backward()
    for name, parameter in model.mtp.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
