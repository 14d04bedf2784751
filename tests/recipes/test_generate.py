"""`leadline generate`: the text that the engine draws, and figures that add up."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from leadline.cli import UsageError
from leadline.engine.generate import generate as continued
from leadline.engine.request import RequestError, Sampling
from leadline.engine.sequence import Usage
from leadline.recipes import generate
from leadline.text.tokenizer import Tokenizer
from leadline.weights.load import load_checkpoint

PROMPT = "def add(first"


def expected(checkpoint: Path, sampling: Sampling) -> str:
    tokenizer, model = Tokenizer.load(checkpoint), load_checkpoint(checkpoint)
    ids = continued(
        model,
        [tokenizer.bos_id, *tokenizer.encode(PROMPT)],
        max_tokens=12,
        sampling=sampling,
        stop_ids=frozenset({tokenizer.eos_id}),
    )
    return b"".join(map(tokenizer.token_bytes, ids)).decode("utf8", "replace")


@pytest.mark.parametrize("extra", [[], ["speculate=yes"], ["cache=packed", "seed=3", "temperature=1"]], ids=str)
def test_it_prints_what_the_engine_draws(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], extra: list[str]
) -> None:
    assert generate.main([str(checkpoint), PROMPT, "max_tokens=12", "temperature=0", *extra]) == 0
    printed = capsys.readouterr()
    if "cache=packed" not in extra:
        assert printed.out == expected(checkpoint, Sampling(temperature=0.0)) + "\n"
    assert re.search(r"\d+ \+ \d+ tokens, first after [\d.]+ s", printed.err)
    assert bool(re.search(r"\d+ of \d+ guesses right \(MTP: \d+%\)", printed.err)) == ("speculate=yes" in extra)
    assert printed.err.count("\n") <= 2


@pytest.mark.parametrize("sampling", [["temperature=0"], ["seed=5"]], ids=str)
def test_draft_stages_change_no_word_and_are_reported_by_place(
    staged_checkpoint: Path, capsys: pytest.CaptureFixture[str], sampling: list[str]
) -> None:
    words, errors = [], []
    for extra in (["speculate=no"], ["speculate=yes"], ["speculate=yes", "draft_cost=0.5"]):
        assert generate.main([str(staged_checkpoint), PROMPT, "max_tokens=25", *sampling, *extra]) == 0
        printed = capsys.readouterr()
        words.append(printed.out)
        errors.append(printed.err)
    assert words[0] == words[1] == words[2]
    assert re.search(r"\d+ of \d+ guesses right \(DSpark: \d+%; by place( \d+%)+\)", errors[1])
    assert "guesses" not in errors[0]


def test_guesses_in_words() -> None:
    usage = Usage(3, 20, 0, (8, 8, 4), (6, 2, 1), "DSpark")
    assert generate.guesses(usage) == "9 of 20 guesses right (DSpark: 45%; by place 75% 25% 25%)"
    assert generate.guesses(Usage(3, 20, 0, (4,), (1,), "MTP")) == "1 of 4 guesses right (MTP: 25%)"


def test_a_seed_repeats_its_text(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (1, 1, 2):
        generate.main([str(checkpoint), PROMPT, "max_tokens=20", "temperature=2", f"seed={seed}"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_the_prompt_comes_from_a_file_or_from_standard_input(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt").write_text(PROMPT, encoding="utf8")
    texts = []
    for word in (PROMPT, f"@{tmp_path / 'prompt'}", "-"):
        monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
        generate.main([str(checkpoint), word, "max_tokens=5", "temperature=0"])
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    with pytest.raises(UsageError, match="absent"):
        generate.main([str(checkpoint), f"@{tmp_path / 'absent'}"])


def test_a_second_run_reads_the_prompt_from_the_disk(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, cached = [], []
    for extra in ([], [f"disk_cache={tmp_path}"], [f"disk_cache={tmp_path}"]):
        generate.main([str(checkpoint), PROMPT * 100, "max_tokens=5", "temperature=0", *extra])
        printed = capsys.readouterr()
        texts.append(printed.out)
        cached.append(re.search(r"(\d+) from the cache", printed.err))
    assert texts[0] == texts[1] == texts[2]
    assert cached[:2] == [None, None]
    assert cached[2]
    assert int(cached[2][1]) >= 128
    with pytest.raises(UsageError, match="disk_cache_gib=0"):
        generate.main([str(checkpoint), PROMPT, "disk_cache_gib=0"])


def test_what_is_missing_is_said(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="expected a checkpoint folder and a prompt, found 1"):
        generate.main([str(checkpoint)])
    with pytest.raises(UsageError, match="max_tokens"):
        generate.main([str(checkpoint), PROMPT, "max_tokens=many"])
    with pytest.raises(RequestError, match="temperature"):
        generate.main([str(checkpoint), PROMPT, "temperature=-1"])
