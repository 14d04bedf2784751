"""Row indices of decoding steps, against rings and pages simulated position by position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leadline.model.block_rows import BlockRows
from leadline.model.page_table import PageTable, num_pages
from leadline.model.rows import Layout, ring_length
from leadline.model.segment import Segment
from leadline.model.step_rows import StepRows

WINDOW = 16


@st.composite
def steps(draw: st.DrawFn) -> tuple[Segment, Layout]:
    """Up to four sequences that bring at most 1 + spare tokens, with pages anywhere."""
    spare, count = draw(st.sampled_from([0, 1, 7])), draw(st.integers(1, 4))
    lengths = [draw(st.integers(1, 1 + spare)) for _ in range(count)]
    past = [draw(st.one_of(st.integers(0, 300), st.sampled_from([0, 3, 7, 126, 127, 128, 255]))) for _ in lengths]
    slots = draw(st.permutations(range(count + 1)))[:count]
    pages = PageTable(count + 1, 12, 3)
    order = draw(st.permutations(range(12)))
    for slot, before, length in zip(slots, past, lengths, strict=True):
        pages.assign(slot, [order.pop() for _ in range(num_pages(before + length))])
    segment = Segment.of(*(range(length) for length in lengths), past=past, slots=slots)
    return segment, Layout(pages, in_place=True, spare_tokens=spare)


def as_the_device_sees_it(segment: Segment) -> Segment:
    """The same step, whose places the host does not know; only with equal lengths."""
    return Segment.on_device(segment.tokens_T, segment.positions_T, segment.slots_N, 310)


def places(segment: Segment) -> list[tuple[int, int]]:
    """Slot and position of each new token."""
    runs = zip(segment.slots, segment.past, segment.lengths, strict=True)
    return [(slot, past + place) for slot, past, length in runs for place in range(length)]


@given(steps())
def test_the_window_of_every_token(drawn: tuple[Segment, Layout]) -> None:
    """The rows of the ring, once the new keys are in it; and none of them is overwritten by a later new key."""
    segment, layout = drawn
    ring = WINDOW + layout.spare_tokens
    rows = StepRows(segment, WINDOW, layout)
    around, window_TW = rows.ring(), rows.lookup().window_TW
    assert (around.past_X, around.order_X) == (None, None)
    assert around.keep_new.tolist() == list(range(segment.num_tokens))
    assert window_TW.dtype == torch.int32
    written = {row: place for row, place in zip(around.keep_ring.tolist(), places(segment), strict=True)}
    assert len(written) == segment.num_tokens
    for row, place in written.items():
        assert row == place[0] * ring + place[1] % ring
    for (slot, position), seen in zip(places(segment), window_TW.tolist(), strict=True):
        wanted = range(position - WINDOW + 1, position + 1)
        assert seen == [slot * ring + p % ring if p >= 0 else -1 for p in wanted]
        for row, p in zip(seen, wanted, strict=True):
            assert written.get(row, (slot, p)) == (slot, p), "a later token of the step took its place"


@pytest.mark.parametrize("ratio", [4, 128])
@given(drawn=steps(), known=st.booleans())
def test_the_tokens_of_every_entry(ratio: int, drawn: tuple[Segment, Layout], known: bool) -> None:
    """Where the host knows the places, there are the finished entries alone; else one for each token, and those that
    are not finished go nowhere. New tokens are read where they are, the past in its ring."""
    segment, layout = drawn
    known = known or len(set(segment.lengths)) > 1
    pool = StepRows(segment if known else as_the_device_sees_it(segment), WINDOW, layout).pool(ratio)
    ring = ring_length(ratio) + layout.spare_tokens
    assert (pool.past_X, pool.seen_X) == (None, None)
    starts, rings = dict(zip(segment.slots, segment.starts, strict=True)), len(layout.pages.table_NP) * ring
    past_of = dict(zip(segment.slots, segment.past, strict=True))
    expected = []
    for slot, position in places(segment):
        finished = (position + 1) % ratio == 0
        first, tokens = past_of[slot], []
        for p in range(position + 1 - ring_length(ratio), position + 1):
            new_row, old_row = rings + starts[slot] + p - first, slot * ring + p % ring
            tokens.append(-1 if p < 0 else old_row if p < first else new_row)
        page, place = divmod(position // ratio * ratio, 128)
        row = layout.pages.pages_of(slot)[page] * (128 // ratio) + place // ratio
        if finished or not known:
            expected.append((tokens, position // ratio * ratio, row if finished else -1))
    found = zip(pool.rows_CG.tolist(), pool.entry_positions_C.tolist(), pool.entry_rows_C.tolist(), strict=True)
    assert list(found) == expected
    assert pool.rows_CG.shape[1] == ring_length(ratio)
    assert pool.keep_ring.tolist() == [slot * ring + position % ring for slot, position in places(segment)]


@given(drawn=steps(), known=st.booleans())
def test_the_entries_of_every_token(drawn: tuple[Segment, Layout], known: bool) -> None:
    segment, layout = drawn
    known = known or len(set(segment.lengths)) > 1
    lookup = StepRows(segment if known else as_the_device_sees_it(segment), WINDOW, layout).lookup()
    longest = max(position for _, position in places(segment)) + 1 if known else 310
    assert lookup.pages_NP.shape == (len(segment.slots), num_pages(longest))
    assert lookup.pages_NP.dtype == lookup.entries_TP.dtype == torch.int32
    for slot, pages in zip(segment.slots, lookup.pages_NP.tolist(), strict=True):
        own = layout.pages.pages_of(slot)
        assert pages == own + [-1] * (len(pages) - len(own))
    seen = zip(places(segment), lookup.entries_TP.tolist(), lookup.visible_T.tolist(), strict=True)
    for (slot, position), hca, visible in seen:
        count = (position + 1) // 128
        assert hca == layout.pages.pages_of(slot)[:count] + [-1] * (len(hca) - count)
        assert visible == (position + 1) // 4


def test_a_draft_block_may_end_behind_the_last_page() -> None:
    """Its keys go into the window's spare rows; pages are for entries, and a draft makes none."""
    pages = PageTable(1, 2, 2)
    pages.assign(0, [1, 0])
    segment = Segment.of([1, 2, 3, 4], past=[254], slots=[0])
    rows = BlockRows(segment, WINDOW, Layout(pages, in_place=True, spare_tokens=4))
    wanted = [position % (WINDOW + 4) for position in range(254 - WINDOW, 258)]
    assert rows.lookup().window_TW.tolist() == [wanted] * 4
    assert rows.ring().keep_ring.tolist() == wanted[-4:]
