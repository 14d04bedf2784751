"""Reach: which keys and entries each query of a segment may see, and how a reference walks over them.

A query sees a run of window keys and either a run of entries (all visible ones) or a list of picked entries. `Reach`
holds the runs; every op that looks back takes one.

The references never hold a [tokens, entries] matrix. They walk over *tiles* of queries, and per tile over *columns*:
the keys or entries that some query of the tile sees. When the tile lies in one sequence the columns are shared by its
queries (one matrix product); when it mixes short sequences, as in batched decoding, every query brings its own.
`torch.matmul` treats both alike, so the arithmetic above is written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reach:
    """What each query may see.

    lengths: queries of each sequence, in order; sum T (host numbers).
    first_key_T, last_key_T: int64, the run of rows of the window keys, both ends included.
    first_entry_T: int64, row of the sequence's entry 0; visible_T: int64, how many entries are visible. Both are None
    on layers that have no entries.
    most_visible: the largest visible_T, or more than that, where a graph is captured that later steps replay. A number
    of the host, because it decides the shapes of what the indexer returns; no op reads it off the device.
    """

    lengths: tuple[int, ...]
    first_key_T: Tensor
    last_key_T: Tensor
    first_entry_T: Tensor | None = None
    visible_T: Tensor | None = None
    most_visible: int | None = None


class Tile(NamedTuple):
    """A run of queries. `shared`: all of one sequence, so that they can share columns."""

    start: int
    stop: int
    shared: bool

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


class Columns(NamedTuple):
    """The vectors a tile looks at.

    vectors: [X, K] shared by the tile's b queries, or [b, X, K], one list per query.
    seen: bool [b, X]; False = this query must not see this column.
    rows: where the vectors came from: a slice of the source, or int64 [b, X].
    """

    vectors: Tensor
    seen: Tensor
    rows: slice | Tensor


SHORT = 8  # sequences with at most this many queries are put into mixed tiles


def tiles(lengths: tuple[int, ...], size: int) -> Iterator[Tile]:
    """Cut the queries into tiles of at most `size`: long sequences alone, neighbouring short ones together."""
    start = 0
    mixed = start
    for length in lengths:
        if length > SHORT:
            if mixed < start:
                yield Tile(mixed, start, False)
            for at in range(start, start + length, size):
                yield Tile(at, min(at + size, start + length), True)
            mixed = start + length
        elif start + length - mixed > size:
            yield Tile(mixed, start, False)
            mixed = start
        start += length
    if mixed < start:
        yield Tile(mixed, start, len(lengths) == 1)


def key_columns(keys_XK: Tensor, reach: Reach, tile: Tile) -> Columns:
    """The window keys of a tile."""
    first, last = reach.first_key_T[tile.rows, None], reach.last_key_T[tile.rows, None]
    if tile.shared:
        low, high = int(first[0]), int(last[-1]) + 1
        column = torch.arange(low, high, device=first.device)
        return Columns(keys_XK[low:high], (column >= first) & (column <= last), slice(low, high))
    rows = first + torch.arange(int((last - first).max()) + 1, device=first.device)
    seen = rows <= last
    rows = torch.minimum(rows, last)
    return Columns(keys_XK[rows], seen, rows)


# A shared tile takes all visible entries and masks the unpicked ones while they are at most this many times the picks:
# one large matrix product beats a gather until then.
MASK_RATHER_THAN_GATHER = 4


def entry_columns(entries_CK: Tensor, reach: Reach, tile: Tile, picked_TM: Tensor | None) -> Columns:
    """The entries of a tile: all visible ones, or the picked ones (numbers within the sequence, -1 = no pick)."""
    assert reach.first_entry_T is not None
    assert reach.visible_T is not None
    first, visible = reach.first_entry_T[tile.rows, None], reach.visible_T[tile.rows, None]
    most = int(visible.max())
    if tile.shared and (picked_TM is None or most <= MASK_RATHER_THAN_GATHER * picked_TM.shape[1]):
        low = int(first[0])
        if picked_TM is None:
            seen = torch.arange(most, device=first.device) < visible
        else:
            # one spare column takes the marks of the missing picks
            seen = torch.zeros(len(first), most + 1, dtype=torch.bool, device=first.device)
            picked = picked_TM[tile.rows]
            seen.scatter_(1, torch.where(picked < 0, most, picked), True)
            seen = seen[:, :most]
        return Columns(entries_CK[low : low + most], seen, slice(low, low + most))
    number = torch.arange(most, device=first.device) if picked_TM is None else picked_TM[tile.rows]
    if not len(entries_CK):  # then all picks are -1, and there is no row to stand in for them
        number = number[..., :0]
    seen = number < visible if picked_TM is None else number >= 0
    rows = first + number.expand(len(first), -1).clamp_min(0)
    rows = torch.where(seen, rows, first).clamp_max(len(entries_CK) - 1)
    vectors = entries_CK.index_select(0, rows.flatten()).unflatten(0, rows.shape)
    # Without an entry of its own, a query was given another sequence's, and a NaN there survives a weight of 0.
    vectors[visible.flatten() == 0] = 0.0
    return Columns(vectors, seen, rows)


def add_rows(target_XK: Tensor, rows: slice | Tensor, values: Tensor) -> None:
    """target[rows] += values, for rows as in `Columns`."""
    if isinstance(rows, slice):
        target_XK[rows] += values
    else:
        target_XK.index_add_(0, rows.flatten(), values.flatten(0, -2))


def weighted_columns(weights_bHX: Tensor, vectors_bHK: Tensor, rows: slice | Tensor) -> Tensor:
    """Sum over the heads (and, for shared columns, over the queries) of weight x vector: [X, K] or [b, X, K]."""
    if isinstance(rows, slice):
        return weights_bHX.flatten(0, 1).T @ vectors_bHK.flatten(0, 1)
    return weights_bHX.mT @ vectors_bHK
