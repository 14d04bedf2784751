from __future__ import annotations

import pytest
import torch

from leadline.model.config import TINY
from leadline.model.hyper_connections import HyperConnection
from leadline.model.init import initialize
from leadline.model.segment import Segment
from leadline.model.transformer import Transformer
from leadline.ops.sinkhorn import sinkhorn
from leadline.weights.synthetic import few_layers


@pytest.fixture
def model() -> Transformer:
    model = Transformer(TINY)
    for tensor in model.state_dict().values():  # what is left untouched shows as NaN, or as an impossible expert
        tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    initialize(model, seed=3)
    return model


def test_every_tensor_is_filled(model):
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert bool(tensor.isfinite().all()), name
        else:
            assert bool(((tensor >= 0) & (tensor < TINY.n_routed_experts)).all()), name


def test_every_tensor_of_draft_stages_is_filled() -> None:
    model = Transformer(few_layers(TINY, TINY.num_hidden_layers, draft_stages=True))
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    initialize(model, seed=3)
    assert all(bool(tensor.isfinite().all()) for tensor in model.mtp.state_dict().values())


def test_the_same_seed_gives_the_same_model_and_another_differs(model):
    again, other = Transformer(TINY), Transformer(TINY)
    initialize(again, seed=3)
    initialize(other, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(model.embed.weight, other.embed.weight)
    hashed = "layers.0.ffn.gate.tid2eid"
    assert not torch.equal(model.state_dict()[hashed], other.state_dict()[hashed])


def test_matrices_have_the_std_of_their_width(model):
    for name in ("embed.weight", "head.weight", "layers.1.attn.wq_b.weight", "layers.2.ffn.experts.w1"):
        weight = model.state_dict()[name]
        assert weight.std().item() == pytest.approx(0.5 * weight.shape[-1] ** -0.5, rel=0.1), name


@torch.no_grad()
def test_every_block_starts_as_the_identity_on_equal_streams(model):
    segment = Segment.of(torch.randint(0, TINY.vocab_size, (40,)))
    streams_TSD = model(segment).streams_TSD
    embedded_TD = model.embed(segment.tokens_T)
    # equal copies in; comb's columns sum to 1, nothing is written: equal copies out
    torch.testing.assert_close(streams_TSD, embedded_TD[:, None].expand_as(streams_TSD), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_hyper_connections_start_near_the_identity(model):
    for module in model.modules():
        if isinstance(module, HyperConnection):
            _, _, post_TS, comb_TSS = module.mix_in(torch.randn(5, TINY.hc_mult, TINY.hidden_size))
            torch.testing.assert_close(post_TS, torch.ones_like(post_TS), rtol=0.05, atol=0)
            assert bool((comb_TSS.diagonal(dim1=1, dim2=2) > 0.9).all())
            start = sinkhorn(module.base[2 * TINY.hc_mult :].view(1, 4, 4), 20, 1e-6)
            torch.testing.assert_close(comb_TSS, start.expand_as(comb_TSS), rtol=0.2, atol=0.01)


def test_hash_tables_follow_the_token_frequencies():
    frequencies_V = 1.0 / torch.arange(1, TINY.vocab_size + 1)
    model = Transformer(TINY)
    initialize(model, seed=0, token_frequencies_V=frequencies_V)
    table = model.state_dict()["layers.0.ffn.gate.tid2eid"]
    load_E = torch.zeros(TINY.n_routed_experts).index_add_(
        0, table.flatten(), frequencies_V.repeat_interleave(TINY.num_experts_per_tok)
    )
    # the most frequent id alone is 16% of this text and cannot be divided further
    assert load_E.max() < 1.3 * load_E.mean()
    assert all(len(set(row)) == TINY.num_experts_per_tok for row in table.tolist())
