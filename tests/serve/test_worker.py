from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from leadline.engine.engine import Engine, Settings
from leadline.engine.request import Request
from leadline.engine.sequence import Event, Finish
from leadline.model.transformer import Transformer
from leadline.serve.worker import Stream, Worker


def run(model: Transformer, work: Callable[[Worker], Awaitable[None]], pages: int = 20) -> Worker:
    """Do something with a worker, on a loop of its own."""
    worker = Worker(Engine(model, Settings(slots=2, pages=pages, step_tokens=128)))

    async def whole() -> None:
        worker.start()
        try:
            await work(worker)
        finally:
            await asyncio.wait_for(worker.stop(), 20)

    asyncio.run(whole())
    return worker


async def read(stream: Stream) -> tuple[list[int], Event]:
    ids: list[int] = []
    async for event in stream:
        ids += [token.id for token in event.tokens]
        if event.finish is not None:
            return ids, event
    raise AssertionError("a stream ended without an end")


def test_many_streams_say_what_each_says_alone(model: Transformer, alone: Callable[[Request], list[int]]) -> None:
    requests = [Request((5 + n, 6, 7), 6) for n in range(5)]

    async def work(worker: Worker) -> None:
        found = await asyncio.gather(*(read(worker.submit(request)) for request in requests))
        assert [ids for ids, _ in found] == [alone(request) for request in requests]

    assert run(model, work).num_open == 0


def test_a_cancelled_stream_ends_and_tells_what_it_took(model: Transformer) -> None:
    async def work(worker: Worker) -> None:
        stream, waiting = worker.submit(Request((5, 6), 1000)), worker.submit(Request((5, 6), 2))
        await anext(stream)
        stream.cancel()
        stream.cancel()
        _, last = await read(stream)
        assert last.finish is Finish.CANCELLED
        assert stream.usage is not None
        assert stream.usage.output_tokens >= 1
        assert (await read(waiting))[1].finish in (Finish.LENGTH, Finish.STOP)

    worker = run(model, work)
    assert worker.engine.memory.num_free_slots == 2


def test_what_the_engine_refuses_ends_with_the_reason(model: Transformer) -> None:
    async def work(worker: Worker) -> None:
        _, last = await read(worker.submit(Request((10**6,), 1)))
        assert last.finish is Finish.ERROR
        assert "1000000" in (last.error or "")

    run(model, work)


def test_stopping_ends_what_runs(model: Transformer) -> None:
    streams: list[Stream] = []

    async def work(worker: Worker) -> None:
        streams.extend(worker.submit(Request((5, 6), 1000)) for _ in range(4))
        await anext(streams[0])

    worker = run(model, work)
    assert worker.engine.memory.num_free_slots == 2
    assert not worker.engine.busy


def test_a_broken_engine_tells_everybody(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(worker: Worker) -> None:
        stream = worker.submit(Request((5, 6), 1000))
        await anext(stream)

        def broken() -> list[Event]:
            raise ArithmeticError("the card is on fire")

        monkeypatch.setattr(worker.engine, "step", broken)
        assert (await read(stream))[1].error == "the engine has stopped"
        assert worker.failure == "ArithmeticError: the card is on fire"
        assert (await read(worker.submit(Request((5, 6), 1))))[1].error == "the engine has stopped"

    with caplog.at_level(logging.CRITICAL, logger="leadline.serve"):
        run(model, work)
