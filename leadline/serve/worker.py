"""The worker: one thread that runs the engine, and the event loop's side of it.

The engine is one loop of steps and not thread safe, HTTP is thousands of tasks on an event loop. They meet in two
places only: commands (submit, cancel, stop) lie in a queue that the thread empties between two steps, and what a step
said goes to the event loop in one call. So a step never waits for a client, and a client that hangs up has its slot and
pages taken back before the next step begins.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from leadline.engine.disk import DiskCounts
from leadline.engine.engine import Engine
from leadline.engine.request import Request, RequestError
from leadline.engine.sequence import Event, Finish, Usage
from leadline.serve.kept import Unfinished

_LOG = logging.getLogger("leadline.serve")
_LOOK_S = 0.5


@dataclass(frozen=True)
class Look:
    """The engine at a glance. free_slots: that no sequence has. pages: of the pool; held_pages: by running sequences
    and the prefix cache; cached_pages: by the prefix cache (some of them by running sequences too). cache_bytes: of
    everything held. damaged_drafts: guesses that NaN cut short. recalled_tokens: whose pages came back from disk;
    disk_bytes: held there."""

    running: int = 0
    waiting: int = 0
    free_slots: int = 0
    pages: int = 1
    held_pages: int = 0
    cached_pages: int = 0
    cache_bytes: int = 0
    preempted: int = 0
    damaged_drafts: int = 0
    recalled_tokens: int = 0
    disk_bytes: int = 0
    disk: DiskCounts = field(default_factory=DiskCounts)


class Stream:
    """One sequence as the event loop sees it: an iterator of engine events that ends after the one with `finish`."""

    def __init__(
        self, worker: Worker, request: Request, said: tuple[int, ...], record: Callable[[], Unfinished] | None
    ):
        self.request, self.said, self.record = request, said, record
        self.kept = False
        """Whether the server has ended the sequence and keeps it for another one to go on with."""
        self.usage: Usage | None = None
        """Known once the sequence has ended."""
        self._worker = worker
        self._number: int | None = None  # belongs to the worker's thread
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._ended = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        event = await self._events.get()
        while not self._events.empty():  # whoever is behind catches up in one stride
            following = self._events.get_nowait()
            event = replace(following, tokens=event.tokens + following.tokens)
        self._ended = event.finish is not None
        return event

    def cancel(self) -> None:
        """The sequence ends, and its memory is free, before the next step; the event that says so still comes."""
        self._worker.cancel(self)

    def close(self) -> None:
        """Nobody listens any more; an event that comes nevertheless goes unread."""
        self._ended = True
        self._worker.cancel(self)


class Worker:
    """Runs an engine. `start` is called on the event loop that its streams are read on."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.failure: str | None = None
        """Why the engine has stopped for good; None while all is well."""
        self.look = Look(free_slots=engine.memory.num_free_slots, pages=engine.memory.pool.num_pages)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[int, Stream] = {}  # by sequence number; belongs to the thread
        self._open: set[Stream] = set()  # belongs to the event loop
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.suspended = False
        """Whether the server is about to end and takes in nothing any more."""
        self._stops = False
        self._looked = 0.0

    # -- on the event loop -----------------------------------------------------------------------------------------

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End what still runs, then the thread, then the use of the disk."""
        for stream in list(self._open):
            stream.cancel()
        self._commands.put(self._stop)
        await asyncio.to_thread(self._thread.join)
        if self.engine.memory.disk is not None:
            self.engine.memory.disk.close()

    async def suspend(self, keep: Callable[[Mapping[Stream, list[int]]], None]) -> None:
        """End what runs, between two steps. Before anybody is told, `keep` gets what each sequence has said
        that somebody still waits for; it is called in the thread."""
        self.suspended = True
        done: Future[None] = Future()
        self._commands.put(lambda: self._suspend(keep, done))
        await asyncio.wrap_future(done)

    @property
    def num_open(self) -> int:
        """Sequences that were submitted and have not ended."""
        return len(self._open)

    def submit(
        self, request: Request, said: tuple[int, ...] = (), record: Callable[[], Unfinished] | None = None
    ) -> Stream:
        """Queue a request. It has been checked: what the engine refuses here ends with an error event. said: see
        `Engine.submit`. record: what to keep of it if the server has to end first."""
        stream = Stream(self, request, said, record)
        self._open.add(stream)
        self._commands.put(lambda: self._submit(stream))
        return stream

    def cancel(self, stream: Stream) -> None:
        """End a sequence, at whatever point of its life; without effect after its end."""
        if stream in self._open:
            self._open.discard(stream)
            self._commands.put(lambda: self._cancel(stream))

    def _deliver(self, said: list[tuple[Stream, Event, Usage | None]]) -> None:
        for stream, event, usage in said:
            if event.finish is not None:
                stream.usage = usage
                self._open.discard(stream)
            stream._events.put_nowait(event)

    # -- in the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stops or self.engine.busy:
                self._obey()
                if self.engine.busy:
                    self._publish(self.engine.step())
                self._glance()
        except Exception as error:
            # The engine guards itself against what requests can do; this is a bug or a broken machine. Whoever waits is
            # told, and the server says that it is ill instead of hanging.
            _LOG.exception("the engine has stopped")
            self.failure = f"{type(error).__name__}: {error}"
            self._publish(
                [Event(number, finish=Finish.ERROR, error="the engine has stopped") for number in self._streams]
            )
            self._refuse_from_now_on()

    def _obey(self) -> None:
        """Do what was asked for since the last step; without anything to run, wait for it."""
        if not self.engine.busy and not self._stops:
            self._glance(at_once=True)
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _refuse_from_now_on(self) -> None:
        while not self._stops:
            self._commands.get()()

    def _submit(self, stream: Stream) -> None:
        if self.failure is not None:
            self._send([(stream, Event(-1, finish=Finish.ERROR, error="the engine has stopped"), None)])
            return
        try:
            stream._number = self.engine.submit(stream.request, stream.said)
        except RequestError as error:
            self._send([(stream, Event(-1, finish=Finish.ERROR, error=str(error)), None)])
            return
        self._streams[stream._number] = stream

    def _cancel(self, stream: Stream) -> None:
        if stream._number is not None and self.failure is None:
            self.engine.cancel(stream._number)

    def _suspend(self, keep: Callable[[Mapping[Stream, list[int]]], None], done: Future[None]) -> None:
        try:
            waited_for = {number: stream for number, stream in self._streams.items() if stream in self._open}
            keep({stream: self.engine.output(number) for number, stream in waited_for.items()})
            for number in self._streams:
                self.engine.cancel(number)
        finally:
            done.set_result(None)

    def _stop(self) -> None:
        self._stops = True

    def _publish(self, events: list[Event]) -> None:
        said: list[tuple[Stream, Event, Usage | None]] = []
        for event in events:
            stream = self._streams[event.sequence]
            usage = None
            if event.finish is not None:
                del self._streams[event.sequence]
                usage = self.engine.usage(event.sequence) if self.failure is None else None
            said.append((stream, event, usage))
        self._send(said)

    def _send(self, said: list[tuple[Stream, Event, Usage | None]]) -> None:
        if said:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._deliver, said)

    def _glance(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if not at_once and now - self._looked < _LOOK_S:
            return
        self._looked = now
        engine, memory = self.engine, self.engine.memory
        pool, disk = memory.pool, memory.disk
        self.look = Look(
            len(engine.running),
            len(engine.waiting),
            memory.num_free_slots,
            pool.num_pages,
            pool.num_pages - pool.num_free,
            memory.prefix.num_pages,
            engine.cache_bytes,
            engine.num_preempted,
            engine.num_damaged_drafts,
            memory.recalled_tokens,
            disk.num_bytes if disk else 0,
            replace(disk.counts) if disk else DiskCounts(),
        )
