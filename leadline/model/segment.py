"""Segment: the one batch type, and the row indices that its layers share.

A segment is a ragged batch: the new tokens of N sequences laid one behind the other, and for each sequence how many of
its tokens were seen before (its *past*). Training is the case where every past is 0, decoding the case where every
sequence brings one new token, chunked prefill anything between. No padding, and no other batch type: this is what makes
one attention path possible.

A sequence's tokens have the positions past, past+1, ...; sequences never see each other, and compression starts anew at
position 0 of each. A sequence with a past keeps its memory in a `State` at the row `slot`.

All layers of a model need the same few index lists ("which rows of [ring, new keys] form the window?"). They are
worked out once for each forward pass, in `SegmentIndex`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from leadline.model.config import CSA_RATIO, ModelConfig
from leadline.ops.reach import Reach
from leadline.ops.rope import frequencies, rotations


@dataclass(frozen=True)
class Segment:
    """New tokens of N sequences.

    tokens_T: int64 token ids, T = sum(lengths).
    lengths: new tokens of each sequence, each at least 1.
    past: tokens of each sequence that were seen before.
    slots: the row of the `State` that holds each sequence's memory (unused when there is no state).
    """

    tokens_T: Tensor
    lengths: tuple[int, ...]
    past: tuple[int, ...]
    slots: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.tokens_T.ndim != 1 or self.tokens_T.dtype != torch.int64:
            raise ValueError(
                f"tokens must be a flat int64 tensor, got {self.tokens_T.dtype} {tuple(self.tokens_T.shape)}"
            )
        if not len(self.lengths) == len(self.past) == len(self.slots):
            raise ValueError(f"lengths, past and slots differ in number: {self.lengths}, {self.past}, {self.slots}")
        if any(length < 1 for length in self.lengths) or sum(self.lengths) != len(self.tokens_T):
            raise ValueError(f"lengths {self.lengths} must be positive and sum to {len(self.tokens_T)} tokens")
        if any(number < 0 for number in (*self.past, *self.slots)):
            raise ValueError(f"past {self.past} and slots {self.slots} must not be negative")
        if len(set(self.slots)) != len(self.slots):
            raise ValueError(f"slots {self.slots} must differ: two sequences cannot share one memory")

    @classmethod
    def of(
        cls,
        *sequences: Sequence[int] | Tensor,
        past: Sequence[int] | None = None,
        slots: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> Segment:
        """Build a segment from the new token ids of each sequence."""
        parts = [torch.as_tensor(sequence, dtype=torch.int64, device=device) for sequence in sequences]
        return cls(
            tokens_T=torch.cat(parts),
            lengths=tuple(len(part) for part in parts),
            past=tuple(past) if past is not None else (0,) * len(parts),
            slots=tuple(slots) if slots is not None else tuple(range(len(parts))),
        )

    @property
    def device(self) -> torch.device:
        return self.tokens_T.device

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_T)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Row of each sequence's first new token."""
        starts, row = [], 0
        for length in self.lengths:
            starts.append(row)
            row += length
        return tuple(starts)

    @cached_property
    def positions_T(self) -> Tensor:
        """Position of every new token in its own sequence, int64."""
        runs = [torch.arange(p, p + n) for p, n in zip(self.past, self.lengths, strict=True)]
        return torch.cat(runs).to(self.device)

    @cached_property
    def sequence_T(self) -> Tensor:
        """Number of the sequence that every new token belongs to, int64."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths)).to(self.device)


Rotation = tuple[Tensor, Tensor]  # cos and sin


@dataclass(frozen=True)
class RingRows:
    """Row indices around one ring (a fixed number of recent rows per slot, position p at p mod length).

    source_X: rows of [ring rows of all slots, new rows] that make up the past-and-new sequence of this segment; None
    when no sequence has a past, so that the new rows alone are it.
    keep_new, keep_ring: which new rows to store, and in which ring rows, so that the ring holds the latest again.
    """

    source_X: Tensor | None
    keep_new: Tensor
    keep_ring: Tensor


@dataclass(frozen=True)
class PoolRows:
    """Row indices of one compression ratio.

    rows_CG: rows of [ring rows of all slots, new rows] for every slot of every entry finished by this segment, -1
    empty.
    rotation: cos and sin [C, R/2] at the position of each entry, which is that of the first token of its window.
    entry_rows_C: row of each finished entry in the entries that the layer sees. keep_*: as in `RingRows`.
    """

    rows_CG: Tensor
    rotation: Rotation
    entry_rows_C: Tensor
    keep_new: Tensor
    keep_ring: Tensor


def ring_length(ratio: int) -> int:
    """Recent tokens a compressor must remember: one window, or two where windows overlap (ratio 4)."""
    return 2 * ratio if ratio == CSA_RATIO else ratio


class SegmentIndex:
    """Every row index and rotation that the layers of one forward pass share.

    num_slots, capacity: slots, and entries per slot by ratio, of the `State` in use; capacity is None when there is no
    state, and then the finished entries of the segment are all there is, sequence by sequence.
    """

    def __init__(self, segment: Segment, config: ModelConfig, num_slots: int, capacity: dict[int, int] | None):
        if capacity is None and any(segment.past):
            raise ValueError(f"sequences with a past {segment.past} need a state")
        self.segment, self.config = segment, config
        self.num_slots = num_slots if capacity is not None else 0
        self.ring = self._ring_rows()
        self._rotation = {0: self._rotate(segment.positions_T, 0)}
        self._reach = {0: self._window_reach()}
        self.pool: dict[int, PoolRows] = {}
        for ratio in sorted(set(config.layer_ratios) - {0}):
            entries = None if capacity is None else capacity[ratio]
            self._rotation[ratio] = self._rotate(segment.positions_T, ratio)
            self.pool[ratio] = self._pool_rows(ratio, entries)
            self._reach[ratio] = self._entry_reach(ratio, entries)

    @property
    def positions_T(self) -> Tensor:
        return self.segment.positions_T

    def rotation(self, ratio: int) -> Rotation:
        """cos and sin [T, R/2] of the new tokens in a layer of this ratio."""
        return self._rotation[ratio]

    def _rotate(self, positions: Tensor, ratio: int) -> Rotation:
        """Window-only layers rotate with the plain base; CSA and HCA layers with their own base and YaRN, in every
        part: queries, window keys, entries, index queries and keys, and the output's rotation back."""
        c = self.config
        if ratio == 0:
            pairs = frequencies(c.qk_rope_head_dim, c.rope_theta)
        else:
            pairs = frequencies(
                c.qk_rope_head_dim,
                c.compress_rope_theta,
                factor=c.rope_factor,
                original_positions=c.original_max_position_embeddings,
                beta_fast=c.beta_fast,
                beta_slow=c.beta_slow,
            )
        return rotations(positions, pairs.to(positions.device))

    def reach(self, ratio: int) -> Reach:
        """What the queries of a layer of this ratio may see."""
        return self._reach[ratio]

    def _tensor(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows.astype(np.int64, copy=False)).to(self.segment.device)

    def _rows_of(self, sequence: int, positions: np.ndarray, ring: int) -> np.ndarray:
        """Rows in [ring rows of all slots, new rows] of some positions of a sequence; -1 before its first token."""
        past, slot, start = (part[sequence] for part in (self.segment.past, self.segment.slots, self.segment.starts))
        old = slot * ring + positions % ring
        new = self.num_slots * ring + start + positions - past
        return np.where(positions < 0, -1, np.where(positions < past, old, new))

    def _kept_rows(self, ring: int) -> tuple[Tensor, Tensor]:
        new, kept = [], []
        segment = self.segment
        for length, past, slot, start in zip(segment.lengths, segment.past, segment.slots, segment.starts, strict=True):
            latest = np.arange(max(0, length - ring), length)
            new.append(start + latest)
            kept.append(slot * ring + (past + latest) % ring)
        return self._tensor(np.concatenate(new)), self._tensor(np.concatenate(kept))

    def _oldest_key(self, past: int) -> int:
        """Position of the oldest key that the first new token still sees."""
        return max(0, past - self.config.sliding_window + 1)

    def _ring_rows(self) -> RingRows:
        segment = self.segment
        source = None
        if any(segment.past):
            source = self._tensor(
                np.concatenate(
                    [
                        self._rows_of(n, np.arange(self._oldest_key(past), past + length), self.config.sliding_window)
                        for n, (past, length) in enumerate(zip(segment.past, segment.lengths, strict=True))
                    ]
                )
            )
        return RingRows(source, *self._kept_rows(self.config.sliding_window))

    def _window_reach(self) -> Reach:
        first, last, base = [], [], 0
        for past, length in zip(self.segment.past, self.segment.lengths, strict=True):
            oldest = self._oldest_key(past)
            positions = np.arange(past, past + length)
            first.append(base + np.maximum(0, positions - self.config.sliding_window + 1) - oldest)
            last.append(base + positions - oldest)
            base += past + length - oldest
        return Reach(self.segment.lengths, self._tensor(np.concatenate(first)), self._tensor(np.concatenate(last)))

    def _finished(self, ratio: int) -> list[np.ndarray]:
        """Numbers of the entries that each sequence finishes in this segment."""
        pairs = zip(self.segment.past, self.segment.lengths, strict=True)
        return [np.arange(past // ratio, (past + length) // ratio) for past, length in pairs]

    def _first_entries(self, ratio: int, capacity: int | None) -> list[int]:
        """Row of each sequence's entry 0."""
        if capacity is not None:
            return [slot * capacity for slot in self.segment.slots]
        counts = [len(numbers) for numbers in self._finished(ratio)]
        return [sum(counts[:n]) for n in range(len(counts))]

    def _pool_rows(self, ratio: int, capacity: int | None) -> PoolRows:
        ring = ring_length(ratio)
        slots = np.arange(-ratio, ratio) if ratio == CSA_RATIO else np.arange(ratio)
        finished = self._finished(ratio)
        rows = [self._rows_of(n, j[:, None] * ratio + slots, ring) for n, j in enumerate(finished)]
        entry_rows = [first + j for first, j in zip(self._first_entries(ratio, capacity), finished, strict=True)]
        return PoolRows(
            self._tensor(np.concatenate(rows)),
            self._rotate(self._tensor(np.concatenate(finished) * ratio), ratio),
            self._tensor(np.concatenate(entry_rows)),
            *self._kept_rows(ring),
        )

    def _entry_reach(self, ratio: int, capacity: int | None) -> Reach:
        """Entry j is visible to query t iff j < floor((t + 1) / ratio): the token that completes a window sees it."""
        first_N = torch.tensor(self._first_entries(ratio, capacity), device=self.segment.device)
        visible_T = torch.div(self.positions_T + 1, ratio, rounding_mode="floor")
        first_T = first_N[self.segment.sequence_T]
        tokens = map(sum, zip(self.segment.past, self.segment.lengths, strict=True))
        return replace(self._reach[0], first_entry_T=first_T, visible_T=visible_T, most_visible=max(tokens) // ratio)
