"""Segments and their row indices, against rings simulated position by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leadline.model.config import TINY, ModelConfig
from leadline.model.segment import Segment, SegmentIndex, ring_length

ALL_RATIOS = (0, 4, 128)


@st.composite
def segments(draw: st.DrawFn, with_past: bool = True) -> Segment:
    lengths = draw(st.lists(st.sampled_from([1, 1, 2, 3, 4, 5, 16, 17, 127, 128, 129, 200]), min_size=1, max_size=5))
    past = [draw(st.integers(0, 300)) if with_past else 0 for _ in lengths]
    slots = draw(st.permutations(range(len(lengths) + 2)))[: len(lengths)]
    tokens = [list(range(length)) for length in lengths]
    return Segment.of(*tokens, past=past, slots=slots)


def index_of(segment: Segment, config: ModelConfig = TINY) -> SegmentIndex:
    """With a state of two slots more than the segment needs and room for 512 tokens."""
    return SegmentIndex(segment, config, len(segment.lengths) + 2, {ratio: 512 // ratio for ratio in (4, 128)})


Token = tuple[int, int]  # slot and position
NOBODY: Token = (-1, -1)


def rings(segment: Segment, num_slots: int, ring: int) -> list[Token]:
    """What lies in each ring row before the segment: the latest token of its slot at that place, or nobody."""
    rows = [NOBODY] * (num_slots * ring)
    for past, slot in zip(segment.past, segment.slots, strict=True):
        for position in range(past):
            rows[slot * ring + position % ring] = (slot, position)
    return rows


def new_tokens(segment: Segment) -> list[Token]:
    runs = zip(segment.past, segment.lengths, segment.slots, strict=True)
    return [(slot, position) for past, length, slot in runs for position in range(past, past + length)]


def check_kept(segment: Segment, keep_new: Tensor, keep_ring: Tensor, ring: int, num_slots: int) -> None:
    """After storing, every row of the segment's slots holds the latest token that belongs there."""
    rows, new = rings(segment, num_slots, ring), new_tokens(segment)
    assert len(set(keep_ring.tolist())) == len(keep_ring), "two tokens for one row"
    for source, target in zip(keep_new.tolist(), keep_ring.tolist(), strict=True):
        rows[target] = new[source]
    for past, length, slot in zip(segment.past, segment.lengths, segment.slots, strict=True):
        for position in range(max(0, past + length - ring), past + length):
            assert rows[slot * ring + position % ring] == (slot, position)


@given(segments())
def test_the_window_of_every_query(segment: Segment) -> None:
    index, window = index_of(segment), TINY.sliding_window
    new = new_tokens(segment)
    known = [*rings(segment, index.num_slots, window), *new]
    source = index.ring.source_X
    keys = new if source is None else [known[row] for row in source.tolist()]
    assert NOBODY not in keys
    reach = index.reach(0)
    for (slot, position), first, last in zip(new, reach.first_key_T.tolist(), reach.last_key_T.tolist(), strict=True):
        seen = [(slot, p) for p in range(max(0, position - window + 1), position + 1)]
        assert keys[first : last + 1] == seen
    check_kept(segment, index.ring.keep_new, index.ring.keep_ring, window, index.num_slots)


@pytest.mark.parametrize("ratio", [4, 128])
@given(segment=segments())
def test_the_window_of_every_entry(ratio: int, segment: Segment) -> None:
    index, ring = index_of(segment), ring_length(ratio)
    pool, capacity = index.pool[ratio], 512 // ratio
    known = [*rings(segment, index.num_slots, ring), *new_tokens(segment)]
    expected: list[tuple[list[Token], int]] = []
    for past, length, slot in zip(segment.past, segment.lengths, segment.slots, strict=True):
        for number in range(past // ratio, (past + length) // ratio):
            first = number * ratio - (ratio if ratio == 4 else 0)
            tokens = [(slot, p) if p >= 0 else NOBODY for p in range(first, (number + 1) * ratio)]
            expected.append((tokens, slot * capacity + number))
    found = [[known[row] if row >= 0 else NOBODY for row in rows] for rows in pool.rows_CG.tolist()]
    assert list(zip(found, pool.entry_rows_C.tolist(), strict=True)) == expected
    check_kept(segment, pool.keep_new, pool.keep_ring, ring, index.num_slots)


@pytest.mark.parametrize("ratio", [4, 128])
@given(segment=segments(), with_state=st.booleans())
def test_visible_entries(ratio: int, segment: Segment, with_state: bool) -> None:
    """Entry j is visible from the token that completes it on, t >= R j + R - 1; rows count within the slot."""
    if not with_state:
        segment = Segment(segment.tokens_T, segment.lengths, (0,) * len(segment.lengths), segment.slots)
    index = index_of(segment) if with_state else SegmentIndex(segment, TINY, 0, None)
    reach = index.reach(ratio)
    assert reach.first_entry_T is not None
    assert reach.visible_T is not None
    row, before = 0, 0
    for past, length, slot in zip(segment.past, segment.lengths, segment.slots, strict=True):
        first = slot * (512 // ratio) if with_state else before
        for position in range(past, past + length):
            assert int(reach.first_entry_T[row]) == first
            assert int(reach.visible_T[row]) == sum(position >= ratio * j + ratio - 1 for j in range(position + 1))
            row += 1
        before += length // ratio


@pytest.mark.parametrize(
    ("ratio", "position", "visible"), [(4, 2, 0), (4, 3, 1), (4, 6, 1), (4, 7, 2), (128, 126, 0), (128, 127, 1)]
)
def test_the_token_that_completes_a_window_sees_its_entry(ratio: int, position: int, visible: int) -> None:
    visible_T = SegmentIndex(Segment.of(range(200)), TINY, 0, None).reach(ratio).visible_T
    assert visible_T is not None
    assert int(visible_T[position]) == visible


@given(segments())
def test_positions_starts_and_sequences(segment: Segment) -> None:
    tokens = new_tokens(segment)
    assert segment.positions_T.tolist() == [position for _, position in tokens]
    assert [segment.slots[number] for number in segment.sequence_T.tolist()] == [slot for slot, _ in tokens]
    assert list(segment.starts) == [sum(segment.lengths[:n]) for n in range(len(segment.lengths))]
    assert segment.num_tokens == len(tokens)


def test_each_ratio_has_its_own_rotation() -> None:
    """The plain base in window-only layers, the other base with YaRN in the rest; entries turn at their first token."""
    config = TINY.replace(rope_factor=4.0, original_max_position_embeddings=32)
    index = SegmentIndex(Segment.of(range(260)), config, 0, None)
    half = torch.arange(8, dtype=torch.float64)
    plain = torch.outer(torch.arange(260.0, dtype=torch.float64), 10000.0 ** (-half / 8))
    torch.testing.assert_close(index.rotation(0)[0].double(), plain.cos(), rtol=0, atol=1e-4)
    for ratio in (4, 128):
        for part in (0, 1):
            assert torch.equal(index.rotation(ratio)[part], index.rotation(4)[part])
            anchors = index.rotation(ratio)[part][: 260 // ratio * ratio : ratio]
            assert torch.equal(index.pool[ratio].rotation[part], anchors)
    assert not torch.equal(index.rotation(0)[0], index.rotation(4)[0])


def test_no_state_needs_no_gather() -> None:
    assert SegmentIndex(Segment.of([1, 2], [3]), TINY, 0, None).ring.source_X is None
    assert index_of(Segment.of([1, 2], [3])).ring.source_X is None
    assert index_of(Segment.of([1, 2], [3], past=[0, 9])).ring.source_X is not None


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


def test_a_past_needs_a_state() -> None:
    with pytest.raises(ValueError, match="need a state"):
        SegmentIndex(Segment.of([1], past=[3]), TINY, 0, None)
