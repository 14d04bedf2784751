"""The runner: pieces of sequences into a segment, through the model, and back as logits."""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from leadline.model.segment import Segment
from leadline.model.state import State
from leadline.model.transformer import DraftBlocks, Output, Transformer
from leadline.ops.transfer import send


class Piece(NamedTuple):
    """New tokens of one sequence in a step. past: tokens before them; slot: its memory; wanted: of how many of the last
    rows logits are needed."""

    tokens: tuple[int, ...]
    past: int
    slot: int
    wanted: int


class Step(Protocol):
    """A step that was run, as far as drafts go on from it."""

    def predict_second(self, output: Output, next_T: Tensor) -> Tensor:
        """Hidden vectors of the MTP block behind the step, [T, D]."""
        ...


class Steps(Protocol):
    """Decoding steps that are not the model's own forward pass: `FixedSteps`, or `NativeSteps`."""

    @property
    def compile_seconds(self) -> float: ...

    def run(self, tokens_T: Tensor, past: ListOf[int], slots: ListOf[int]) -> tuple[Output | None, Tensor]:
        """A step that brings the same number of tokens of each sequence: its output, None where nobody drafts, and the
        logits of all rows, perhaps with others behind them. tokens_T: int64, on the host or on the device."""
        ...

    def step_of(self, output: Output) -> Step | None:
        """The latest step, if it gave this output."""
        ...


class Runner:
    """A model and the state of everything it serves. steps: of another make than the model's forward pass, if any."""

    def __init__(self, model: Transformer, state: State, steps: Steps | None):
        self.model, self.state, self.steps = model, state, steps
        self.device = model.embed.weight.device

    @property
    def captures(self) -> bool:
        """Whether decoding steps are captured, so that to launch one is next to no work."""
        return self.steps is not None and self.device.type == "cuda"

    @torch.no_grad()
    def run(self, pieces: ListOf[Piece], step: bool = False) -> tuple[Output | None, Tensor]:
        """One forward pass: its output, None where it is known that nobody drafts, and FP32 logits [wanted rows of all
        pieces, V]. step: the pieces are equally long and no longer than what the state's spare tokens allow; `steps`
        takes it where there are such."""
        if step and self.steps is not None:
            tokens_T = torch.tensor([token for piece in pieces for token in piece.tokens])
            output, logits_TV = self.steps.run(tokens_T, [p.past for p in pieces], [p.slot for p in pieces])
            return output, self._selected(logits_TV, _wanted_rows(pieces))
        segment = Segment.of(
            *(piece.tokens for piece in pieces),
            past=[piece.past for piece in pieces],
            slots=[piece.slot for piece in pieces],
            device=self.device,
        )
        output = self.model(segment, self.state)
        streams_NSD = output.streams_TSD[self._rows(_wanted_rows(pieces))]
        return output, self.model.logits(self.model.hidden(streams_NSD))

    @torch.no_grad()
    def decode(self, tokens_N: Tensor, past: ListOf[int], slots: ListOf[int]) -> Tensor:
        """FP32 logits [N, V] of a step of one token for each of N sequences: int64 ids, which only the device has to
        know yet. It is not waited for where steps are captured."""
        if self.steps is not None:
            return self.steps.run(tokens_N, past, slots)[1][: len(past)]
        segment = Segment(tokens_N, (1,) * len(past), tuple(past), tuple(slots))
        return self.model.logits(self.model.hidden(self.model(segment, self.state).streams_TSD))

    @torch.no_grad()
    def draft(self, output: Output, next_tokens: ListOf[int], rows: ListOf[int]) -> Tensor:
        """Logits [rows, V] of the token after the next, from the MTP block; `next_tokens` has one id for each row of
        the step. It takes in every row, so that its window moves along with the trunk's."""
        padding = output.index.segment.num_tokens - len(next_tokens)
        next_T = self._rows([*next_tokens, *[0] * padding])
        step = self.steps.step_of(output) if self.steps is not None else None
        if step is not None:
            hidden_TD = step.predict_second(output, next_T)
        else:
            hidden_TD, _ = self.model.predict_second(output, next_T, self.state)
        return self.model.logits(hidden_TD[self._rows(rows)])

    @torch.no_grad()
    def draft_blocks(self, anchors: ListOf[Piece]) -> DraftBlocks:
        """What the draft stages say behind the last token of each sequence, which the state has not taken in."""
        segment = Segment.of(
            *(anchor.tokens for anchor in anchors),
            past=[anchor.past for anchor in anchors],
            slots=[anchor.slot for anchor in anchors],
            device=self.device,
        )
        return self.model.draft(segment, self.state)

    def _selected(self, x_TX: Tensor, rows: ListOf[int]) -> Tensor:
        # The first rows are a view; others would be copied.
        return x_TX[: len(rows)] if list(rows) == list(range(len(rows))) else x_TX[self._rows(rows)]

    def _rows(self, rows: ListOf[int]) -> Tensor:
        return send(torch.tensor(rows, dtype=torch.int64), self.device)


def _wanted_rows(pieces: ListOf[Piece]) -> list[int]:
    rows: list[int] = []
    end = 0
    for piece in pieces:
        end += len(piece.tokens)
        rows += range(end - piece.wanted, end)
    return rows
