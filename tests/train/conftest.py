from __future__ import annotations

from pathlib import Path

import pytest

from leadline.model.config import TINY
from leadline.train.pretrain import Run


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of small texts, enough for both sides of the held-out split."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        words = " ".join(f"word{(number * 7 + i * i) % 31} and {i % 5}" for i in range(60 + number))
        (folder / f"{number:02}.txt").write_text(f"Text {number}. {words}\n", encoding="utf8")
    return folder


@pytest.fixture
def run(tmp_path: Path, corpus: Path) -> Run:
    """A run of a few seconds."""
    return Run(
        out=tmp_path / "run",
        data=corpus,
        model=TINY.replace(vocab_size=512),
        steps=6,
        tokens_per_step=256,
        tokens_per_segment=128,
        heldout_percent=20.0,
        heldout_tokens=256,
        evaluate_every=3,
        warmup_steps=2,
    )
