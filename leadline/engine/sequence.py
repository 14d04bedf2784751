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
    drafted, accepted: guesses that were verified, and those that were right."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    drafted: int
    accepted: int


@dataclass
class Sequence:
    """A request and its life.

    tokens: prompt and output. seen: how many of them the state in `slot` has taken in. written: tokens whose entries
    are in their pages already and must not be written again. pages: page numbers that hold its entries. draft: a guess
    of the token after the last one. node: where its full pages end in the prefix cache.
    """

    number: int
    request: Request
    tokens: list[int] = field(init=False)
    seen: int = 0
    written: int = 0
    slot: int | None = None
    pages: list[int] = field(default_factory=list[int])
    draft: int | None = None
    node: Node | None = None
    cached_tokens: int | None = None
    drafted: int = 0
    accepted: int = 0
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
        return Usage(len(self.request.prompt), self.num_output, self.cached_tokens or 0, self.drafted, self.accepted)

    def forced(self) -> int | None:
        """The token that must come next because the thinking budget is spent; None when the model is free."""
        budget = self.request.thinking
        if budget is None or self.thinking_ended or self.num_output < budget.tokens:
            return None
        return budget.end_token

    @property
    def may_draft(self) -> bool:
        """Whether the token after the next can be drawn before the next is known to be the draft: not under a grammar,
        and not where the thinking budget is about to speak."""
        budget = self.request.thinking
        spent = budget is not None and not self.thinking_ended and self.num_output + 1 >= budget.tokens
        return self.request.mask is None and not spent

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
