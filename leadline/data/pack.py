"""Packing: documents of any length into bins of fixed capacity, whole wherever possible.

Training wants batches of equal size. Cutting the corpus every so many tokens would break most documents in two and take
their context away; *best-fit decreasing* keeps them whole: pieces are placed in falling order of length, each into the
bin with the least space that still suffices (Ding et al., "Fewer truncations improve language modeling", 2024; report
4.1 packs documents to the same end). Only a document longer than a bin is cut: into full bins, and a rest that is
packed like any other document.

Pieces of equal length are placed together. The bin with the least sufficient space s takes s // length of them at once:
after each, its space is again the least that suffices, or too small for any. The spaces that some bin has are the set
bits of one integer, so "the least space of at least `length`" is a shift and a lowest set bit.

The look-ahead is a buffer of so many pieces, each buffer packed on its own. It bounds time and memory, and it keeps a
shuffle alive: over the whole corpus at once, documents of rare lengths would share a bin with the same few others in
every epoch. The emptiest bin of a buffer is taken apart and its pieces join the next buffer; without that, each buffer
would leave one bin part-filled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import NamedTuple

# Fills bins of 1,024 to 65,536 tokens to more than 99.9% where documents are mostly shorter than a bin.
BUFFER_PIECES = 2048


class Piece(NamedTuple):
    """Tokens start..stop-1 of a document."""

    document: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def pack(
    documents: Iterable[tuple[int, int]], capacity: int, buffer_pieces: int = BUFFER_PIECES
) -> Iterator[list[Piece]]:
    """Bins of at most `capacity` tokens that hold every token of the documents exactly once.

    documents: pairs (number, length in tokens); a document of length 0 vanishes. Bins follow the order of the documents
    as far as the buffer allows, pieces in a bin keep it. Deterministic; reads ahead at most `buffer_pieces` pieces.
    """
    if capacity < 1 or buffer_pieces < 1:
        raise ValueError(f"capacity {capacity} and buffer_pieces {buffer_pieces} must be at least 1")
    pieces = _cut(documents, capacity)
    waiting: list[Piece] = []
    while new := list(islice(pieces, buffer_pieces)):
        *bins, waiting = _emptiest_last(_pack_buffer(waiting + new, capacity))
        yield from bins
    if waiting:
        yield waiting


def _pack_buffer(buffer: list[Piece], capacity: int) -> list[list[Piece]]:
    bins = _best_fit_decreasing([piece.length for piece in buffer], capacity)
    return [[buffer[number] for number in members] for members in bins]


def _emptiest_last(bins: list[list[Piece]]) -> list[list[Piece]]:
    emptiest = min(range(len(bins)), key=lambda number: sum(piece.length for piece in bins[number]))
    return [*bins[:emptiest], *bins[emptiest + 1 :], bins[emptiest]]


def _cut(documents: Iterable[tuple[int, int]], capacity: int) -> Iterator[Piece]:
    for document, length in documents:
        for start in range(0, length, capacity):
            yield Piece(document, start, min(start + capacity, length))


def _best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Bins of item numbers; each item's length is in 1..capacity."""
    bins: list[list[int]] = []
    bins_with_space: defaultdict[int, list[int]] = defaultdict(list)
    spaces = 0  # bit s is set if some bin has space s
    falling = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    for length, equals in groupby(falling, key=lambda number: lengths[number]):
        waiting = list(equals)
        while waiting:
            sufficient = spaces >> length << length
            if sufficient:
                space = (sufficient & -sufficient).bit_length() - 1
                chosen = bins_with_space[space].pop()
                if not bins_with_space[space]:
                    spaces ^= 1 << space
            else:
                space, chosen = capacity, len(bins)
                bins.append([])
            fitting = space // length
            placed, waiting = waiting[:fitting], waiting[fitting:]
            bins[chosen] += placed
            left = space - len(placed) * length
            bins_with_space[left].append(chosen)
            spaces |= 1 << left
    return sorted((sorted(members) for members in bins), key=lambda members: members[0])
