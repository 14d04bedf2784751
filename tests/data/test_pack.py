"""Packing: no token lost or doubled, capacity kept, and bins nearly as few as the tokens allow."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leadline.data.pack import Piece, pack

CASES = st.tuples(
    st.lists(st.integers(0, 70), max_size=60),
    st.integers(1, 40),
    st.integers(1, 20),
)


@settings(max_examples=400, deadline=None)
@given(case=CASES)
def test_every_token_is_in_exactly_one_bin(case: tuple[list[int], int, int]) -> None:
    lengths, capacity, buffer_pieces = case
    bins = list(pack(enumerate(lengths), capacity, buffer_pieces))
    tokens = sorted((p.document, t) for bin in bins for p in bin for t in range(p.start, p.stop))
    assert tokens == [(document, t) for document, length in enumerate(lengths) for t in range(length)]
    assert all(0 < sum(piece.length for piece in bin) <= capacity for bin in bins)
    assert all(piece.length > 0 for bin in bins for piece in bin)


@settings(max_examples=200, deadline=None)
@given(case=CASES)
def test_only_documents_longer_than_a_bin_are_cut(case: tuple[list[int], int, int]) -> None:
    lengths, capacity, buffer_pieces = case
    for bin in pack(enumerate(lengths), capacity, buffer_pieces):
        for piece in bin:
            assert piece.start % capacity == 0
            assert piece.stop in (lengths[piece.document], piece.start + capacity)


@settings(max_examples=100, deadline=None)
@given(case=CASES)
def test_packing_is_deterministic(case: tuple[list[int], int, int]) -> None:
    lengths, capacity, buffer_pieces = case
    assert list(pack(enumerate(lengths), capacity, buffer_pieces)) == list(
        pack(iter(list(enumerate(lengths))), capacity, buffer_pieces)
    )


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The textbook form: for each piece in falling order, look at every bin. Returns the fill of each bin."""
    fills: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, fill in enumerate(fills) if fill + length <= capacity]
        if fitting:
            fills[max(fitting, key=lambda number: fills[number])] += length
        else:
            fills.append(length)
    return sorted(fills)


@settings(max_examples=300, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=60), capacity=st.integers(30, 40))
def test_one_buffer_is_textbook_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    bins = pack(enumerate(lengths), capacity, buffer_pieces=1000)
    assert sorted(sum(piece.length for piece in bin) for bin in bins) == naive_best_fit_decreasing(lengths, capacity)


def test_a_small_case_by_hand() -> None:
    bins = list(pack([(7, 10), (8, 3), (9, 2), (4, 1), (5, 2)], capacity=4))
    # Falling: 4 4 | 3 | 2 2 2 | 1. The 1 goes to the 3 (space 1), not to the lone 2 (space 2).
    assert bins == [
        [Piece(7, 0, 4)],
        [Piece(7, 4, 8)],
        [Piece(7, 8, 10), Piece(9, 0, 2)],
        [Piece(8, 0, 3), Piece(4, 0, 1)],
        [Piece(5, 0, 2)],
    ]


def test_reads_ahead_no_more_than_the_buffer() -> None:
    taken = 0

    def endless() -> Iterator[tuple[int, int]]:
        nonlocal taken
        for taken in itertools.count(1):
            yield taken, 10

    bins = pack(endless(), capacity=30, buffer_pieces=6)
    next(bins)
    assert taken == 6
    for _ in range(100):
        next(bins)
    assert taken <= 6 + 3 * 101


def test_a_large_corpus_packs_tightly_in_seconds() -> None:
    lengths = np.random.default_rng(0).lognormal(5.0, 1.2, 100_000).astype(int) + 1
    begin = time.perf_counter()
    bins = list(pack(enumerate(lengths.tolist()), capacity=4096))
    seconds = time.perf_counter() - begin
    assert sum(piece.length for bin in bins for piece in bin) == lengths.sum()
    assert lengths.sum() / (len(bins) * 4096) > 0.999
    assert seconds < 20  # 0.4 s on an idle core; the limit catches a quadratic algorithm, not a busy machine


def test_part_filled_bins_are_carried_from_buffer_to_buffer() -> None:
    # Each buffer alone holds a tenth of a bin.
    bins = list(pack(((number, 10) for number in range(1000)), capacity=1000, buffer_pieces=10))
    assert len(bins) == 10


@pytest.mark.parametrize(("capacity", "buffer_pieces"), [(0, 1), (1, 0), (-5, 1)])
def test_impossible_sizes_are_refused(capacity: int, buffer_pieces: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        list(pack([(0, 1)], capacity, buffer_pieces))
