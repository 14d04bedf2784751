"""Composite gain of the residual mixing: products in the right order, both kinds of sums, and the model left alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leadline.model.block import Block
from leadline.model.config import TINY
from leadline.model.hyper_connections import HyperConnection
from leadline.model.init import COMB_DIAGONAL, initialize
from leadline.model.segment import Segment
from leadline.model.transformer import Transformer
from leadline.ops.sinkhorn import sinkhorn
from leadline.train.gain import Curve, gain_under_drift, measure_gain

NUM_SUBLAYERS = 2 * TINY.num_hidden_layers


@pytest.fixture
def model() -> Transformer:
    model = Transformer(TINY)
    initialize(model, seed=0)
    return model


def connections(model: Transformer) -> list[HyperConnection]:
    """Every trunk sublayer, from the bottom."""
    blocks = [block for block in model.layers if isinstance(block, Block)]
    return [connection for block in blocks for connection in (block.hc_attn, block.hc_ffn)]


def segment() -> Segment:
    return Segment.of(torch.randint(0, TINY.vocab_size, (20,)), torch.randint(0, TINY.vocab_size, (3,)))


def leave_the_start(model: Transformer) -> None:
    for connection in connections(model):
        connection.base.data += 0.5 * torch.randn_like(connection.base)
        connection.fn.data += 0.3 * torch.randn_like(connection.fn)
        connection.scale.data.fill_(0.3)


def test_gain_is_the_product_from_the_bottom_up(model):
    """Mixing matrices that no token changes: the gains are those of a product that can be written down."""
    logits = [torch.randn(4, 4, dtype=torch.float64) for _ in range(NUM_SUBLAYERS)]
    for connection, logits_SS in zip(connections(model), logits, strict=True):
        connection.fn.data.zero_()
        connection.base.data[8:] = logits_SS.float().flatten()
    gain = measure_gain(model, segment())

    free_SS, mixed_SS = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    for sublayer, logits_SS in enumerate(logits):
        free_SS = (logits_SS.exp() / (math.exp(COMB_DIAGONAL) + 3)).T @ free_SS
        mixed_SS = sinkhorn(logits_SS.float()[None], TINY.hc_sinkhorn_iters, TINY.hc_eps)[0].double().T @ mixed_SS
        for curve, expected_SS in ((gain.unconstrained, free_SS), (gain.constrained, mixed_SS)):
            assert curve.forward[sublayer] == pytest.approx(float(expected_SS.sum(1).max()), rel=1e-4)
            assert curve.backward[sublayer] == pytest.approx(float(expected_SS.sum(0).max()), rel=1e-4)
    assert len(gain.constrained.forward) == len(gain.unconstrained.backward) == NUM_SUBLAYERS
    assert gain.unconstrained.forward[-1] != pytest.approx(gain.unconstrained.backward[-1], rel=1e-3)


def test_constrained_gain_is_that_of_the_matrices_that_mix(model):
    """Logits that depend on the token: compared with the comb that each sublayer returns for its streams."""
    leave_the_start(model)
    tokens, combs = segment(), []
    for connection in connections(model):

        def mix_in(x_TSD, norm=None, original=connection.mix_in):
            parts = original(x_TSD, norm)
            combs.append(parts[3].double())
            return parts

        connection.mix_in = mix_in
    gain = measure_gain(model, tokens)
    composite_TSS = torch.eye(4, dtype=torch.float64)
    for sublayer, comb_TSS in enumerate(combs):
        composite_TSS = torch.einsum("tjk,tji->tki", comb_TSS, composite_TSS.expand_as(comb_TSS))
        backward = composite_TSS.sum(1).amax(-1).mean()
        assert gain.constrained.backward[sublayer] == pytest.approx(float(backward), rel=1e-5)
    assert len(combs) == NUM_SUBLAYERS
    assert gain.constrained.backward[-1] > 1.0001


def test_both_kinds_start_at_one(model):
    gain = measure_gain(model, segment())
    for curve in (gain.constrained, gain.unconstrained):
        assert curve.forward == pytest.approx([1.0] * NUM_SUBLAYERS, abs=0.02)
        assert curve.backward == pytest.approx([1.0] * NUM_SUBLAYERS, abs=0.02)


def test_measuring_leaves_the_model_as_it_was(model):
    leave_the_start(model)
    tokens = segment()
    with torch.no_grad():
        before = model(tokens).streams_TSD
        measure_gain(model, tokens)
        torch.testing.assert_close(model(tokens).streams_TSD, before, rtol=0, atol=0)
    assert not any("mix_in" in vars(connection) for connection in connections(model))


def test_a_failing_forward_leaves_the_model_as_it_was(model):
    tokens = segment()
    tokens.tokens_T[0] = TINY.vocab_size  # no such row in the embedding
    with pytest.raises(IndexError):
        measure_gain(model, tokens)
    assert not any("mix_in" in vars(connection) for connection in connections(model))


@pytest.mark.parametrize(("sigma", "unconstrained_at_least"), [(0.1, 1.5), (0.3, 20.0), (1.0, 1e9)])
def test_drift_over_64_sublayers(sigma, unconstrained_at_least):
    """The mHC paper's contrast: about 1.6 at most, or out of hand."""
    gain = gain_under_drift(sigma)
    assert len(gain.constrained.forward) == 64
    assert gain.constrained.largest < 1.6
    assert gain.unconstrained.forward[-1] > unconstrained_at_least
    assert gain.unconstrained.backward[-1] > unconstrained_at_least


def test_no_drift_is_a_plain_residual_connection():
    gain = gain_under_drift(0.0, draws=2)
    for curve in (gain.constrained, gain.unconstrained):
        assert curve.forward + curve.backward == pytest.approx([1.0] * 128, abs=1e-3)


@settings(max_examples=25)
@given(
    sigma=st.floats(0, 3),
    diagonal=st.floats(-2, 8),
    streams=st.integers(1, 6),
    sublayers=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_forward_gain_is_one_whatever_the_logits(sigma, diagonal, streams, sublayers, seed):
    """Sinkhorn ends on the columns of comb, which are the rows of the mixing: they sum to 1 exactly, up to eps."""
    gain = gain_under_drift(sigma, diagonal=diagonal, streams=streams, sublayers=sublayers, draws=8, seed=seed)
    assert gain.constrained.forward == pytest.approx([1.0] * sublayers, abs=1e-3)
    assert all(1 - 1e-3 <= backward <= streams for backward in gain.constrained.backward)


def test_largest_is_over_both_directions_and_all_depths():
    assert Curve((1.0, 3.0, 2.0), (1.0, 1.0, 2.5)).largest == 3.0
    assert Curve((1.0, 1.0), (1.0, 4.0)).largest == 4.0
