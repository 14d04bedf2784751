"""The plan of a step keeps its budgets, always advances somebody, and is fair."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leadline.engine.scheduler import Candidate, admit_drafts, may_admit, plan
from leadline.model.page_table import num_pages


def decoding(number: int, seen: int, drafts: int = 0, priority: int = 0, pages: int | None = None) -> Candidate:
    held = num_pages(seen) if pages is None else pages
    return Candidate(number, (priority, number), seen, 1, drafts, held)


def prompt(number: int, seen: int, pending: int, priority: int = 0, cut: int | None = None) -> Candidate:
    return Candidate(number, (priority, number), seen, pending, 0, num_pages(seen + pending), cut)


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    found: list[Candidate] = []
    for number in range(draw(st.integers(1, 7))):
        seen, priority = draw(st.integers(1, 600)), draw(st.integers(0, 2))
        if draw(st.booleans()):
            found.append(decoding(number, seen, draw(st.integers(0, 6)), priority))
        else:
            pending = draw(st.integers(2, 900))
            cut = draw(st.none() | st.integers(seen + 1, seen + 900))
            found.append(prompt(number, seen, pending, priority, cut))
    return found


@given(candidates(), st.integers(1, 700), st.integers(0, 3))
def test_a_plan_keeps_every_budget_and_advances_somebody(found: list[Candidate], room: int, free: int) -> None:
    chosen = plan(found, step_tokens=room, free_pages=free)
    by_number = {candidate.number: candidate for candidate in found}
    assert sum(share.tokens + share.drafts for share in chosen.shares) <= room
    returned = sum(by_number[number].pages for number in chosen.preempted)
    assert sum(share.new_pages for share in chosen.shares) <= free + returned
    numbers = [share.number for share in chosen.shares]
    assert len(set(numbers)) == len(numbers)
    assert not set(numbers) & set(chosen.preempted)
    for share in chosen.shares:
        candidate = by_number[share.number]
        end = candidate.seen + share.tokens
        assert 1 <= share.tokens <= candidate.pending
        assert share.drafts <= candidate.drafts
        assert candidate.cut is None or end <= candidate.cut
        assert num_pages(end + share.drafts) <= candidate.pages + share.new_pages
    assert chosen.shares or chosen.preempted


@given(candidates(), st.integers(8, 700))
def test_nobody_is_pushed_out_while_pages_are_free(found: list[Candidate], room: int) -> None:
    assert plan(found, step_tokens=room, free_pages=len(found)).preempted == ()


def test_who_answers_goes_before_who_reads() -> None:
    chosen = plan([prompt(0, 0, 5000), decoding(1, 300)], step_tokens=512, free_pages=9)
    shares = {share.number: share.tokens for share in chosen.shares}
    assert shares[1] == 1
    assert shares[0] == 384  # the rest of the step, down to the end of a page


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    chosen = plan([prompt(0, 0, 10**6), prompt(1, 0, 200)], step_tokens=512, free_pages=0)
    assert {share.number: share.tokens for share in chosen.shares} == {0: 256, 1: 200}


def test_the_last_in_order_gives_way_when_pages_run_out() -> None:
    found = [decoding(0, 128), decoding(1, 256), decoding(2, 128, priority=-1)]
    chosen = plan(found, step_tokens=64, free_pages=0)
    assert chosen.preempted == (1,)
    assert {share.number: share.new_pages for share in chosen.shares} == {2: 1, 0: 1}


def test_nobody_gives_way_for_a_guess() -> None:
    """Drafts that would need a page that is not free stay behind, and so do those that the step has no room for."""
    found = [decoding(0, 126, drafts=5), decoding(1, 200, drafts=5)]
    chosen = plan(found, step_tokens=9, free_pages=0)
    assert chosen.preempted == ()
    assert {share.number: share.drafts for share in chosen.shares} == {0: 0, 1: 5}
    chosen = plan(found, step_tokens=9, free_pages=1)
    assert {share.number: (share.drafts, share.new_pages) for share in chosen.shares} == {0: (5, 1), 1: (2, 0)}


def falling(draw: st.DrawFn) -> list[float]:
    chances = draw(st.lists(st.floats(0.0, 1.0), max_size=3))
    return [math.prod(chances[: place + 1]) for place in range(len(chances))]


@given(st.data(), st.sampled_from([0.0, 0.05, 0.3, 2.0]))
def test_admitted_drafts_are_the_best_choice_there_is(data: st.DataObject, cost: float) -> None:
    """No other numbers of drafts bring more tokens per second."""
    survival = data.draw(st.lists(st.composite(falling)(), min_size=1, max_size=3))

    def speed(counts: tuple[int, ...]) -> float:
        expected = sum(1 + sum(run[:count]) for run, count in zip(survival, counts, strict=True))
        return expected / (1 + cost * (len(counts) + sum(counts)))

    best = max(map(speed, itertools.product(*(range(len(run) + 1) for run in survival))))
    assert speed(tuple(admit_drafts(survival, cost))) == pytest.approx(best)


def test_the_surest_drafts_go_first_whoever_has_them() -> None:
    survival = [[0.9, 0.5, 0.1], [], [0.6, 0.55, 0.0]]
    assert admit_drafts(survival, 0.0) == [3, 0, 2]  # what cannot survive is never worth a token
    assert admit_drafts(survival, 0.5) == [1, 0, 0]
    assert admit_drafts(survival, 100.0) == [0, 0, 0]
    assert admit_drafts([[1e-300]], 0.0) == [1]
    assert admit_drafts([], 0.1) == []


def test_a_chunk_ends_where_the_state_is_kept() -> None:
    (share,) = plan([prompt(0, 100, 900, cut=256)], step_tokens=512, free_pages=0).shares
    assert share.tokens == 156


def test_a_newcomer_leaves_a_page_for_everybody() -> None:
    assert may_admit(needed_pages=3, free_pages=3, num_running=0)
    assert may_admit(needed_pages=3, free_pages=5, num_running=2)
    assert not may_admit(needed_pages=3, free_pages=4, num_running=2)
