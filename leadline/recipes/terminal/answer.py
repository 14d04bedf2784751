"""One answer: a prompt through the engine, what comes out onto a screen."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from leadline.engine.engine import Engine
from leadline.engine.generate import GenerationError
from leadline.engine.request import Request
from leadline.engine.sequence import Event as EngineEvent
from leadline.engine.sequence import Finish, Usage
from leadline.recipes.generate import Clock
from leadline.recipes.terminal.screen import Screen
from leadline.text.chat import Section
from leadline.text.events import CallBegin, ContentDelta, Event, ReasoningDelta
from leadline.text.parse import TokenParser
from leadline.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer:
    """What was said, how it ended, and what it took. cache_bytes: the most that was held."""

    content: str
    reasoning: str
    finish: Finish
    usage: Usage
    clock: Clock
    cache_bytes: int


class Interrupt:
    """Whether Ctrl-C was pressed. It is asked between steps, because an engine stopped in a step is in no order."""

    def __init__(self) -> None:
        self.pressed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The first Ctrl-C in the block sets `pressed`; the second, should a step last long, raises as usual."""
        before = signal.signal(signal.SIGINT, self._press)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _press(self, signum: int, frame: object) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


def read_ahead(engine: Engine, prompt: tuple[int, ...], screen: Screen, interrupt: Interrupt) -> Usage:
    """Take a prompt in without an answer, so that the cache knows it. The one token that it costs is dropped."""
    number = engine.submit(Request(prompt, 1))
    try:
        for event in _steps(engine, number, len(prompt), screen, interrupt):
            if event.error:
                raise GenerationError(event.error)
    finally:
        screen.read(len(prompt), len(prompt))
    return engine.usage(number)


def answer(
    engine: Engine,
    request: Request,
    opens: Section,
    tokenizer: Tokenizer,
    screen: Screen,
    interrupt: Interrupt,
) -> Answer:
    """Submit a request to an engine that serves nothing else, and show its answer until it ends or is interrupted.

    Raises RequestError, and GenerationError when the engine gives up; what was shown until then is then lost.
    """
    number = engine.submit(request)
    parser, relay = TokenParser(tokenizer, opens), _Relay(screen)
    clock, cache_bytes, finish = Clock(time.monotonic()), 0, Finish.CANCELLED
    try:
        for event in _steps(engine, number, len(request.prompt), screen, interrupt):
            if event.error:
                raise GenerationError(event.error)
            for token in event.tokens:
                clock.tick()
                relay.take(parser.feed([token.id]), tokens=1)
            finish = event.finish or finish
            cache_bytes = max(cache_bytes, engine.cache_bytes)
        relay.take(parser.finish(), tokens=0)
    finally:
        screen.end()
    return Answer("".join(relay.content), "".join(relay.reasoning), finish, engine.usage(number), clock, cache_bytes)


def _steps(
    engine: Engine, number: int, prompt_tokens: int, screen: Screen, interrupt: Interrupt
) -> Iterator[EngineEvent]:
    """Run the engine until it has nothing to do, and report how far it has read."""
    while engine.busy:
        if interrupt.pressed:
            engine.cancel(number)
        yield from engine.step()
        seen = engine.seen(number)
        if 0 < seen < prompt_tokens:
            screen.read(seen, prompt_tokens)


class _Relay:
    """Hands events to a screen and collects them."""

    def __init__(self, screen: Screen) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self._screen = screen
        self._thinking_tokens = 0

    def take(self, events: list[Event], tokens: int) -> None:
        if not self.content:
            self._thinking_tokens += tokens
        for event in events:
            if isinstance(event, ReasoningDelta):
                self.reasoning.append(event.text)
                self._screen.think(event.text, self._thinking_tokens)
            elif isinstance(event, ContentDelta):
                self.content.append(event.text)
                self._screen.say(event.text)
            elif isinstance(event, CallBegin):  # nobody has declared a tool that could be called
                self._screen.note(f"The model tried to call {event.name}.")
