"""Row indices of a segment of any lengths: what a layer looks back at is gathered before it looks.

The keys of the past that the window still needs go in front of the new keys, the entries of each sequence come out of
their pages one behind the other; so what a query sees are runs of rows (`ops.reach`). Where they lie so already, they
are read in place. One layer's copy exists at a time, and against the work on a chunk of tokens it costs little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from leadline.model.config import CSA_RATIO
from leadline.model.rows import Layout, PoolRows, RingRows, ring_length
from leadline.model.segment import Segment
from leadline.ops.reach import Reach


class _Needed:
    """The rows of a ring that a segment still needs: those of the positions `first` to past - 1 of each sequence."""

    def __init__(self, segment: Segment, first: Sequence[int]):
        self._segment, self.first = segment, first
        counts = [past - low for low, past in zip(first, segment.past, strict=True)]
        self._starts = np.cumsum([0, *counts])

    def ring_rows(self, ring: int) -> list[np.ndarray]:
        """Where they lie in a ring of this length."""
        runs = zip(self.first, self._segment.past, self._segment.slots, strict=True)
        return [slot * ring + np.arange(low, past) % ring for low, past, slot in runs]

    def rows_of(self, sequence: int, positions: np.ndarray) -> np.ndarray:
        """Rows in [needed rows, new rows] of some positions of a sequence; -1 before its first token."""
        past = self._segment.past[sequence]
        old = self._starts[sequence] + positions - self.first[sequence]
        new = self._starts[-1] + self._segment.starts[sequence] + positions - past
        return np.where(positions < 0, -1, np.where(positions < past, old, new))


class ChunkRows:
    """Row indices of a segment. layout: of the state in use; None when there is none, and then the finished entries of
    the segment are all there is, sequence by sequence."""

    def __init__(self, segment: Segment, window: int, layout: Layout | None):
        self._segment, self._window, self._layout = segment, window, layout
        self._spare = layout.spare_tokens if layout else 0
        self._ends = [past + length for past, length in zip(segment.past, segment.lengths, strict=True)]
        self._oldest = [max(0, past - window + 1) for past in segment.past]  # that the first new token still sees
        self._in_place = self._reads_in_place()

    def ring(self) -> RingRows:
        """Around the window."""
        ring = self._window + self._spare
        needed = _Needed(self._segment, self._oldest)
        order = None
        if len(self._ends) > 1 and any(self._segment.past):
            runs = zip(self._oldest, self._ends, strict=True)
            order = self._joined([needed.rows_of(n, np.arange(*run)) for n, run in enumerate(runs)])
        return RingRows(self._joined(needed.ring_rows(ring)), order, *self._kept_rows(ring))

    def pool(self, ratio: int) -> PoolRows:
        """Around the tails and entries of the layers of a ratio."""
        ring = ring_length(ratio) + self._spare
        slots = np.arange(-ratio, ratio) if ratio == CSA_RATIO else np.arange(ratio)
        finished = self._finished(ratio)
        needed = _Needed(self._segment, self._oldest_pooled(finished, ratio, int(slots[0])))
        seen = None
        if not self._in_place:
            seen = self._joined(self._entry_rows(ratio, [np.arange(end // ratio) for end in self._ends]))
        return PoolRows(
            self._joined(needed.ring_rows(ring)),
            self._joined([needed.rows_of(n, numbers[:, None] * ratio + slots) for n, numbers in enumerate(finished)]),
            self._joined(finished) * ratio,
            self._joined(self._entry_rows(ratio, finished)),
            seen,
            *self._kept_rows(ring),
        )

    def window_reach(self) -> Reach:
        """What the queries of window-only layers see: the last W keys, their own among them."""
        first, last, base = [], [], 0
        for past, end, oldest in zip(self._segment.past, self._ends, self._oldest, strict=True):
            positions = np.arange(past, end)
            first.append(base + np.maximum(0, positions - self._window + 1) - oldest)
            last.append(base + positions - oldest)
            base += end - oldest
        return Reach(self._segment.lengths, self._joined(first), self._joined(last))

    def entry_reach(self, ratio: int, window: Reach) -> Reach:
        """What the queries of layers of a ratio see: the same keys, and entries. Entry j is visible to query t iff
        j < floor((t + 1) / ratio): the token that completes an entry sees it."""
        if self._in_place:
            first = [int(rows[0]) for rows in self._entry_rows(ratio, [np.zeros(1, dtype=np.int64)] * len(self._ends))]
        else:
            first = np.cumsum([0, *(end // ratio for end in self._ends[:-1])]).tolist()
        segment = self._segment
        first_N = torch.tensor(first, device=segment.device)
        return replace(
            window,
            first_entry_T=first_N[segment.sequence_T],
            visible_T=torch.div(segment.positions_T + 1, ratio, rounding_mode="floor"),
            most_visible=max(self._ends) // ratio,
        )

    def _reads_in_place(self) -> bool:
        """Whether the entries of each sequence lie one behind the other already."""
        if self._layout is None:
            return True
        pages, runs = self._layout.pages, zip(self._segment.slots, self._ends, strict=True)
        return self._layout.in_place and all(pages.in_a_row(slot, end) for slot, end in runs)

    def _finished(self, ratio: int) -> list[np.ndarray]:
        """Numbers of the entries that each sequence finishes in this segment, less those that are in place already."""
        written = [self._layout.pages.written(slot) if self._layout else 0 for slot in self._segment.slots]
        runs = zip(self._segment.past, written, self._ends, strict=True)
        return [np.arange(min(max(past, old), end) // ratio, end // ratio) for past, old, end in runs]

    def _oldest_pooled(self, finished: Sequence[np.ndarray], ratio: int, first_slot: int) -> list[int]:
        """Position of the oldest token that the finished entries of each sequence pool, but no later than its past."""
        pairs = zip(finished, self._segment.past, strict=True)
        return [min(past, max(0, int(j[0]) * ratio + first_slot)) if len(j) else past for j, past in pairs]

    def _entry_rows(self, ratio: int, entries: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Rows of some entries of each sequence among those of the state, by their numbers in the sequence."""
        if self._layout is None:
            starts = np.cumsum([0, *(end // ratio for end in self._ends[:-1])])
            return [start + numbers for start, numbers in zip(starts, entries, strict=True)]
        pages = self._layout.pages
        return [pages.rows(slot, ratio, numbers) for slot, numbers in zip(self._segment.slots, entries, strict=True)]

    def _kept_rows(self, ring: int) -> tuple[Tensor, Tensor]:
        """The latest new rows, as many as the ring holds, and where in the ring they go."""
        new, kept = [], []
        segment = self._segment
        for length, past, slot, start in zip(segment.lengths, segment.past, segment.slots, segment.starts, strict=True):
            latest = np.arange(max(0, length - ring), length)
            new.append(start + latest)
            kept.append(slot * ring + (past + latest) % ring)
        return self._joined(new), self._joined(kept)

    def _joined(self, rows: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(rows).astype(np.int64, copy=False)).to(self._segment.device)
