"""Segment: the one batch type.

A segment is a ragged batch: the new tokens of N sequences laid one behind the other, and for each sequence how many of
its tokens were seen before (its *past*). Training is the case where every past is 0, decoding the case where every
sequence brings one new token, chunked prefill anything between. No padding, and no other batch type: this is what makes
one attention path possible.

A sequence's tokens have the positions past, past+1, ...; sequences never see each other, and compression starts anew at
position 0 of each. A sequence with a past keeps its memory in a `State` at the row `slot`.

All layers of a model need the same few index lists ("which rows of ring and new keys form the window?"). They are
worked out once for each forward pass, in `SegmentIndex`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """New tokens of N sequences.

    tokens_T: int64 token ids, T = sum(lengths).
    lengths: new tokens of each sequence, each at least 1.
    past: tokens of each sequence that were seen before.
    slots: the row of the `State` that holds each sequence's memory (unused when there is no state).
    places_known: whether past and slots are the true ones; see `on_device`.
    """

    tokens_T: Tensor
    lengths: tuple[int, ...]
    past: tuple[int, ...]
    slots: tuple[int, ...]
    places_known: bool = True

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

    @classmethod
    def on_device(cls, tokens_T: Tensor, positions_T: Tensor, slots_N: Tensor, longest: int) -> Segment:
        """A decoding step whose places only the device knows, for a graph that is captured once and replayed.

        tokens_T, positions_T: int64 [T], the same number of tokens of each sequence, one sequence behind the other.
        slots_N: int64 [N]. All three are read anew in each replay. longest: no sequence has more tokens, the new ones
        included, than this. What `State.reserve` would see to is the caller's to check.
        """
        num_sequences = len(slots_N)
        length = len(tokens_T) // num_sequences
        past, slots = (longest - length,) * num_sequences, tuple(range(num_sequences))
        segment = cls(tokens_T, (length,) * num_sequences, past, slots, places_known=False)
        # The cached properties are put in place: what is captured must not work them out, or read others.
        sequence_T = torch.arange(num_sequences, device=tokens_T.device).repeat_interleave(length)
        place_T = torch.arange(length, device=tokens_T.device).repeat(num_sequences)
        segment.__dict__.update(positions_T=positions_T, slots_N=slots_N, sequence_T=sequence_T, place_T=place_T)
        return segment

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

    @cached_property
    def place_T(self) -> Tensor:
        """Place of every new token among those of its own sequence, int64."""
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.device)

    @cached_property
    def slots_N(self) -> Tensor:
        """The slots as a tensor, int64."""
        return torch.tensor(self.slots, device=self.device)
