"""The real page in the real Chromium, from the real server, in front of an engine that says what a test wants."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, sync_playwright
from playwright.sync_api import Request as HttpRequest

from leadline.engine.engine import Engine, Settings
from leadline.engine.request import Request, RequestError
from leadline.engine.sequence import Event, Finish, Token, Usage
from leadline.model.transformer import Transformer
from leadline.serve.limits import Keys
from leadline.serve.service import Policy, Service
from leadline.text.tokenizer import EOS_TOKEN, Control, Tokenizer
from leadline.text.tools import THINK_END

EOS = Control(EOS_TOKEN)
HOLD = "(hold)"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


class Running(Protocol):
    @property
    def url(self) -> str: ...


Serving = Callable[[Service], AbstractContextManager[Running]]


@dataclass
class Turn:
    """What the engine says to one request. hold: after so many tokens it waits until `open` is set; None: it does not.
    fails: and then it ends with this error."""

    ids: list[int]
    hold: int | None = None
    fails: str | None = None
    said: int = 0
    open: threading.Event = field(default_factory=threading.Event)


class Scripted(Engine):
    """An engine whose answers are written down: turn by turn, `stride` tokens in each step, 1 unless a test says so."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, max_tokens: int):
        super().__init__(model, Settings(slots=2, pages=40, max_tokens=max_tokens, step_tokens=128))
        self._tokenizer = tokenizer
        self._turns: deque[Turn] = deque()
        self._open: dict[int, tuple[Request, Turn]] = {}
        self._ended: list[Event] = []
        self.cached_tokens, self.stride = 0, 1
        self._prompt_tokens: dict[int, int] = {}

    def say(self, *pieces: str, fails: str | None = None) -> Turn:
        """Write down the answer to the next request that nothing is written down for; it waits at `HOLD`."""
        at = pieces.index(HOLD) if HOLD in pieces else len(pieces)
        before = self._tokenizer.encode_pieces(pieces[:at])
        after = self._tokenizer.encode_pieces([*pieces[at + 1 :], EOS])
        self._turns.append(Turn(before + after, len(before) if at < len(pieces) else None, fails))
        return self._turns[-1]

    def forget(self) -> None:
        """Nothing is written down any more."""
        self._turns.clear()
        self.cached_tokens, self.stride = 0, 1

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    @property
    def busy(self) -> bool:
        return bool(self._open or self._ended)

    def prompt_tokens(self) -> int:
        """Of the only request that has not ended."""
        (count,) = self._prompt_tokens.values()
        return count

    @property
    def think_end(self) -> int:
        return self._tokenizer.token_id(THINK_END)

    def submit(self, request: Request, said: tuple[int, ...] = ()) -> int:
        if not self._turns:
            raise RequestError("nothing is written down for this request")
        number = self._next_number
        self._next_number += 1
        self._open[number] = request, self._turns.popleft()
        self._prompt_tokens[number] = len(request.prompt)
        return number

    def cancel(self, number: int) -> None:
        if self._open.pop(number, None) is not None:
            self._ended.append(Event(number, finish=Finish.CANCELLED))

    def usage(self, number: int) -> Usage:
        return Usage(self._prompt_tokens.pop(number), 0, self.cached_tokens)

    def step(self) -> list[Event]:
        events, self._ended = self._ended, []
        for number, (request, turn) in list(self._open.items()):
            if turn.said == turn.hold and not turn.open.is_set():
                time.sleep(0.002)
                continue
            if turn.fails is not None and turn.said == (turn.hold or 0):
                events.append(Event(number, finish=Finish.ERROR, error=turn.fails))
                del self._open[number]
                continue
            end = turn.hold if turn.hold is not None and turn.said < turn.hold else len(turn.ids)
            tokens = turn.ids[turn.said : min(turn.said + self.stride, end)]
            turn.said += len(tokens)
            finish = Finish.LENGTH if turn.said == request.max_tokens else None
            if tokens[-1] in request.stop_ids:
                finish = Finish.STOP
            events.append(Event(number, tuple(map(Token, tokens)), finish))
            if finish is not None:
                del self._open[number]
        return events


@dataclass
class Stage:
    """A page in front of a scripted engine. sent: bodies of the requests for answers, in their order. complaints: what
    the browser wrote to its console."""

    page: Page
    url: str
    script: Scripted | None
    sent: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    complaints: list[str] = field(default_factory=list[str])

    @property
    def engine(self) -> Scripted:
        """The engine behind the page, where it is a scripted one."""
        assert self.script is not None
        return self.script

    def ask(self, text: str) -> None:
        self.page.get_by_role("textbox", name="Question").fill(text)
        self.page.get_by_role("textbox", name="Question").press("Enter")

    def answer(self, number: int = -1) -> Locator:
        return self.page.locator(".assistant").nth(number)

    def choose(self, mode: str) -> None:
        self.page.get_by_role("radio", name=mode, exact=True).check()


Visit = Callable[..., AbstractContextManager[Stage]]


@contextlib.contextmanager
def visited(browser: Browser, url: str, engine: Scripted | None, **options: Any) -> Iterator[Stage]:
    """A fresh page with a storage of its own; at the end the browser must have nothing to complain of."""
    if engine is not None:
        engine.forget()
    with browser.new_context(reduced_motion="reduce", **options) as context:
        context.set_default_timeout(10_000)
        page = context.new_page()
        stage = Stage(page, url, engine)

        def heard(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                stage.complaints.append(message.text)

        def asked(request: HttpRequest) -> None:
            if request.url.endswith("/v1/chat/completions"):
                stage.sent.append(json.loads(request.post_data or "{}"))

        page.on("console", heard)
        page.on("pageerror", lambda error: stage.complaints.append(str(error)))
        page.on("request", asked)
        page.goto(url)
        yield stage
        assert stage.complaints == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium. Its driver keeps an event loop running in this thread, in which no other test could start its own, so
    it ends with the module."""
    path = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    assert path, "these tests drive the page in Chromium: install it, on Debian with `apt-get install chromium`"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def scripted(model: Transformer, tokenizer: Tokenizer) -> Callable[[int], Scripted]:
    """scripted(max_tokens): an engine of that context."""
    return lambda max_tokens: Scripted(model, tokenizer, max_tokens)


@pytest.fixture(scope="module")
def visit(browser: Browser) -> Visit:
    """visit(url, engine, **options of the browser's context): a fresh page, for as long as the context lasts."""
    return lambda url, engine=None, **options: visited(browser, url, engine, **options)


@pytest.fixture(scope="session")
def stand(
    serving: Serving, scripted: Callable[[int], Scripted], tokenizer: Tokenizer
) -> Iterator[tuple[str, Scripted]]:
    """One server for all pages."""
    engine = scripted(4096)
    with serving(Service(engine, tokenizer, Policy("deep", allow_short_max=True), Keys([]))) as running:
        yield running.url, engine


@pytest.fixture
def open_page(visit: Visit, stand: tuple[str, Scripted]) -> Callable[..., AbstractContextManager[Stage]]:
    """open_page(**options): a page of that server."""
    return lambda **options: visit(*stand, **options)


@pytest.fixture
def stage(open_page: Callable[..., AbstractContextManager[Stage]]) -> Iterator[Stage]:
    """A fresh page."""
    with open_page() as stage:
        yield stage
