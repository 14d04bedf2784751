"""Row indices of segments of any lengths, against rings and pages simulated position by position."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leadline.model.chunk_rows import ChunkRows
from leadline.model.page_table import PageTable
from leadline.model.rows import Layout, PoolRows, RingRows, ring_length
from leadline.model.segment import Segment


@st.composite
def segments(draw: st.DrawFn, with_past: bool = True) -> Segment:
    lengths = draw(st.lists(st.sampled_from([1, 1, 2, 3, 4, 5, 16, 17, 127, 128, 129, 200]), min_size=1, max_size=5))
    past = [draw(st.integers(0, 300)) if with_past else 0 for _ in lengths]
    slots = draw(st.permutations(range(len(lengths) + 2)))[: len(lengths)]
    tokens = [list(range(length)) for length in lengths]
    return Segment.of(*tokens, past=past, slots=slots)


@st.composite
def layouts(draw: st.DrawFn, segment: Segment) -> Layout:
    """A state of two slots more than the segment needs: pages in order, or given out at random with some entries in
    place, and spare rows."""
    spare = draw(st.sampled_from([0, 0, 1, 7]))
    slots = len(segment.lengths) + 2
    if draw(st.booleans()):
        return Layout(PageTable.fixed(slots, 5), draw(st.booleans()), spare)
    pages = PageTable(slots, 5 * slots, 5)
    order = draw(st.permutations(range(5 * slots)))
    for slot, past, length in zip(segment.slots, segment.past, segment.lengths, strict=True):
        count = -(-(past + length) // 128)
        written = draw(st.sampled_from([0, 0, past, past + length - 1, past + length // 2, past + length]))
        pages.assign(slot, [order.pop() for _ in range(count)], written)
    return Layout(pages, draw(st.booleans()), spare)


@st.composite
def segments_with_layout(draw: st.DrawFn) -> tuple[Segment, Layout]:
    segment = draw(segments())
    return segment, draw(layouts(segment))


Token = tuple[int, int]  # slot and position
NOBODY: Token = (-1, -1)


WINDOW = 16


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


def check_kept(segment: Segment, keep_new: Tensor, keep_ring: Tensor, ring: int) -> None:
    """After storing, every row of the segment's slots holds the latest token that belongs there."""
    rows, new = rings(segment, max(segment.slots) + 1, ring), new_tokens(segment)
    assert len(set(keep_ring.tolist())) == len(keep_ring), "two tokens for one row"
    for source, target in zip(keep_new.tolist(), keep_ring.tolist(), strict=True):
        rows[target] = new[source]
    for past, length, slot in zip(segment.past, segment.lengths, segment.slots, strict=True):
        for position in range(max(0, past + length - ring), past + length):
            assert rows[slot * ring + position % ring] == (slot, position)


def known_rows(segment: Segment, past_X: Tensor | None, ring: int) -> list[Token]:
    """[needed rows of the rings, new rows], as the layers put them together."""
    assert past_X is not None
    slots = max(segment.slots) + 1
    before = rings(segment, slots, ring)
    return [*(before[row] for row in past_X.tolist()), *new_tokens(segment)]


@given(segments_with_layout())
def test_the_window_of_every_query(drawn: tuple[Segment, Layout]) -> None:
    segment, layout = drawn
    rows, ring = ChunkRows(segment, WINDOW, layout), WINDOW + layout.spare_tokens
    around, reach = rows.ring(), rows.window_reach()
    keys = known_rows(segment, around.past_X, ring)
    if around.order_X is not None:
        keys = [keys[row] for row in around.order_X.tolist()]
    assert NOBODY not in keys
    runs = zip(new_tokens(segment), reach.first_key_T.tolist(), reach.last_key_T.tolist(), strict=True)
    for (slot, position), first, last in runs:
        seen = [(slot, p) for p in range(max(0, position - WINDOW + 1), position + 1)]
        assert keys[first : last + 1] == seen
    check_kept(segment, around.keep_new, around.keep_ring, ring)


@pytest.mark.parametrize("ratio", [4, 128])
@given(drawn=segments_with_layout())
def test_the_tokens_of_every_entry(ratio: int, drawn: tuple[Segment, Layout]) -> None:
    segment, layout = drawn
    ring, pool = ring_length(ratio) + layout.spare_tokens, ChunkRows(segment, WINDOW, layout).pool(ratio)
    known = known_rows(segment, pool.past_X, ring)
    expected: list[tuple[list[Token], int]] = []
    for past, length, slot in zip(segment.past, segment.lengths, segment.slots, strict=True):
        for number in range(past // ratio, (past + length) // ratio):
            if (number + 1) * ratio <= layout.pages.written(slot):
                continue  # it is in place
            first = number * ratio - (ratio if ratio == 4 else 0)
            tokens = [(slot, p) if p >= 0 else NOBODY for p in range(first, (number + 1) * ratio)]
            expected.append((tokens, row_of(layout, slot, ratio, number)))
    found = [[known[row] if row >= 0 else NOBODY for row in rows] for rows in pool.rows_CG.tolist()]
    assert pool.entry_positions_C.tolist() == [max(tokens[-1][1] + 1 - ratio, 0) for tokens, _ in expected]
    assert list(zip(found, pool.entry_rows_C.tolist(), strict=True)) == expected
    check_kept(segment, pool.keep_new, pool.keep_ring, ring)


def row_of(layout: Layout, slot: int, ratio: int, number: int) -> int:
    """Row of an entry among all that the state holds."""
    page, place = divmod(number * ratio, 128)
    return layout.pages.pages_of(slot)[page] * (128 // ratio) + place // ratio


@pytest.mark.parametrize("ratio", [4, 128])
@given(drawn=segments_with_layout())
def test_visible_entries(ratio: int, drawn: tuple[Segment, Layout]) -> None:
    """Entry j is visible from the token that completes it on, t >= R j + R - 1."""
    segment, layout = drawn
    rows = ChunkRows(segment, WINDOW, layout)
    reach, seen = rows.entry_reach(ratio, rows.window_reach()), rows.pool(ratio).seen_X
    assert reach.first_entry_T is not None
    assert reach.visible_T is not None
    row = 0
    for past, length, slot in zip(segment.past, segment.lengths, segment.slots, strict=True):
        for position in range(past, past + length):
            count, first = int(reach.visible_T[row]), int(reach.first_entry_T[row])
            assert count == sum(position >= ratio * j + ratio - 1 for j in range(position + 1))
            found = list(range(first, first + count)) if seen is None else seen[first : first + count].tolist()
            assert found == [row_of(layout, slot, ratio, number) for number in range(count)]
            row += 1


@pytest.mark.parametrize("ratio", [4, 128])
@given(segments(with_past=False))
def test_without_a_state_the_finished_entries_are_all_there_is(ratio: int, segment: Segment) -> None:
    rows = ChunkRows(segment, WINDOW, None)
    reach, pool = rows.entry_reach(ratio, rows.window_reach()), rows.pool(ratio)
    assert pool.seen_X is None
    assert pool.entry_rows_C.tolist() == list(range(sum(length // ratio for length in segment.lengths)))
    assert reach.first_entry_T is not None
    assert reach.visible_T is not None
    row, before = 0, 0
    for length in segment.lengths:
        for position in range(length):
            assert (int(reach.first_entry_T[row]), int(reach.visible_T[row])) == (before, (position + 1) // ratio)
            row += 1
        before += length // ratio


def test_pages_one_behind_the_other_are_read_in_place() -> None:
    """Nothing is copied where entries are kept as computed and lie in order already."""
    segment = Segment.of([1, 2], [3], past=[300, 0], slots=[1, 0])
    for layout, copied in (
        (Layout(PageTable.fixed(2, 4), in_place=True), False),
        (Layout(PageTable.fixed(2, 4), in_place=False), True),
        (Layout(paged([[7], [2, 3, 4]]), in_place=True), False),
        (Layout(paged([[7], [2, 3, 5]]), in_place=True), True),
    ):
        rows = ChunkRows(segment, WINDOW, layout)
        assert [rows.pool(ratio).seen_X is not None for ratio in (4, 128)] == [copied, copied]


def paged(pages: list[list[int]]) -> PageTable:
    table = PageTable(len(pages), 8, 4)
    for slot, numbers in enumerate(pages):
        table.assign(slot, numbers)
    return table


@pytest.mark.parametrize(
    ("ratio", "position", "visible"), [(4, 2, 0), (4, 3, 1), (4, 6, 1), (4, 7, 2), (128, 126, 0), (128, 127, 1)]
)
def test_the_token_that_completes_a_window_sees_its_entry(ratio: int, position: int, visible: int) -> None:
    rows = ChunkRows(Segment.of(range(200)), WINDOW, None)
    visible_T = rows.entry_reach(ratio, rows.window_reach()).visible_T
    assert visible_T is not None
    assert int(visible_T[position]) == visible


def num_past(rows: RingRows | PoolRows) -> int:
    assert rows.past_X is not None
    return len(rows.past_X)


def test_no_past_needs_no_copy() -> None:
    for layout in (None, Layout(PageTable.fixed(2, 1), in_place=True)):
        rows = ChunkRows(Segment.of([1, 2], [3]), WINDOW, layout)
        assert [num_past(part) for part in (rows.ring(), rows.pool(4), rows.pool(128))] == [0, 0, 0]
        assert rows.ring().order_X is None


def test_one_sequence_lies_in_order_already() -> None:
    layout = Layout(PageTable.fixed(2, 1), in_place=True)
    assert ChunkRows(Segment.of([1, 2], past=[9]), WINDOW, layout).ring().order_X is None
    assert ChunkRows(Segment.of([1, 2], [3], past=[0, 9]), WINDOW, layout).ring().order_X is not None


def test_a_tail_is_read_only_where_an_entry_is_finished() -> None:
    rows = ChunkRows(Segment.of([1, 2], past=[9]), WINDOW, Layout(PageTable.fixed(1, 1), in_place=True))
    assert (num_past(rows.pool(4)), num_past(rows.pool(128))) == (0, 0)
    rows = ChunkRows(Segment.of([1, 2, 3], past=[9]), WINDOW, Layout(PageTable.fixed(1, 1), in_place=True))
    assert (num_past(rows.pool(4)), num_past(rows.pool(128))) == (5, 0)
