"""A request: the prompt, when to stop, and how each token is drawn. Frozen: what happens to it is in `sequence.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


class RequestError(ValueError):
    """A request that cannot be served; the message names the field, what was found and what is possible."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits.

    temperature: 0 takes the most likely token. top_k: only the k most likely, 0 = all. top_p: the smallest set of most
    likely tokens whose probability reaches it. min_p: only tokens at least this fraction of the most likely one.
    repetition_penalty: logits of tokens in prompt or output are divided by it when positive and multiplied when
    negative. presence_penalty, frequency_penalty: subtracted once, and once per occurrence, for tokens in the output.
    logit_bias: added to the logits of these ids. seed: a request's tokens depend on its seed and their positions alone,
    never on what else is being served. logprobs: how many alternatives to report with each token; None = no logprobs.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float], hash=False)
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("top_k", 0, 2**31),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -100.0, 100.0),
            ("frequency_penalty", -100.0, 100.0),
        ):
            value = getattr(self, name)
            if not low <= value <= high:  # NaN fails as well
                raise RequestError(f"{name} is {value}: expected {low} to {high}")
        if self.top_p == 0.0:
            raise RequestError("top_p is 0: expected more than 0, which keeps at least one token")
        if not 0.0 < self.repetition_penalty <= 100.0:
            raise RequestError(f"repetition_penalty is {self.repetition_penalty}: expected more than 0, at most 100")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise RequestError(f"logprobs is {self.logprobs}: expected 0 to 20 alternatives")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def truncates(self) -> bool:
        """Whether unlikely tokens are left out."""
        return not self.greedy and (self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0)

    @property
    def penalises(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


LIKE_THE_MODEL = Sampling()


@dataclass(frozen=True)
class ThinkingBudget:
    """At most `tokens` tokens of thinking, counted from the first token of the output; then `end_token` is forced.

    It is for prompts that end inside of the thinking part. Once the model has ended its thinking by itself, the budget
    plays no role any more.
    """

    tokens: int
    end_token: int

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise RequestError(f"the thinking budget is {self.tokens} tokens: expected 0 or more")


class TokenMask(Protocol):
    """A grammar that says which tokens may come next. It belongs to one request and moves with its output."""

    def allowed(self) -> Tensor | None:
        """bool [V] on the CPU, or None when every token may come."""
        ...

    def accept(self, token: int) -> None:
        """The token that was drawn."""
        ...


@dataclass(frozen=True)
class Request:
    """What is asked for.

    prompt: token ids, at least one. max_tokens: most tokens to add. stop_ids: a token of these ends the output and is
    its last. priority: smaller goes first; equal ones in the order of arrival. mask: see `TokenMask`. namespace: the
    prefix cache is shared among requests of one namespace only.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = LIKE_THE_MODEL
    stop_ids: frozenset[int] = frozenset()
    priority: int = 0
    thinking: ThinkingBudget | None = None
    mask: TokenMask | None = None
    namespace: str = ""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError("the prompt is empty: give at least one token")
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}: expected at least 1")
