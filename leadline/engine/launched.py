"""Launched: a pass that is queued on the device, and whose tokens the host does not know yet.

Where all that run just decode, the host would be idle while the card computes, and the card while the host takes in
what was drawn: the ends of answers, pages, text. So the step behind is launched first. It needs of the tokens before it
no more than that they exist: they lie on the device, where it is fed with them, and their places are known. Then the
host waits for the tokens, and works on them while the card is busy with the step behind. Thus between two calls of
`Engine.step` at most one step is launched whose tokens nobody knows.

A sequence may turn out to have ended, by a stop id, by NaN or because it was cancelled, when a step behind its end is
launched. That step's row is thrown away, and nothing has to be undone:

- It wrote one row of each ring of a slot, and one row of entries at most. The slot is given back, and cleared or
  restored before anybody gets it; the rows of entries lie behind the last token that was said, in a page that nobody
  shares: pages are shared when they are full.
- Slot and page may belong to another sequence before the device has come to that step. What the new owner writes is
  queued on the same stream, behind it.
- Where a sequence goes on, the fixed block at the end of a page is kept as it is before the step behind overwrites the
  oldest row of the window: its copy is queued between the two (`blocks`).

The step behind has to wait where more than the existence of a token must be known (`rows_behind`).
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field

from leadline.engine.runner import Piece
from leadline.engine.sampler import Drawn
from leadline.engine.scheduler import Share
from leadline.engine.sequence import Sequence, Token
from leadline.model.state import FixedBlock
from leadline.model.transformer import Output


@dataclass
class Launched:
    """A pass. shares: its sequences, and how much of each it takes in. owners: the sequence of each token that is drawn
    behind it, and of how many drafts the token stands. drawn: these tokens; None if there are none. decodes: whether
    each share is the last known token of its sequence, and nothing else. blocks: by the number of the sequence, fixed
    blocks as the pass leaves them, where a step behind it would change what is to be kept. output, pieces: what the
    drafter goes by; there is none where steps are launched behind others."""

    shares: list[tuple[Sequence, Share]]
    owners: list[tuple[Sequence, int]]
    drawn: Drawn | None
    decodes: bool
    output: Output | None = None
    pieces: list[Piece] = field(default_factory=list[Piece])
    blocks: dict[int, FixedBlock] = field(default_factory=dict[int, FixedBlock])

    @property
    def alive(self) -> bool:
        """Whether any of its sequences still runs."""
        return any(sequence.slot is not None for sequence, _ in self.shares)

    def tokens(self) -> dict[int, list[Token | None]]:
        """The tokens by the number of their sequence: one, and another behind each draft that turned out right. Waits
        until they are drawn."""
        found: dict[int, list[Token | None]] = {}
        drawn = self.drawn.tokens() if self.drawn is not None else []
        for (sequence, place), token in zip(self.owners, drawn, strict=True):
            before = found.setdefault(sequence.number, [])
            if len(before) == place and (place == 0 or _id(before[-1]) == sequence.drafts[place - 1]):
                before.append(token)
        return found


def piece_of(sequence: Sequence, share: Share) -> Piece:
    """What a pass takes in of a sequence."""
    assert sequence.slot is not None
    known = sequence.tokens[sequence.seen : sequence.seen + share.tokens]
    due = share.tokens == sequence.pending
    tokens = (*known, *sequence.drafts[: share.drafts])
    return Piece(tokens, sequence.seen, sequence.slot, 1 + share.drafts if due else 0)


def rows_behind(launched: Launched, running: ListOf[Sequence]) -> list[int]:
    """The rows of a pass, that is of its shares, which the step behind it has as well: of all sequences that run but
    for those whose last token is drawn now. None, because the step behind has to wait,

    - when a sequence that runs is not in the pass, or takes in a prompt;
    - when it takes the next token itself to say how the one behind is drawn: for a grammar, for penalties, and where a
      thinking budget ends."""
    alive = [(row, sequence) for row, (sequence, _) in enumerate(launched.shares) if sequence.slot is not None]
    if not launched.decodes or len(alive) < len(running):
        return []
    behind = [(row, each) for row, each in alive if each.num_output + 1 < each.request.max_tokens]
    if any(each.request.sampling.penalises or each.most_drafts == 0 for _, each in behind):
        return []
    return [row for row, _ in behind]


def _id(token: Token | None) -> int | None:
    return None if token is None else token.id
