"""Pages are neither lost nor given twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leadline.engine.pages import PageError, PagePool


@given(st.lists(st.tuples(st.sampled_from(["take", "hold", "release"]), st.integers(0, 5)), max_size=60))
def test_every_page_is_free_or_held_and_never_both(actions: list[tuple[str, int]]) -> None:
    pool = PagePool(8)
    holds: list[list[int]] = []
    for action, number in actions:
        if action == "take":
            if number > pool.num_free:
                with pytest.raises(PageError, match="asked for"):
                    pool.take(number)
            else:
                holds.append(pool.take(number))
        elif holds and action == "hold":
            shared = holds[number % len(holds)]
            pool.hold(shared)
            holds.append(list(shared))
        elif holds:
            pool.release(holds.pop(number % len(holds)))
        counts = [sum(page in held for held in holds) for page in range(8)]
        assert [pool.holders(page) for page in range(8)] == counts
        assert pool.num_free == counts.count(0)


def test_a_free_page_can_be_neither_shared_nor_released() -> None:
    pool = PagePool(2)
    (page,) = pool.take(1)
    pool.release([page])
    with pytest.raises(PageError, match="released twice"):
        pool.release([page])
    with pytest.raises(PageError, match="only a page in use"):
        pool.hold([page])
    assert pool.num_free == 2
