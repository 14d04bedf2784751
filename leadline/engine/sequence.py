"""A sequence: a request and its life. The one mutable record of what it has said and where its memory lies."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from leadline.engine.prefix import Node
from leadline.engine.request import Request


class Finish(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class Token:
    """One emitted token. logprob: of the model's own distribution, before temperature and truncation; top: the most
    likely alternatives with theirs. Both are None unless asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] | None = None


@dataclass(frozen=True)
class Event:
    """What a step did for one sequence: the tokens it added, and, with the last ones, why it ended."""

    sequence: int
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    error: str | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of a sequence. cached_tokens: of the prompt, taken from the prefix cache when it was first admitted.
    drafted, accepted: guesses that were verified, and those that were right, by their place behind the known tokens;
    drafter: who made them."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    drafter: str = ""

    @property
    def num_drafted(self) -> int:
        return sum(self.drafted)

    @property
    def num_accepted(self) -> int:
        return sum(self.accepted)


@dataclass
class Sequence:
    """A request and its life.

    tokens: prompt and output. seen: how many of them the state in `slot` has taken in. written: tokens whose entries
    are in their pages already and must not be written again. pages: page numbers that hold its entries. drafts: guesses
    of the tokens after the last one, not verified yet; survival: how likely each and those before it are right. node:
    where its full pages end in the prefix cache. links: names of its full pages there, as far as they are known; they
    depend on its tokens alone, so they stay when its memory goes. drafted, accepted, drafter: as in `Usage`.
    """

    number: int
    request: Request
    drafter: str = ""
    tokens: list[int] = field(init=False)
    seen: int = 0
    written: int = 0
    slot: int | None = None
    pages: list[int] = field(default_factory=list[int])
    drafts: tuple[int, ...] = ()
    survival: tuple[float, ...] = ()
    node: Node | None = None
    links: list[bytes] = field(default_factory=list[bytes])
    cached_tokens: int | None = None
    drafted: list[int] = field(default_factory=list[int])
    accepted: list[int] = field(default_factory=list[int])
    output_counts: Counter[int] = field(default_factory=Counter[int])
    thinking_ended: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def pending(self) -> int:
        """Tokens that the state has not taken in; 1 while decoding."""
        return len(self.tokens) - self.seen

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: priority, then arrival."""
        return self.request.priority, self.number

    @property
    def usage(self) -> Usage:
        drafts = tuple(self.drafted), tuple(self.accepted), self.drafter
        return Usage(len(self.request.prompt), self.num_output, self.cached_tokens or 0, *drafts)

    def forced(self) -> int | None:
        """The token that must come next because the thinking budget is spent; None when the model is free."""
        budget = self.request.thinking
        if budget is None or self.thinking_ended or self.num_output < budget.tokens:
            return None
        return budget.end_token

    @property
    def most_drafts(self) -> int:
        """How many drafts can be of use: as many as tokens can be drawn before those before them are known to be the
        drafts. None under a grammar, none that the thinking budget would have a word about, and never all the tokens
        that may still come: one is drawn in any case."""
        if self.request.mask is not None:
            return 0
        left, budget = self.request.max_tokens - self.num_output, self.request.thinking
        if budget is not None and not self.thinking_ended:
            left = min(left, budget.tokens - self.num_output)
        return max(0, left - 1)

    def propose(self, drafts: tuple[int, ...], survival: tuple[float, ...]) -> None:
        """Put drafts in the place of those there were."""
        self.drafts, self.survival = drafts, survival

    def count_drafts(self, verified: int, right: int) -> None:
        """Remember that so many drafts were verified, and that the first `right` of them became output."""
        missing = [0] * (verified - len(self.drafted))
        self.drafted += missing
        self.accepted += missing
        for place in range(verified):
            self.drafted[place] += 1
            self.accepted[place] += place < right

    def append(self, token: int) -> Finish | None:
        """Add a token of the output; returns why the sequence ends with it, if it does."""
        self.tokens.append(token)
        self.output_counts[token] += 1
        if self.request.mask is not None:
            self.request.mask.accept(token)
        if self.request.thinking is not None and token == self.request.thinking.end_token:
            self.thinking_ended = True
        if token in self.request.stop_ids:
            return Finish.STOP
        return Finish.LENGTH if self.num_output >= self.request.max_tokens else None
