"""The runner: pieces of sequences into a segment, through the model, and back as logits."""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import dataclass

import torch
from torch import Tensor

from leadline.model.segment import Segment
from leadline.model.state import State
from leadline.model.transformer import Output, Transformer


@dataclass(frozen=True)
class Piece:
    """New tokens of one sequence in a step. past: tokens before them; slot: its memory; wanted: of how many of the last
    rows logits are needed."""

    tokens: tuple[int, ...]
    past: int
    slot: int
    wanted: int


class Runner:
    """A model and the state of everything it serves."""

    def __init__(self, model: Transformer, state: State):
        self.model, self.state = model, state
        self.device = model.embed.weight.device

    @torch.no_grad()
    def run(self, pieces: ListOf[Piece]) -> tuple[Output, Tensor]:
        """One forward pass: its output, and FP32 logits [wanted rows of all pieces, V]."""
        segment = Segment.of(
            *(piece.tokens for piece in pieces),
            past=[piece.past for piece in pieces],
            slots=[piece.slot for piece in pieces],
            device=self.device,
        )
        output = self.model(segment, self.state)
        rows = [
            start + row
            for start, piece in zip(segment.starts, pieces, strict=True)
            for row in range(len(piece.tokens) - piece.wanted, len(piece.tokens))
        ]
        return output, self._logits(output.streams_TSD[self._rows(rows)])

    @torch.no_grad()
    def _logits(self, streams_NSD: Tensor) -> Tensor:
        return self.model.logits(self.model.hidden(streams_NSD))

    @torch.no_grad()
    def draft(self, output: Output, next_tokens: ListOf[int], rows: ListOf[int]) -> Tensor:
        """Logits [rows, V] of the token after the next, from the MTP block; `next_tokens` has one id for each row of
        the step. It takes in every row, so that its window moves along with the trunk's."""
        next_T = torch.tensor(next_tokens, dtype=torch.int64).to(self.device)
        hidden_TD, _ = self.model.predict_second(output, next_T, self.state)
        return self.model.logits(hidden_TD[self._rows(rows)])

    def _rows(self, rows: ListOf[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64).to(self.device)
