"""A session of `leadline chat`: a conversation, the engine that answers it, and the screen where that is seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from leadline.data.bundle import Limits
from leadline.engine.engine import Engine
from leadline.engine.request import Request, Sampling, ThinkingBudget
from leadline.engine.sequence import Finish
from leadline.recipes.generate import summary
from leadline.recipes.terminal.answer import Answer, Interrupt, answer, read_ahead
from leadline.recipes.terminal.conversation import Conversation
from leadline.recipes.terminal.screen import Screen
from leadline.text.chat import Section
from leadline.text.tokenizer import Tokenizer
from leadline.text.tools import THINK_END

Result = TypeVar("Result")

ENDINGS = {
    Finish.LENGTH: "The answer was cut: max_tokens or the context is used up.",
    Finish.CANCELLED: "Stopped.",
}


@dataclass
class Session:
    """max_tokens: most of one answer, thinking included. stops_at_interrupt: Ctrl-C ends the answer and not the
    program. limits: of packed files. latest: the latest answer."""

    engine: Engine
    tokenizer: Tokenizer
    screen: Screen
    conversation: Conversation
    sampling: Sampling
    max_tokens: int
    stops_at_interrupt: bool
    limits: Limits
    latest: Answer | None = None
    answers: int = 0

    def read_files(self) -> None:
        """Take the packed files in before the first question, so that the cache knows them whatever it will be."""
        if self.conversation.files:
            ids = tuple(self.conversation.opening().ids(self.tokenizer))
            usage = self._listen(lambda interrupt: read_ahead(self.engine, ids, self.screen, interrupt))
            self.screen.note(f"{usage.prompt_tokens:,} tokens, {usage.cached_tokens:,} of them from the cache")

    def ask(self, text: str) -> None:
        """Add a question and answer it."""
        self.conversation.ask(text)
        self.reply()

    def reply(self) -> None:
        """Answer the open question. Each answer has a seed of its own, so that a second try differs from the first."""
        prompt = self.conversation.prompt()
        assert prompt.opens is not None
        opens: Section = prompt.opens
        sampling = replace(self.sampling, seed=self.sampling.seed + self.answers)
        request = Request(
            tuple(prompt.ids(self.tokenizer)),
            self.max_tokens,
            sampling,
            frozenset({self.tokenizer.eos_id}),
            thinking=self._budget() if opens == "reasoning" else None,
        )
        self.answers += 1
        found = self._listen(
            lambda interrupt: answer(self.engine, request, opens, self.tokenizer, self.screen, interrupt)
        )
        self.conversation.answer(found.content, found.reasoning)
        self.latest = found
        if found.finish in ENDINGS:
            self.screen.note(ENDINGS[found.finish])
        self.screen.note(summary(found.usage, found.clock, found.cache_bytes))

    def _budget(self) -> ThinkingBudget | None:
        tokens = self.conversation.budget
        return None if tokens is None else ThinkingBudget(tokens, self.tokenizer.token_id(THINK_END))

    def _listen(self, act: Callable[[Interrupt], Result]) -> Result:
        interrupt = Interrupt()
        if not self.stops_at_interrupt:
            return act(interrupt)
        with interrupt.listening():
            return act(interrupt)
