"""The page table, against lists, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leadline.model.page_table import PageError, PageTable, num_pages

SLOTS, PAGES, PER_SLOT = 3, 9, 4


@settings(max_examples=60)
@given(st.data())
def test_any_assignment(data: st.DataObject) -> None:
    """Pages assigned, taken over and released in any order: table, rows and runs are those of plain lists."""
    table, lists = PageTable(SLOTS, PAGES, PER_SLOT), [list[int]() for _ in range(SLOTS)]
    for _ in range(data.draw(st.integers(1, 8))):
        slot = data.draw(st.integers(0, SLOTS - 1))
        pages = data.draw(st.lists(st.integers(0, PAGES - 1), max_size=PER_SLOT, unique=True))
        if data.draw(st.booleans()):
            table.assign(slot, pages)
            lists[slot] = pages
        else:
            table.release(slot)
            lists[slot] = []
    for slot, pages in enumerate(lists):
        assert table.pages_of(slot) == pages
        assert table.tokens_of(slot) == 128 * len(pages)
        assert table.table_NP[slot].tolist() == pages + [-1] * (PER_SLOT - len(pages))
        for ratio, per_page in ((4, 32), (128, 1)):
            entries = np.arange(len(pages) * per_page)
            expected = [page * per_page + place for page in pages for place in range(per_page)]
            assert table.rows(slot, ratio, entries).tolist() == expected
        for tokens in range(0, 128 * len(pages) + 1, 64):
            covering = pages[: num_pages(tokens)]
            ordered = list(range(covering[0], covering[0] + len(covering))) if covering else []
            assert table.in_a_row(slot, tokens) == (covering == ordered)
        for past in range(0, 128 * len(pages), 32):
            others = [page for other, held in enumerate(lists) if other != slot for page in held]
            if pages[past // 128] in others:
                with pytest.raises(PageError, match=f"write into page {pages[past // 128]}, which another slot"):
                    table.check(slot, past, 1)
            else:
                table.check(slot, past, 1)


def test_every_slot_its_own_pages() -> None:
    table = PageTable.fixed(3, 2)
    assert table.table_NP.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert table.table_NP.dtype == torch.int32
    assert all(table.in_a_row(slot, 256) for slot in range(3))


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (127, 1), (128, 1), (129, 2), (1 << 20, 8192)])
def test_pages_that_cover_some_tokens(tokens: int, pages: int) -> None:
    assert num_pages(tokens) == pages


def test_full_pages_may_be_shared_and_the_one_in_writing_may_not() -> None:
    table = PageTable(2, 4, 3)
    table.assign(0, [2, 1])
    table.assign(1, [2, 3])
    table.check(0, 128, 128)
    table.check(1, 200, 56)
    with pytest.raises(PageError, match="slot 1 would write into page 2, which another slot lists too: copy it"):
        table.check(1, 127, 10)
    table.release(0)
    table.check(1, 127, 10)


def test_shared_pages_whose_entries_are_in_place_may_be_computed_again() -> None:
    table = PageTable(2, 4, 3)
    table.assign(0, [2, 1])
    table.assign(1, [2, 1, 3], written=256)
    assert (table.written(0), table.written(1)) == (0, 256)
    table.check(1, 130, 126)
    table.check(1, 130, 200)
    with pytest.raises(PageError, match="slot 0 would write into page 1"):
        table.check(0, 130, 126)
    table.release(1)
    assert table.written(1) == 0


REFUSED = [
    (3, [0], "slot 3 does not exist: the state has 3 slots"),
    (-1, [0], "slot -1 does not exist"),
    (0, [0, 1, 2, 3, 4], "slot 0 can have 4 pages, got 5"),
    (0, [8, 9], "slot 0 got page 9: there are pages 0 to 8"),
    (0, [-1], "slot 0 got page -1"),
    (1, [4, 5, 4], "slot 1 got a page twice"),
]


@pytest.mark.parametrize(("slot", "pages", "words"), REFUSED, ids=lambda part: str(part)[:20])
def test_refused_pages_change_nothing(slot: int, pages: list[int], words: str) -> None:
    table = PageTable(SLOTS, PAGES, PER_SLOT)
    table.assign(0, [3])
    table.assign(1, [4])
    before = table.table_NP.clone()
    with pytest.raises(PageError, match=words):
        table.assign(slot, pages)
    assert torch.equal(table.table_NP, before)
    assert (table.pages_of(0), table.pages_of(1)) == ([3], [4])
    table.check(0, 0, 128)


def test_a_segment_beyond_the_pages() -> None:
    table = PageTable(1, 4, 4)
    table.assign(0, [0, 1])
    table.check(0, 250, 6)
    with pytest.raises(PageError, match="slot 0 has pages for 256 tokens, the segment needs 257: assign more pages"):
        table.check(0, 250, 7)
