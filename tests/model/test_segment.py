"""Segments: their places, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leadline.model.segment import Segment


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    lengths = draw(st.lists(st.sampled_from([1, 1, 2, 3, 4, 5, 16, 17, 127, 128, 129, 200]), min_size=1, max_size=5))
    past = [draw(st.integers(0, 300)) for _ in lengths]
    slots = draw(st.permutations(range(len(lengths) + 2)))[: len(lengths)]
    tokens = [list(range(length)) for length in lengths]
    return Segment.of(*tokens, past=past, slots=slots)


@given(segments())
def test_positions_starts_and_sequences(segment: Segment) -> None:
    runs = zip(segment.past, segment.lengths, segment.slots, strict=True)
    tokens = [(slot, position) for past, length, slot in runs for position in range(past, past + length)]
    assert segment.positions_T.tolist() == [position for _, position in tokens]
    assert [segment.slots[number] for number in segment.sequence_T.tolist()] == [slot for slot, _ in tokens]
    assert list(segment.starts) == [sum(segment.lengths[:n]) for n in range(len(segment.lengths))]
    assert segment.num_tokens == len(tokens)


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"tokens_T": torch.zeros(3)}, "int64"),
    ({"tokens_T": torch.zeros(1, 3, dtype=torch.int64)}, r"\(1, 3\)"),
    ({"lengths": (2, 2)}, "sum to 3"),
    ({"lengths": (3, 0)}, "positive"),
    ({"lengths": (3,)}, "differ in number"),
    ({"past": (0, -1)}, "must not be negative"),
    ({"slots": (-1, 0)}, "must not be negative"),
    ({"slots": (1, 1)}, "must differ"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN, ids=lambda part: str(part)[:40])
def test_impossible_segments(change: dict[str, Any], words: str) -> None:
    arguments = {"tokens_T": torch.arange(3), "lengths": (2, 1), "past": (0, 4), "slots": (0, 1)}
    Segment(**arguments)
    with pytest.raises(ValueError, match=words):
        Segment(**{**arguments, **change})
