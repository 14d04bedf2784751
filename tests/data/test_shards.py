"""Shards: what is written is what is read, a killed build continues, and damage is named."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leadline.data.corpus import Document
from leadline.data.shards import ShardError, Shards, build_shards
from leadline.text.tokenizer import SPECIAL_TOKENS, Tokenizer

SMALL = 200  # bytes of text in a shard of these tests


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the quick brown fox jumps over the lazy dog " * 5], vocab_size=320)


@pytest.fixture(scope="module")
def other_tokenizer() -> Tokenizer:
    return Tokenizer.train(["pack my box with five dozen liquor jugs " * 5], vocab_size=330)


def documents(count: int, word: str = "fox") -> list[Document]:
    return [
        Document(f"the quick {word} number {number} jumps " * (number % 4 + 1), f"{number}") for number in range(count)
    ]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(max_size=60) | st.sampled_from(SPECIAL_TOKENS), min_size=1, max_size=12),
    shard_bytes=st.integers(1, 100),
)
def test_documents_come_back(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, texts: list[str], shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    shards = build_shards(
        [Document(text, "") for text in texts], folder, tokenizer, source="test", shard_bytes=shard_bytes
    )
    assert shards.num_documents == len(texts)
    for number, text in enumerate(texts):
        ids = shards.tokens(number).tolist()
        assert ids == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        assert tokenizer.decode(ids, skip_special=True) == text
        assert shards.lengths[number] == len(ids)
        assert shards.text_bytes[number] == len(text.encode("utf8")) == tokenizer.token_bytes_V[ids].sum()
    assert shards.num_bytes == sum(len(text.encode("utf8")) for text in texts)
    assert shards.num_tokens == shards.lengths.sum()


def test_part_of_a_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shards = build_shards(documents(20), tmp_path, tokenizer, source="test", shard_bytes=SMALL)
    whole = shards.tokens(13)
    assert shards.tokens(13, 2, 5).tolist() == whole[2:5].tolist()
    for start, stop in ((-1, 2), (3, 2), (0, len(whole) + 1)):
        with pytest.raises(IndexError, match="of document 13"):
            shards.tokens(13, start, stop)


def test_index_describes_the_shards(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shards = build_shards(documents(30), tmp_path, tokenizer, source="numbered foxes", shard_bytes=SMALL)
    index = json.loads((tmp_path / "index.json").read_text(encoding="utf8"))
    assert len(index["shards"]) > 3
    assert index["source"] == shards.source == "numbered foxes"
    assert index["vocab_size"] == tokenizer.vocab_size
    assert index["tokenizer"] == tokenizer.fingerprint
    for name, total in (("tokens", shards.num_tokens), ("documents", 30), ("bytes", shards.num_bytes)):
        assert index[name] == total == sum(shard[name] for shard in index["shards"])
    assert len(list(tmp_path.iterdir())) == 2 * len(index["shards"]) + 1


def test_ids_take_two_bytes_or_four(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_shards(documents(2), tmp_path / "small", tokenizer, source="test")
    monkeypatch.setattr(tokenizer, "_vocab_size", 2**16 + 1)
    build_shards(documents(2), tmp_path / "large", tokenizer, source="test")
    dtypes = [np.load(next((tmp_path / name).glob("*.tokens.npy"))).dtype for name in ("small", "large")]
    assert dtypes == [np.uint16, np.uint32]


def test_equal_documents_give_equal_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    build_shards(documents(20), tmp_path / "a", tokenizer, source="test", shard_bytes=SMALL)
    build_shards(iter(documents(20)), tmp_path / "b", tokenizer, source="test", shard_bytes=SMALL)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_progress_counts_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for _ in range(2):  # the second time every shard is already there
        calls: list[tuple[int, int | None]] = []
        build_shards(
            documents(20),
            tmp_path,
            tokenizer,
            source="test",
            shard_bytes=SMALL,
            progress=lambda done, total, calls=calls: calls.append((done, total)),
        )
        assert calls[-1] == (20, 20)
        assert [done for done, _ in calls] == sorted(done for done, _ in calls)
        assert len(calls) > 3


# -- interruption -----------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def killed_after(count: int) -> Iterator[Document]:
    yield from documents(30)[:count]
    raise Killed


@settings(max_examples=20, deadline=None)
@given(kills=st.lists(st.integers(0, 29), max_size=4))
def test_a_killed_build_continues_to_the_same_files(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, kills: list[int]
) -> None:
    folder, straight = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("straight")
    build_shards(documents(30), straight, tokenizer, source="test", shard_bytes=SMALL)
    for count in kills:
        with pytest.raises(Killed):
            build_shards(killed_after(count), folder, tokenizer, source="test", shard_bytes=SMALL)
        with pytest.raises(ShardError, match="no such file; build the shards"):
            Shards(folder)
    build_shards(documents(30), folder, tokenizer, source="test", shard_bytes=SMALL)
    assert content(folder) == content(straight)


def test_finished_shards_are_not_tokenised_again(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        build_shards(killed_after(25), tmp_path, tokenizer, source="test", shard_bytes=SMALL)
    finished = {path: path.stat().st_ino for path in tmp_path.glob("*.npy")}
    assert len(finished) > 4
    encoded: list[str] = []
    encode_batch = Tokenizer.encode_batch

    def counting(self: Tokenizer, texts: list[str], allow_special: bool = False) -> list[list[int]]:
        encoded.extend(texts)
        return encode_batch(self, texts, allow_special)

    monkeypatch.setattr(Tokenizer, "encode_batch", counting)
    build_shards(documents(30), tmp_path, tokenizer, source="test", shard_bytes=SMALL)
    assert 0 < len(encoded) < 12
    assert {path: path.stat().st_ino for path in finished} == finished


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("call", range(8))
def test_a_kill_while_writing_leaves_no_half_shard(tokenizer: Tokenizer, tmp_path: Path, step: str, call: int) -> None:
    calls = 0
    with pytest.MonkeyPatch.context() as patch:
        original = getattr(os, step)

        def dying(*arguments: object) -> None:
            nonlocal calls
            calls += 1
            if calls > call:
                raise Killed
            original(*arguments)

        patch.setattr(os, step, dying)
        with pytest.raises(Killed):
            build_shards(documents(30), tmp_path, tokenizer, source="test", shard_bytes=SMALL)
    assert not (tmp_path / "index.json").exists()
    for path in tmp_path.glob("*.npy"):
        assert len(np.load(path)) > 0
    shards = build_shards(documents(30), tmp_path, tokenizer, source="test", shard_bytes=SMALL)
    assert [tokenizer.decode(shards.tokens(n).tolist(), skip_special=True) for n in range(30)] == [
        document.text for document in documents(30)
    ]


def test_old_shards_stay_readable_until_the_new_ones_are_complete(tokenizer: Tokenizer, tmp_path: Path) -> None:
    old = build_shards(documents(30), tmp_path, tokenizer, source="old", shard_bytes=SMALL)
    before = [old.tokens(number).tolist() for number in range(30)]

    def changed() -> Iterator[Document]:
        yield from documents(20, word="dog")
        raise Killed

    with pytest.raises(Killed):
        build_shards(changed(), tmp_path, tokenizer, source="new", shard_bytes=SMALL)
    again = Shards(tmp_path)
    assert again.source == "old"
    assert [again.tokens(number).tolist() for number in range(30)] == before


def test_a_changed_corpus_replaces_only_what_changed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = build_shards(documents(30), tmp_path, tokenizer, source="test", shard_bytes=SMALL)
    before = {path.name for path in tmp_path.glob("*.npy")}
    changed = [*documents(30)[:-1], Document("a new last document", "new")]
    (tmp_path / ".left.tokens.npy.tmp").write_bytes(b"of a killed process")
    second = build_shards(changed, tmp_path, tokenizer, source="test", shard_bytes=SMALL)
    after = {path.name for path in tmp_path.glob("*.npy")}
    assert len(before - after) == len(after - before) == 2
    assert first.fingerprint != second.fingerprint
    assert not list(tmp_path.glob(".*"))
    assert tokenizer.decode(second.tokens(29).tolist(), skip_special=True) == "a new last document"


def test_another_tokenizer_rebuilds(tokenizer: Tokenizer, other_tokenizer: Tokenizer, tmp_path: Path) -> None:
    build_shards(documents(10), tmp_path, tokenizer, source="test")
    shards = build_shards(documents(10), tmp_path, other_tokenizer, source="test")
    shards.require_tokenizer(other_tokenizer)
    assert other_tokenizer.decode(shards.tokens(3).tolist(), skip_special=True) == documents(10)[3].text
    with pytest.raises(ShardError, match=r"written with another tokenizer .* build the shards again"):
        shards.require_tokenizer(tokenizer)


def test_no_documents_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no document to write"):
        build_shards([], tmp_path, tokenizer, source="nothing")


# -- damage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tokens", "documents"])
@pytest.mark.parametrize("damage", ["data", "header", "empty", "gone", "other"])
def test_damaged_shard_is_named_and_a_build_repairs_it(
    tokenizer: Tokenizer, tmp_path: Path, kind: str, damage: str
) -> None:
    build_shards(documents(30), tmp_path, tokenizer, source="test", shard_bytes=SMALL)
    before = content(tmp_path)
    path = sorted(tmp_path.glob(f"*.{kind}.npy"))[1]
    if damage == "gone":
        path.unlink()
    elif damage == "other":
        np.save(path, np.arange(4, dtype=np.float32))
    else:
        size = {"data": path.stat().st_size - 2, "header": 20, "empty": 0}[damage]
        path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ShardError, match=path.name.split(".")[0]) as caught:
        Shards(tmp_path)
    assert "build the shards again" in str(caught.value)
    assert "\n" not in str(caught.value)
    build_shards(documents(30), tmp_path, tokenizer, source="test", shard_bytes=SMALL)
    assert content(tmp_path) == before


@pytest.mark.parametrize("damage", ['{"version": 1', "[]", '{"version": 99}', '{"version": 1}', b"\xff"])
def test_damaged_index_is_named(tokenizer: Tokenizer, tmp_path: Path, damage: str | bytes) -> None:
    build_shards(documents(3), tmp_path, tokenizer, source="test")
    (tmp_path / "index.json").write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    with pytest.raises(ShardError, match=r"index.json: .* build the shards again"):
        Shards(tmp_path)


def test_index_that_disagrees_with_a_shard_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    build_shards(documents(3), tmp_path, tokenizer, source="test")
    index = json.loads((tmp_path / "index.json").read_text(encoding="utf8"))
    index["shards"][0]["tokens"] += 1
    (tmp_path / "index.json").write_text(json.dumps(index), encoding="utf8")
    with pytest.raises(ShardError, match="the index says"):
        Shards(tmp_path)
