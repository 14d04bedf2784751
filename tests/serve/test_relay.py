from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import ASGIApp, Message

from leadline.serve.limits import Keys, Limits
from leadline.serve.relay import BEGINNING_CHARACTERS, Call, ReplicaLost, affinity_of, create_relay, metrics_of, ranked

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
EVENTS: list[tuple[bytes, bytes]] = [(b"content-type", b"text/event-stream; charset=utf-8")]
START: Message = {"type": "http.response.start", "status": 200, "headers": EVENTS}
LOST: Message = {"type": "lost"}
"""In a script: the replica dies."""


def part(text: str, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


class Scripted:
    """Replicas that say what is written; each call takes the next script, the last one stays."""

    def __init__(self, *scripts: list[Message]):
        self._scripts = list(scripts)
        self.calls: list[tuple[Call, str]] = []
        self.closed = 0

    async def answer(self, call: Call, affinity: str) -> AsyncGenerator[Message, None]:
        self.calls.append((call, affinity))
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        try:
            for message in script:
                if message is LOST:
                    raise ReplicaLost("died")
                yield message
            await asyncio.sleep(60 if script[-1]["more_body"] else 0)
        finally:
            self.closed += 1

    async def metrics(self) -> Mapping[str, str]:
        return {name: f'# TYPE lines gauge\nlines{{kind="a"}} {n}\n' for n, name in enumerate(("one", "two"))}


def ask(
    app: ASGIApp,
    path: str = CHAT,
    body: object = None,
    *,
    key: str = "",
    hang_up: bool = False,
    send: Callable[[Message], Awaitable[None]] | None = None,
) -> tuple[int, str]:
    """Status and body of an answer; hang_up: leave as soon as something came."""
    heard: list[Message] = []
    came = asyncio.Event()

    async def run() -> None:
        request: list[Message] = [{**part(json.dumps(body), more=False), "type": "http.request"}]

        async def receive() -> Message:
            if request:
                return request.pop()
            await (came.wait() if hang_up else asyncio.sleep(60))
            return {"type": "http.disconnect"}

        async def keep(message: Message) -> None:
            heard.append(message)
            if message["type"] == "http.response.body":
                came.set()

        headers = [(b"authorization", f"Bearer {key}".encode()), (b"host", b"localhost")]
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
        await asyncio.wait_for(app(scope, receive, send or keep), 10)

    asyncio.run(run())
    return heard[0]["status"], "".join(message["body"].decode() for message in heard[1:])


def relay(replicas: Scripted, **limits: Any) -> ASGIApp:
    return create_relay(replicas, Keys([]), Limits(**limits))


# -- where a call goes ---------------------------------------------------------------------------------------------

USER: dict[str, Any] = {"role": "user", "content": "What is a lead line?"}


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ({"messages": [USER]}, {"messages": [USER, {"role": "assistant", "content": "A rope."}, USER], "seed": 5}),
        ({"input": [USER]}, {"input": [USER, {"role": "assistant", "content": "A rope."}], "temperature": 0}),
        ({"system": "a" * 600, "messages": [USER]}, {"system": "a" * 600, "messages": [{**USER, "content": "x"}]}),
        ({"prompt": "a" * 600 + "b"}, {"prompt": "a" * 600 + "c"}),
        ({"prompt": [7] * 128 + [1]}, {"prompt": [7] * 128 + [2]}),
    ],
)
def test_calls_that_begin_alike_share_a_home(first: dict[str, Any], later: dict[str, Any]) -> None:
    homes = [affinity_of(json.dumps(body).encode(), "key") for body in (first, later)]
    assert homes[0] == homes[1] != ""
    assert affinity_of(json.dumps(first).encode(), "another key") != homes[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"messages": [USER]}, {"messages": [{**USER, "content": "What is a sextant?"}]}),
        ({"prompt": [7] * 127 + [1]}, {"prompt": [7] * 127 + [2]}),
        ({"prompt": "a"}, {"prompt": "b"}),
        ({"messages": [USER]}, {"messages": [USER], "tools": [{"type": "function"}]}),
    ],
)
def test_calls_that_begin_differently_do_not(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert affinity_of(json.dumps(one).encode(), "") != affinity_of(json.dumps(other).encode(), "")


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"null", b"{}", b"[" * 100_000, b'{"prompt": ""}', b"\xff"])
def test_what_holds_no_prompt_has_no_home(body: bytes) -> None:
    assert affinity_of(body, "key") == ""


def test_a_home_is_known_by_little() -> None:
    body = json.dumps({"messages": [{**USER, "content": "x" * 10**6}]}).encode()
    assert len(affinity_of(body, "")) <= BEGINNING_CHARACTERS


@given(
    affinity=st.text(min_size=1, max_size=8),
    loads=st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 9), min_size=1, max_size=6),
    busy=st.integers(1, 9),
)
def test_home_first_unless_busy_then_by_load(affinity: str, loads: dict[str, int], busy: int) -> None:
    (home, *_) = ranked(affinity, dict.fromkeys(loads, 0), 1)
    order = ranked(affinity, loads, busy)
    assert sorted(order) == sorted(loads)
    rest = order if loads[home] >= busy else order[1:]
    assert order[0] == home or loads[home] >= busy
    assert [loads[name] for name in rest] == sorted(loads[name] for name in rest)
    for gone in loads.keys() - {home}:  # others may come and go: the home stays
        assert ranked(affinity, dict.fromkeys(loads.keys() - {gone}, 0), 1)[0] == home


def test_homes_are_spread() -> None:
    names = ["one", "two", "three"]
    homes = [ranked(f"conversation {n}", dict.fromkeys(names, 0), 1)[0] for n in range(300)]
    assert all(60 < homes.count(name) < 140 for name in names)


# -- answers -------------------------------------------------------------------------------------------------------


def test_an_answer_passes_through() -> None:
    replicas = Scripted([START, part("data: a\n\n"), part("data: [DONE]\n\n", more=False)])
    assert ask(relay(replicas), body={"messages": [USER]}) == (200, "data: a\n\ndata: [DONE]\n\n")
    ((call, affinity),) = replicas.calls
    assert (call.method, call.path, json.loads(call.body)) == ("POST", CHAT, {"messages": [USER]})
    assert call.scope()["headers"] == [(b"authorization", b"Bearer "), (b"host", b"localhost")]
    assert affinity == affinity_of(call.body, "")


def test_before_the_client_has_heard_anything_another_replica_begins_anew() -> None:
    good = [START, part("data: b\n\n", more=False)]
    replicas = Scripted([LOST], [START, LOST], good)
    app = relay(replicas)
    assert ask(app) == (200, "data: b\n\n")
    assert (len(replicas.calls), replicas.closed) == (3, 3)
    assert 'leadline:relay_lost_total{then="retry"} 2.0' in ask(app, "/metrics")[1]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (CHAT, 'data: {"error":{"message":"the replica'),
        (MESSAGES, 'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"the replica'),
        (RESPONSES, 'event: error\ndata: {"type":"error","code":"server_error","message":"the replica'),
    ],
)
def test_afterwards_the_client_is_told(path: str, words: str) -> None:
    replicas = Scripted([START, part("data: a\n\n"), LOST])
    status, text = ask(relay(replicas), path)
    assert status == 200
    assert text.startswith(f"data: a\n\n{words} that worked on this answer has stopped; ask again")
    assert len(replicas.calls) == 1


def test_an_answer_in_one_piece_is_not_ended_with_words() -> None:
    plain = {**START, "headers": [(b"content-type", b"application/json")]}
    with pytest.raises(ConnectionAbortedError):
        ask(relay(Scripted([plain, part("{"), LOST])))


def test_without_any_replica_the_client_may_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leadline.serve.relay._PAUSE_S", 0.001)
    replicas = Scripted([LOST])
    app = relay(replicas)
    status, text = ask(app)
    assert status == 503
    assert json.loads(text)["error"]["message"] == "no replica can be reached; come again later"
    assert len(replicas.calls) == 5
    assert 'leadline:relay_refused_total{status="503"} 1.0' in ask(app, "/metrics")[1]


def test_a_client_that_hangs_up_ends_the_work() -> None:
    replicas = Scripted([START, part("data: a\n\n")])
    assert ask(relay(replicas), hang_up=True) == (200, "data: a\n\n")
    assert replicas.closed == 1


def test_a_client_that_does_not_read_ends_the_work() -> None:
    async def never(_: Message) -> None:
        await asyncio.sleep(60)

    replicas = Scripted([START, part("data: a\n\n")])
    with pytest.raises(TimeoutError):
        ask(relay(replicas, send_s=0.05), send=never)
    assert replicas.closed == 1


def test_what_is_not_allowed_does_not_reach_a_replica() -> None:
    replicas = Scripted([START, part("", more=False)])
    key = "sk-aaaaaaaaaaaaaaaaaaaa"
    app = create_relay(replicas, Keys([key]), Limits(body_bytes=100), origins=["https://page"], hosts=["localhost"])
    assert ask(app)[0] == 401
    assert ask(app, body="x" * 200, key=key)[0] == 413
    assert ask(create_relay(replicas, Keys([]), Limits(), hosts=["other"]))[0] == 400
    assert replicas.calls == []
    assert ask(app, key=key)[0] == 200


def test_metrics_of_replicas_stand_side_by_side() -> None:
    text = metrics_of({"one": "# TYPE a counter\na_total 1\n", "two": "# TYPE a counter\na_total 2\n"}).decode()
    assert text.count("# TYPE a_total counter") == 1
    assert 'a_total{replica="one"} 1.0\na_total{replica="two"} 2.0\n' in text
    assert 'lines{kind="a",replica="two"} 1.0' in ask(relay(Scripted([])), "/metrics")[1]
