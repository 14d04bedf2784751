"""Reply: one answer on its way from the engine to a client.

Tokens become events (reasoning, content, calls), stop texts cut the content, and tokens are counted by what they were
for. However a client reads, streaming or all at once, it reads this one sequence of steps.
"""

from __future__ import annotations

import asyncio
import codecs
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import xgrammar

from leadline.engine.sequence import Event as EngineEvent
from leadline.engine.sequence import Finish, Token
from leadline.serve.kept import Unfinished
from leadline.serve.limits import Refused
from leadline.serve.service import Service
from leadline.serve.wanted import Wanted
from leadline.text.chat import Mode, Section
from leadline.text.events import CallBegin, CallEnd, ContentDelta, EndOfTurn, Event, ReasoningDelta, message_of
from leadline.text.messages import Message
from leadline.text.parse import TokenParser
from leadline.text.tokenizer import Tokenizer
from leadline.text.tools import DSML, THINK_END

_LOG = logging.getLogger("leadline.serve")

FETCH_PATH = "/v1/responses"
KEPT_CODE = "answer_kept"
NO_FRAME: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Said:
    """A token of the text, with the part of the answer that it belongs to."""

    token: Token
    section: Section


@dataclass(frozen=True)
class Step:
    """What one step of the engine brought: events, and the tokens drawn, of which some text may still be held back."""

    events: Sequence[Event]
    said: Sequence[Said] = ()


@dataclass(frozen=True)
class Ending:
    """How an answer ended, and what it took. stop: the stop text that ended it. budget: of the thinking, if any.
    reasoning_tokens, cached_tokens: parts of the output and of the prompt."""

    reason: Literal["stop", "length", "tool_calls"]
    stop: str | None
    mode: Mode
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    budget: int | None


class Parser(Protocol):
    """Ids to events."""

    def feed(self, ids: Iterable[int]) -> list[Event]: ...

    def finish(self) -> list[Event]: ...


class PlainText:
    """The parser of an answer that is nothing but text: control tokens are left out."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder("utf8")("replace")

    def feed(self, ids: Iterable[int]) -> list[Event]:
        return self._content(b"".join(map(self._tokenizer.token_bytes, ids)), final=False)

    def finish(self) -> list[Event]:
        return self._content(b"", final=True)

    def _content(self, data: bytes, *, final: bool) -> list[Event]:
        text = self._characters.decode(data, final)
        return [ContentDelta(text)] if text else []


class StopTexts:
    """Cuts content where a stop text begins, and holds back what may turn out to be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """The part of the text so far that is safe to give out."""
        text = self._held + text
        places = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if places:
            at, self.found = min(places)
            self._held = ""
            return text[:at]
        held = max(
            (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back; no stop text came of it."""
        held, self._held = self._held, ""
        return held


class Reply:
    """One answer. It is in the engine's queue from the moment it is made; whoever makes it reads or closes it.

    grammar: the compiled form. frame: what is known of the response object that will show it, with the id; empty: a
    protocol without such objects asked. said: tokens of it that another server has said. The tokens of an answer that
    begins with thinking count as thinking up to the token that ends it.
    """

    def __init__(
        self,
        service: Service,
        wanted: Wanted,
        grammar: xgrammar.CompiledGrammar | None = None,
        *,
        frame: Mapping[str, Any] = NO_FRAME,
        said: Sequence[int] = (),
    ):
        self._service, self._wanted, self._said = service, wanted, tuple(said)
        self.frame = frame or {"id": new_id("resp"), "created_at": int(time.time())}
        self._parser: Parser = PlainText(service.tokenizer)
        if wanted.opens is not None:
            self._parser = TokenParser(service.tokenizer, wanted.opens)
        self._section: Section = wanted.opens or "content"
        self._stops = StopTexts(wanted.stop)
        self._think_end, self._dsml = (service.tokenizer.token_id(token) for token in (THINK_END, DSML))
        self.output_tokens = self.reasoning_tokens = 0
        """So far; a step may bring several."""
        self._has_calls = self._in_calls = self._cut = False
        self._start = time.monotonic()
        self._first: float | None = self._start if said else None
        self.ending: Ending | None = None
        """Known after the last step."""
        self._stream = service.worker.submit(wanted.request(service, grammar), self._said, self.record)

    async def steps(self) -> AsyncGenerator[Step, None]:
        """The answer, step by step. Raises Refused when the engine gives it up. However this is left, the sequence has
        ended then."""
        reason = Finish.STOP
        try:
            async for event in self._events():
                if event.finish is Finish.ERROR:
                    raise Refused(500, event.error or "the engine gave the answer up", kind="server_error")
                if event.finish is Finish.CANCELLED and not self._cut:
                    raise self._suspended()
                if not self._cut:
                    step = self._step(event)
                    if step.events or step.said:
                        yield step
                    if self._cut:
                        self._stream.cancel()
                    elif event.finish is not None:
                        reason = event.finish
            events = [] if self._cut else self._visible(self._parser.finish())
            events += [ContentDelta(held)] if not self._cut and (held := self._stops.finish()) else []
            self._end(reason)
            if events:
                yield Step(events)
        finally:
            self._stream.close()

    @property
    def prompt_tokens(self) -> int:
        return len(self._wanted.prompt)

    def record(self) -> Unfinished:
        """What to keep of this answer."""
        return Unfinished(self.frame["id"], self._wanted.namespace, self.frame, self._wanted.as_json(), self._said)

    @property
    def kept_id(self) -> str | None:
        """Under which id the answer will go on, once the server has ended it and keeps it."""
        return self.frame["id"] if self._stream.kept else None

    def close(self) -> None:
        """Nobody reads this answer any more."""
        self._stream.close()

    async def whole(self) -> tuple[Message, list[Said], Ending]:
        """The complete answer as a message, with its tokens."""
        events: list[Event] = []
        said: list[Said] = []
        async for step in self.steps():
            events += step.events
            said += step.said
        assert self.ending is not None
        return message_of(events), said, self.ending

    # -- inside ---------------------------------------------------------------------------------------------------

    async def _events(self) -> AsyncGenerator[EngineEvent, None]:
        if self._said:
            yield EngineEvent(-1, tuple(Token(id) for id in self._said))
        async for event in self._stream:
            yield event

    def _suspended(self) -> Refused:
        if self.kept_id is None:
            return Refused(503, "the server is shutting down", kind="server_error")
        return Refused(
            503,
            f"the server is shutting down; the answer goes on at its next start: GET {FETCH_PATH}/{self.kept_id}",
            kind="server_error",
            code=KEPT_CODE,
            kept=[self.kept_id],
        )

    def _step(self, event: EngineEvent) -> Step:
        events: list[Event] = []
        said: list[Said] = []
        for token in event.tokens:
            self._count(token)
            fed = self._parser.feed([token.id])
            if token.id == self._think_end or any(not isinstance(each, ReasoningDelta) for each in fed):
                self._section = "content"
            if not self._in_calls and self._service.tokenizer.token_bytes(token.id):
                said.append(Said(token, self._section))
            events += self._visible(fed)
            if self._cut:
                break
        return Step(_without_end(events), said)

    def _count(self, token: Token) -> None:
        if self._first is None:
            self._first = time.monotonic()
            self._service.metrics.first_token(self._first - self._start)
        self.output_tokens += 1
        self.reasoning_tokens += self._section == "reasoning"
        # In an answer that is nothing but text, the token that begins calls begins nothing.
        self._in_calls = self._in_calls or (token.id == self._dsml and not isinstance(self._parser, PlainText))

    def _visible(self, events: Iterable[Event]) -> list[Event]:
        """Events as the client may see them; sets `_cut` where the answer ends by them."""
        shown: list[Event] = []
        for event in events:
            if self._cut:
                break
            if isinstance(event, ContentDelta):
                text = self._stops.feed(event.text)
                shown += [ContentDelta(text)] if text else []
                self._cut = self._stops.found is not None
                continue
            if isinstance(event, CallBegin):
                held = self._stops.finish()
                shown += [ContentDelta(held)] if held else []
            self._has_calls = self._has_calls or isinstance(event, CallEnd)
            self._cut = self._wanted.one_call and isinstance(event, CallEnd)
            shown.append(event)
        return shown

    def _end(self, finish: Finish) -> None:
        usage = self._stream.usage
        cached = usage.cached_tokens if usage else 0
        cut_short = finish is Finish.LENGTH and not self._cut
        reason = "length" if cut_short else "tool_calls" if self._has_calls else "stop"
        budget = self._wanted.budget if self._wanted.thinks else None
        self.ending = Ending(
            reason,
            self._stops.found,
            self._wanted.mode,
            self.prompt_tokens,
            cached,
            self.output_tokens,
            self.reasoning_tokens,
            budget,
        )
        metrics, now = self._service.metrics, time.monotonic()
        metrics.prompt(self.prompt_tokens, cached)
        if usage:
            metrics.guesses(usage.drafted, usage.accepted)
        # The token that ends the thinking counts as thinking, so a budget of n is spent when n + 1 tokens were.
        spent = budget is not None and self.reasoning_tokens > budget
        metrics.answer(self._wanted.mode, reason, self.output_tokens, self.reasoning_tokens, spent)
        if self._said:
            return  # how long it took has been said elsewhere
        per_token = (now - self._first) / (self.output_tokens - 1) if self._first and self.output_tokens > 1 else None
        metrics.times(now - self._start, per_token)


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def _without_end(events: list[Event]) -> list[Event]:
    return [event for event in events if not isinstance(event, EndOfTurn)]


def close_all(replies: Iterable[Reply]) -> None:
    """Nobody reads these answers any more; without effect on those that have ended."""
    for reply in replies:
        reply.close()


async def merged(replies: Sequence[Reply]) -> AsyncGenerator[tuple[int, Step | None], None]:
    """Steps of several answers as they come, each with the answer's number; None in place of a step: it has ended."""
    if len(replies) == 1:
        async with aclosing(replies[0].steps()) as steps:
            async for step in steps:
                yield 0, step
        yield 0, None
        return
    queue: asyncio.Queue[tuple[int, Step | None] | BaseException] = asyncio.Queue()

    async def read(number: int, reply: Reply) -> None:
        try:
            async for step in reply.steps():
                queue.put_nowait((number, step))
            queue.put_nowait((number, None))
        except Refused as error:
            error.kept = [id for each in replies if (id := each.kept_id) is not None]
            queue.put_nowait(error)

    tasks = [asyncio.create_task(read(number, reply)) for number, reply in enumerate(replies)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            left -= item[1] is None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        close_all(replies)
