"""The loader: an epoch is every prediction once, epochs differ, and any interruption resumes bitwise."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leadline.data.corpus import Document
from leadline.data.loader import Batch, Loader, LoaderError, single_pass
from leadline.data.shards import ShardError, Shards, build_shards
from leadline.text.tokenizer import Tokenizer

WORDS = ["deep", "line", "sailor", "sounding", "mark", "lead", "水深", "été"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(WORDS) * 5], vocab_size=320)


@pytest.fixture(scope="module")
def shards(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    random = np.random.default_rng(0)
    # Lengths from an empty document to several times the batch; texts differ, so that documents can be told apart.
    texts = [f"{n} " + " ".join(random.choice(WORDS, size=int(random.exponential(25)))) for n in range(60)]
    documents = [Document(text, "") for text in [*texts, ""]]
    return build_shards(documents, tmp_path_factory.mktemp("shards"), tokenizer, source="test", shard_bytes=1000)


def equal(left: Batch, right: Batch) -> bool:
    return (
        torch.equal(left.segment.tokens_T, right.segment.tokens_T)
        and torch.equal(left.targets_T, right.targets_T)
        and left.segment.lengths == right.segment.lengths
        and left.num_bytes == right.num_bytes
    )


def predictions(batches: list[Batch]) -> Counter[tuple[tuple[int, int], ...]]:
    """Every piece as the sequence of its (token read, target)."""
    pieces: Counter[tuple[tuple[int, int], ...]] = Counter()
    for batch in batches:
        pairs = list(zip(batch.segment.tokens_T.tolist(), batch.targets_T.tolist(), strict=True))
        for start, length in zip(batch.segment.starts, batch.segment.lengths, strict=True):
            pieces[tuple(pairs[start : start + length])] += 1
    return pieces


def expected_predictions(shards: Shards, capacity: int) -> Counter[tuple[tuple[int, int], ...]]:
    pieces: Counter[tuple[tuple[int, int], ...]] = Counter()
    for number in range(shards.num_documents):
        pairs = list(itertools.pairwise(shards.tokens(number).tolist()))
        for start in range(0, len(pairs), capacity):
            pieces[tuple(pairs[start : start + capacity])] += 1
    return pieces


@settings(max_examples=30, deadline=None)
@given(capacity=st.integers(1, 200), seed=st.integers(0, 2**40))
def test_an_epoch_is_every_prediction_once(shards: Shards, tokenizer: Tokenizer, capacity: int, seed: int) -> None:
    loader = Loader(shards, tokenizer, capacity, seed)
    for _ in range(2):
        batches = list(itertools.islice(loader, loader.batches_in_epoch))
        assert predictions(batches) == expected_predictions(shards, capacity)
        assert sum(batch.num_bytes for batch in batches) == shards.num_bytes
        assert max(batch.segment.num_tokens for batch in batches) <= capacity
        assert loader.position == loader.batches_in_epoch
        next(loader)  # opens the next epoch
        loader.load_state_dict({**loader.state_dict(), "position": 0})


def test_a_batch_is_a_segment_of_fresh_sequences(shards: Shards, tokenizer: Tokenizer) -> None:
    for batch in itertools.islice(Loader(shards, tokenizer, 64, seed=1), 20):
        segment = batch.segment
        assert segment.past == (0,) * len(segment.lengths)
        assert segment.slots == tuple(range(len(segment.lengths)))
        assert segment.tokens_T.dtype == batch.targets_T.dtype == torch.int64
        assert segment.tokens_T.shape == batch.targets_T.shape
        assert tokenizer.eos_id not in segment.tokens_T  # nothing follows it, so nothing is predicted from it
        assert tokenizer.bos_id not in batch.targets_T
        assert batch.num_bytes == tokenizer.token_bytes_V[batch.targets_T.numpy()].sum()


def test_a_cut_document_keeps_the_target_across_the_cut(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shards = build_shards([Document("deep line sailor " * 20, "")], tmp_path, tokenizer, source="test")
    ids = shards.tokens(0).tolist()
    batches = list(single_pass(shards, tokenizer, 10))
    assert [t for batch in batches for t in batch.segment.tokens_T.tolist()] == ids[:-1]
    assert [t for batch in batches for t in batch.targets_T.tolist()] == ids[1:]


def test_batches_are_nearly_full(shards: Shards, tokenizer: Tokenizer) -> None:
    loader = Loader(shards, tokenizer, 128, seed=0)
    read = shards.num_tokens - shards.num_documents
    assert loader.batches_in_epoch <= read / 128 * 1.05 + 1


# -- order ------------------------------------------------------------------------------------------------------


def stream(shards: Shards, tokenizer: Tokenizer, seed: int, count: int) -> list[list[int]]:
    return [batch.segment.tokens_T.tolist() for batch in itertools.islice(Loader(shards, tokenizer, 64, seed), count)]


def test_seed_decides_the_order(shards: Shards, tokenizer: Tokenizer) -> None:
    count = 2 * Loader(shards, tokenizer, 64).batches_in_epoch
    assert stream(shards, tokenizer, 3, count) == stream(shards, tokenizer, 3, count)
    assert stream(shards, tokenizer, 3, count) != stream(shards, tokenizer, 4, count)


def test_epochs_differ_in_order_and_in_packing(shards: Shards, tokenizer: Tokenizer) -> None:
    loader = Loader(shards, tokenizer, 64, seed=0)
    epochs: list[list[frozenset[tuple[tuple[int, int], ...]]]] = []
    for epoch in range(3):
        batches = [next(loader)]
        assert loader.epoch == epoch
        batches += itertools.islice(loader, loader.batches_in_epoch - 1)
        epochs.append([frozenset(predictions([batch])) for batch in batches])
    for left, right in itertools.combinations(epochs, 2):
        assert left[:5] != right[:5]
        assert set(left) != set(right)


def test_order_is_frozen(tokenizer: Tokenizer, tmp_path: Path) -> None:
    # Another order would break the exact resumption of runs that were started before.
    shards = build_shards([Document(letter, "") for letter in "abcdefgh"], tmp_path, tokenizer, source="test")
    batches = itertools.islice(Loader(shards, tokenizer, tokens_per_batch=2, seed=7), 16)
    order = "".join(tokenizer.decode(batch.segment.tokens_T.tolist(), skip_special=True) for batch in batches)
    assert order == "feagbhdchgbfcade"


def test_single_pass_is_every_prediction_once_in_a_fixed_order(shards: Shards, tokenizer: Tokenizer) -> None:
    first, second = (list(single_pass(shards, tokenizer, 50)) for _ in range(2))
    assert predictions(first) == expected_predictions(shards, 50)
    assert all(equal(left, right) for left, right in zip(first, second, strict=True))
    assert sum(batch.num_bytes for batch in first) == shards.num_bytes
    assert first[0].segment.tokens_T[:10].tolist() == shards.tokens(0, 0, 10).tolist()


# -- resuming ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data(), capacity=st.integers(20, 300), seed=st.integers(0, 100))
def test_resuming_anywhere_continues_bitwise(
    shards: Shards, tokenizer: Tokenizer, data: st.DataObject, capacity: int, seed: int
) -> None:
    straight = Loader(shards, tokenizer, capacity, seed)
    total = 2 * straight.batches_in_epoch + 3
    expected = list(itertools.islice(straight, total))
    stops = sorted(data.draw(st.lists(st.integers(0, total), max_size=4)))
    given_batches: list[Batch] = []
    loader = Loader(shards, tokenizer, capacity, seed)
    for stop in [*stops, total]:
        given_batches += itertools.islice(loader, stop - len(given_batches))
        state = json.loads(json.dumps(loader.state_dict()))
        loader = Loader(Shards(shards.folder), tokenizer, capacity, seed)
        loader.load_state_dict(state)
        assert loader.state_dict() == state
    assert len(given_batches) == total
    assert all(equal(left, right) for left, right in zip(given_batches, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "seed was 5 and is now 0"),
        ({"tokens_per_batch": 32}, "tokens_per_batch was 32 and is now 64"),
        ({"shards": "other"}, "shards was 'other' and is now"),
        ({"position": 10**6}, "saved at batch 1000000 of"),
        ({"position": -1}, "saved at batch -1 of"),
        ({"position": None}, "saved at epoch 0, position None"),
        ({"epoch": -1}, "saved at epoch -1"),
        ({"epoch": "1"}, "saved at epoch '1'"),
    ],
)
def test_a_state_of_another_stream_is_refused_and_changes_nothing(
    shards: Shards, tokenizer: Tokenizer, change: dict[str, object], message: str
) -> None:
    loader = Loader(shards, tokenizer, 64)
    next(loader)
    before = loader.state_dict()
    with pytest.raises(LoaderError, match=message):
        loader.load_state_dict({**before, **change})
    assert loader.state_dict() == before


def test_an_empty_state_is_refused(shards: Shards, tokenizer: Tokenizer) -> None:
    with pytest.raises(LoaderError, match="cannot resume the data stream"):
        Loader(shards, tokenizer, 64).load_state_dict({})


# -- settings ---------------------------------------------------------------------------------------------------


def test_impossible_settings_are_refused(shards: Shards, tokenizer: Tokenizer) -> None:
    with pytest.raises(LoaderError, match="tokens_per_batch = 0"):
        Loader(shards, tokenizer, 0)
    with pytest.raises(LoaderError, match="tokens_per_batch = 0"):
        single_pass(shards, tokenizer, 0)
    with pytest.raises(LoaderError, match="seed = -1"):
        Loader(shards, tokenizer, 64, seed=-1)


def test_shards_of_another_tokenizer_are_refused(shards: Shards) -> None:
    other = Tokenizer.train(["something else"], vocab_size=300)
    with pytest.raises(ShardError, match="written with another tokenizer"):
        Loader(shards, other, 64)
    with pytest.raises(ShardError, match="written with another tokenizer"):
        single_pass(shards, other, 64)
