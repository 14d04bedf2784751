"""Drafts: guesses of the tokens to come, which ride along with the next step and are verified there.

The drafter says what it would say in the model's place: its logits, shaped and drawn from with the noise of the place
that a guess is for. Nothing that it says can change an answer, only how often a guess is right; so it may be wrong, and
where its logits hold NaN it simply has no guess.

Two kinds of weights guess (`model/mtp.py`, `model/dspark.py`): the MTP block one token, from the streams of the step
and the token that was drawn; the draft stages a block of tokens, from the windows that the trunk's passes left them.
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from leadline.engine.runner import Piece, Runner
from leadline.engine.sampler import draw_of, propose
from leadline.engine.sequence import Sequence
from leadline.model.dspark import DSpark
from leadline.model.transformer import Output, Transformer

Fed = ListOf[tuple[Sequence, Piece]]  # the sequences of a pass, in its order, and what it took in of each


@dataclass(frozen=True)
class Guess:
    """The next tokens of a sequence. survival: for each, how likely it and all before it are right, as far as the
    drafter knows; never rising. damaged: logits with NaN cut the guess short."""

    tokens: tuple[int, ...]
    survival: tuple[float, ...]
    damaged: bool = False


class Drafter(Protocol):
    """name: for people. length: most tokens of a guess."""

    name: str
    length: int

    def guess(self, runner: Runner, output: Output, fed: Fed) -> list[tuple[Sequence, Guess]]:
        """Called after a pass, when its tokens have been added to the sequences: guesses for those that decode."""
        ...


def drafter_of(model: Transformer) -> Drafter:
    """The drafter that a model has weights for."""
    if model.dspark is not None:
        return DSparkDrafter(model.dspark)
    if len(model.mtp):
        return MTPDrafter()
    raise ValueError("speculation needs the MTP block or the draft stages: build the model with_mtp=True")


class MTPDrafter:
    """The MTP block: the token after the next. It takes in every row of a pass, so that its window moves along."""

    name = "MTP"
    length = 1

    def guess(self, runner: Runner, output: Output, fed: Fed) -> list[tuple[Sequence, Guess]]:
        following: list[int] = []
        rows: list[int] = []
        guessing: list[Sequence] = []
        for sequence, piece in fed:
            if _wants(sequence, piece):
                guessing.append(sequence)
                rows.append(len(following) + sequence.seen - 1 - piece.past)
            # Behind a draft that was wrong nothing is known, and what stands there is of no account.
            known = sequence.tokens[piece.past + 1 : piece.past + 1 + len(piece.tokens)]
            following += [*known, *piece.tokens[len(known) :]]
        logits_NV = runner.draft(output, following, rows)
        if not guessing:
            return []
        ids_N1, finite_N1 = propose(logits_NV[:, None], [[draw_of(sequence, 0)] for sequence in guessing])
        return _guesses(guessing, ids_N1, finite_N1, torch.ones_like(ids_N1, dtype=torch.float32))


class DSparkDrafter:
    """The draft stages: a block of tokens, and how likely each is to survive."""

    name = "DSpark"

    def __init__(self, stages: DSpark):
        self._stages = stages
        self.length = stages.config.block_size

    @torch.no_grad()
    def guess(self, runner: Runner, output: Output, fed: Fed) -> list[tuple[Sequence, Guess]]:
        guessing = [sequence for sequence, piece in fed if _wants(sequence, piece)]
        if not guessing:
            return []
        anchors = [Piece((s.tokens[-1],), s.seen, cast("int", s.slot), 0) for s in guessing]
        blocks = runner.draft_blocks(anchors)
        anchor_N = torch.tensor([s.tokens[-1] for s in guessing]).to(blocks.h_NBD.device)
        draws = [[draw_of(sequence, place) for place in range(self.length)] for sequence in guessing]
        ids_NB, finite_NB = propose(blocks.logits_NBV, draws, anchor_N, self._stages.markov_bias)
        previous_NB = torch.cat([anchor_N[:, None], ids_NB[:, :-1]], dim=1)
        confidence_NB = self._stages.confidence(blocks.h_NBD, previous_NB).nan_to_num(0.0)
        return _guesses(guessing, ids_NB, finite_NB, confidence_NB.cumprod(1))


def _wants(sequence: Sequence, piece: Piece) -> bool:
    """Whether a pass drew a token of the sequence that may be followed by drafts."""
    return piece.wanted > 0 and sequence.slot is not None and sequence.most_drafts > 0


def _guesses(
    sequences: ListOf[Sequence], ids_NB: Tensor, finite_NB: Tensor, survival_NB: Tensor
) -> list[tuple[Sequence, Guess]]:
    whole_NB = finite_NB.cumprod(1)
    packed = torch.stack([ids_NB.double(), whole_NB.double(), survival_NB.double()], dim=1)  # one wait for the device
    rows = cast("list[list[list[float]]]", packed.tolist())  # pyright: ignore[reportUnknownMemberType]
    found: list[tuple[Sequence, Guess]] = []
    for sequence, (ids, whole, survival) in zip(sequences, rows, strict=True):
        count = int(sum(whole))
        guess = Guess(tuple(map(int, ids[:count])), tuple(survival[:count]), damaged=count < len(ids))
        found.append((sequence, guess))
    return found
