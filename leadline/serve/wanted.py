"""Wanted: an answer that is asked for, as data.

It holds everything that decides what is said and how it is read, and nothing that belongs to a process. So it can be
written down and read by another server, which goes on with the same tokens: each of them depends on those before it,
the seed and its position alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import xgrammar

from leadline.engine.request import Request, Sampling, ThinkingBudget
from leadline.serve.grammar import Format
from leadline.serve.service import Service
from leadline.text.chat import Mode, Section
from leadline.text.tools import DSML, THINK_END


@dataclass(frozen=True)
class Wanted:
    """opens: what the answer begins with; None: it is text and nothing else, without a conversation. budget: most
    tokens of thinking. form: of the answer, to be enforced. may_call: whether markup of calls may come. one_call: the
    answer ends with its first call. stop: texts that end it. namespace: see `Request`."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    mode: Mode = "non-think"
    opens: Section | None = None
    budget: int | None = None
    form: Format | None = None
    may_call: bool = True
    one_call: bool = False
    stop: tuple[str, ...] = ()
    namespace: str = ""

    @property
    def thinks(self) -> bool:
        """Whether the answer begins with thinking."""
        return self.opens == "reasoning"

    def request(self, service: Service, grammar: xgrammar.CompiledGrammar | None) -> Request:
        """What the engine is asked for. grammar: the compiled form."""
        tokenizer, grammars, sampling = service.tokenizer, service.grammars, self.sampling
        if not self.may_call:
            sampling = replace(sampling, logit_bias={**sampling.logit_bias, tokenizer.token_id(DSML): float("-inf")})
        mask = grammars.known_only() if grammars.has_unknown_ids else None
        if grammar is not None:
            mask = grammars.mask(grammar, self.thinks)
        budget = None
        if self.thinks and self.budget is not None:
            budget = ThinkingBudget(self.budget, tokenizer.token_id(THINK_END))
        stop_ids = frozenset({tokenizer.eos_id})
        return Request(
            self.prompt, self.max_tokens, sampling, stop_ids, thinking=budget, mask=mask, namespace=self.namespace
        )

    def as_json(self) -> dict[str, Any]:
        """Itself in JSON's types. Log-probabilities are not asked for again: those of the tokens so far are gone."""
        short = replace(self, prompt=(), sampling=replace(self.sampling, logprobs=None))
        return {**asdict(short), "prompt": self.prompt}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Wanted:
        """Raises ValueError, TypeError or KeyError for what `as_json` has not written."""
        sampling = given["sampling"]
        bias = {int(token): value for token, value in sampling["logit_bias"].items()}
        lists = {"prompt": tuple(given["prompt"]), "stop": tuple(given["stop"])}
        return cls(**{**given, **lists, "sampling": Sampling(**{**sampling, "logit_bias": bias})})
