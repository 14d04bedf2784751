"""What training adds: the indexer's loss reaches the indexer alone, recomputation changes nothing, recall."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.model.config import TINY, ModelConfig
from leadline.model.segment import Segment
from leadline.model.signals import IndexerSignals, Training
from leadline.model.transformer import Output, Transformer

RandomModel = Callable[[ModelConfig, int], Transformer]
MODES = pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])


def packed(lengths: tuple[int, ...] = (150, 3, 1, 40)) -> Segment:
    generator = torch.Generator().manual_seed(1)
    return Segment.of(*(torch.randint(0, TINY.vocab_size, (length,), generator=generator) for length in lengths))


def indexer_signals(output: Output) -> list[IndexerSignals]:
    return [signals.indexer for signals in output.signals if signals.indexer is not None]


def index_loss(output: Output) -> Tensor:
    return torch.stack([signals.kl for signals in indexer_signals(output)]).sum()


def language_loss(model: Transformer, output: Output) -> Tensor:
    """Any function of the logits that all of them move."""
    return model.logits(model.hidden(output.streams_TSD)).logsumexp(-1).mean()


def gradients(model: Transformer, loss: Tensor) -> dict[str, Tensor]:
    """Gradients that are not zero, by name."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if not n.startswith("mtp.")), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None and grad.any()}


@MODES
def test_every_loss_has_its_own_parameters(random_model: RandomModel, dense: bool) -> None:
    """The indexer's loss moves every tensor of the indexers and no other; the language loss every other tensor and none
    of the indexers."""
    model = random_model(TINY, 0)
    output = model(packed(), training=Training(dense=dense))
    names = {name for name, _ in model.named_parameters() if not name.startswith("mtp.")}
    of_indexers = {name for name in names if ".indexer." in name}
    assert len(of_indexers) == 2 * 6
    from_index, from_language = gradients(model, index_loss(output)), gradients(model, language_loss(model, output))
    assert set(from_index) == of_indexers
    assert set(from_language) == names - of_indexers
    assert all(torch.isfinite(grad).all() for grad in (*from_index.values(), *from_language.values()))


def test_signals_by_kind_of_layer(random_model: RandomModel) -> None:
    output = random_model(TINY, 0)(packed(), training=Training(recall_queries=4))
    assert [signals.indexer is not None for signals in output.signals] == [ratio == 4 for ratio in TINY.layer_ratios]
    hashed = [TINY.is_hash_layer(layer) for layer in range(TINY.num_hidden_layers)]
    assert [not signals.experts.balance_loss.requires_grad for signals in output.signals] == hashed
    for signals in output.signals:
        assert int(signals.experts.counts_E.sum()) == packed().num_tokens * TINY.num_experts_per_tok


@torch.no_grad()
def test_training_sees_what_inference_sees(random_model: RandomModel) -> None:
    """The sparse training forward is the ordinary forward; only dense warm-up attends to more."""
    model, segment = random_model(TINY, 0), packed()
    plain = model(segment)
    assert plain.signals == []
    assert torch.equal(model(segment, training=Training()).streams_TSD, plain.streams_TSD)
    dense = model(segment, training=Training(dense=True)).streams_TSD
    assert not torch.allclose(dense, plain.streams_TSD, atol=1e-3)


@torch.no_grad()
def test_dense_is_picking_everything(random_model: RandomModel) -> None:
    everything = TINY.replace(index_topk=1000)
    model, segment = random_model(TINY, 0), packed()
    wide = Transformer(everything)
    wide.load_state_dict(model.state_dict())
    dense = model(segment, training=Training(dense=True)).streams_TSD
    torch.testing.assert_close(dense, wide(segment).streams_TSD, rtol=1e-5, atol=1e-5)


@MODES
def test_recomputation_changes_no_bit(random_model: RandomModel, dense: bool) -> None:
    """Streams, signals and gradients of both losses."""
    model, results = random_model(TINY, 0), []
    for recompute in (False, True):
        output = model(packed(), training=Training(dense=dense, recall_queries=8, recompute=recompute))
        balance = torch.stack([signals.experts.balance_loss for signals in output.signals]).sum()
        grads = gradients(model, language_loss(model, output) + index_loss(output) + balance)
        signals = [tensor for s in indexer_signals(output) for tensor in (s.kl, s.recall)]
        results.append(([output.streams_TSD, *signals], grads))
    (plain, plain_grads), (again, again_grads) = results
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert plain_grads.keys() == again_grads.keys()
    assert all(torch.equal(plain_grads[name], again_grads[name]) for name in plain_grads)


@MODES
def test_recall_is_a_share(random_model: RandomModel, dense: bool) -> None:
    """Of every measured query with a choice, in (0, 1]; picking more cannot lower it."""
    model, segment = random_model(TINY, 0), packed((3, 40, 1, 150))
    recalls = []
    for topk in (1, 4, 16):
        narrow = Transformer(TINY.replace(index_topk=topk))
        narrow.load_state_dict(model.state_dict())
        with torch.no_grad():
            first_csa = indexer_signals(narrow(segment, training=Training(dense=dense, recall_queries=10_000)))[0]
        assert (first_csa.recall > 0).all()
        assert (first_csa.recall <= 1 + 1e-6).all()
        # visible entries must outnumber the picks: positions from 4 (topk + 1) - 1 on, in each sequence
        measured = sum(max(0, length - (4 * (topk + 1) - 1)) for length in segment.lengths)
        assert len(first_csa.recall) == measured
        recalls.append(first_csa.recall[-20:].mean())
    assert recalls == sorted(recalls)


def test_recall_asks_for_a_choice(random_model: RandomModel) -> None:
    """Where everything visible is picked the recall is 1 by construction, and not measured."""
    model = random_model(TINY.replace(index_topk=40), 0)
    for signals in indexer_signals(model(packed(), training=Training(recall_queries=1000))):
        assert signals.recall.shape == (0,)
    for signals in indexer_signals(random_model(TINY, 0)(packed(), training=Training())):
        assert signals.recall.shape == (0,), "not asked for"


@pytest.mark.parametrize("queries", [1, 3, 7, 194, 500])
def test_recall_queries_are_spread_over_the_segment(random_model: RandomModel, queries: int) -> None:
    with torch.no_grad():
        output = random_model(TINY.replace(index_topk=1), 0)(packed((194,)), training=Training(recall_queries=queries))
    for signals in indexer_signals(output):
        assert len(signals.recall) <= min(queries, 194)
        assert len(signals.recall) >= min(queries, 180) - queries // 20 - 1


@MODES
def test_the_loss_is_the_mean_over_queries_that_see_an_entry(random_model: RandomModel, dense: bool) -> None:
    """Sequences too short for an entry do not dilute it."""
    model = random_model(TINY, 0)
    alone = indexer_signals(model(packed((150,)), training=Training(dense=dense)))
    long_sequence = packed((150,)).tokens_T
    with_short = Segment.of(long_sequence, [5, 6, 7], [9], [8, 8])
    together = indexer_signals(model(with_short, training=Training(dense=dense)))
    for one, both in zip(alone, together, strict=True):
        torch.testing.assert_close(both.kl, one.kl, rtol=1e-4, atol=1e-5)


@MODES
def test_no_entry_no_loss(random_model: RandomModel, dense: bool) -> None:
    model = random_model(TINY, 0)
    output = model(packed((3, 1, 2)), training=Training(dense=dense, recall_queries=3))
    assert index_loss(output) == 0
    assert gradients(model, index_loss(output)) == {}
    assert all(torch.isfinite(grad).all() for grad in gradients(model, language_loss(model, output)).values())


def test_the_indexer_learns(random_model: RandomModel) -> None:
    """A few steps on its own loss bring it near the attention it imitates, and its picks keep more of the mass."""
    model, segment = random_model(TINY.replace(index_topk=4), 0), packed((120, 60))
    parameters = [p for name, p in model.named_parameters() if ".indexer." in name]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    history = []
    for _ in range(25):
        output = model(segment, training=Training(dense=True, recall_queries=200))
        loss = index_loss(output)
        history.append((float(loss.detach()), float(torch.cat([s.recall for s in indexer_signals(output)]).mean())))
        optimizer.zero_grad()
        torch.autograd.backward(loss, inputs=parameters)
        optimizer.step()
    (first_loss, first_recall), (last_loss, last_recall) = history[0], history[-1]
    assert last_loss < 0.6 * first_loss
    assert last_recall > first_recall + 0.1
