"""Relay: one address in front of several servers of the same model, its replicas.

A prompt whose beginning was served before costs a fraction of a new one, but only where it was served: each replica has
a prefix cache of its own. So calls that begin alike go to one replica, their *home*: the one that wins a draw by the
hash of its name and the beginning. No table has to be kept, and when a replica comes or goes, only its own calls move.
A home that has all its slots taken is passed over for the replica with the least to do.

A replica can die. As long as the client has heard nothing of an answer, another replica begins it anew; from then on
nobody could tell where it would have gone on, so the client is told, and all other calls are left alone.

What a replica is, and how a call reaches it, is for a recipe to say (`Replicas`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from leadline.serve import web
from leadline.serve.http import OPEN_PATHS, Gate, error_body, error_response, first_of, gone, sse
from leadline.serve.limits import Keys, Limits, Refused

BEGINNING_TOKENS, BEGINNING_CHARACTERS = 128, 512
"""Of a prompt, what decides about its home: a page, and roughly as much text."""
_ATTEMPTS, _PAUSE_S = 5, 0.1
_RETRY_S = 1


class ReplicaLost(Exception):
    """The replica that worked on a call is gone."""


@dataclass(frozen=True)
class Call:
    """A request without its connection, so that it can travel."""

    method: str
    path: str
    query: bytes
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes

    @classmethod
    def of(cls, scope: Scope, body: bytes) -> Call:
        return cls(scope["method"], scope["path"], scope["query_string"], [(n, v) for n, v in scope["headers"]], body)

    def scope(self) -> Scope:
        """What an ASGI app needs to know."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query,
            "headers": list(self.headers),
        }


class Replicas(Protocol):
    """Where calls are answered."""

    def answer(self, call: Call, affinity: str) -> AsyncGenerator[Message, None]:
        """ASGI messages of the answer. Closed early, the replica stops working on it. Raises ReplicaLost."""
        ...

    async def metrics(self) -> Mapping[str, str]:
        """What each replica, by name, says of itself in Prometheus' text format."""
        ...


# -- where a call goes ---------------------------------------------------------------------------------------------


def affinity_of(body: bytes, namespace: str) -> str:
    """What calls have in common that share a home; empty for a body without a prompt.

    That is the beginning of the prompt, up to the first turn of the user, so that all turns of a conversation share
    it; and the namespace, since prefixes are shared within one only.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(asked, dict):
        return ""
    prompt, turns = asked.get("prompt"), asked.get("messages") or asked.get("input")
    if not prompt and not turns:
        return ""
    if isinstance(prompt, list):
        prompt = prompt[:BEGINNING_TOKENS]
    parts = [asked.get("tools"), asked.get("system"), asked.get("instructions"), prompt, _first_turns(turns)]
    beginning = json.dumps([namespace, *(part for part in parts if part)])
    if isinstance(prompt, list):
        return beginning
    return beginning[: len(namespace) + BEGINNING_CHARACTERS]


def _first_turns(turns: Any) -> Any:
    """A conversation up to the first turn of the user, without what clients number their items with."""
    if not isinstance(turns, list):
        return turns
    first: list[Any] = []
    for turn in turns:
        first.append(turn.get("content") if isinstance(turn, dict) else turn)
        if isinstance(turn, dict) and turn.get("role") == "user":
            break
    return first


def ranked(affinity: str, loads: Mapping[str, int], busy: int) -> list[str]:
    """Names of replicas in the order in which a call should try them: its home, unless that has `busy` calls or more,
    then those with the least to do. loads: calls that each one works on."""
    order = sorted(loads, key=lambda name: (loads[name], _draw(name, affinity)))
    if affinity and loads:
        home = max(loads, key=lambda name: _draw(name, affinity))
        if loads[home] < busy:
            order.remove(home)
            order.insert(0, home)
    return order


def _draw(name: str, affinity: str) -> bytes:
    return hashlib.sha256(f"{name} {affinity}".encode("utf8", "surrogatepass")).digest()


# -- the app -------------------------------------------------------------------------------------------------------


def create_relay(
    replicas: Replicas, keys: Keys, limits: Limits, *, origins: Sequence[str] = (), hosts: Sequence[str] = ()
) -> ASGIApp:
    """The app in front of replicas; keys, sizes, origins and hosts are checked here, before anything travels."""
    relay = Relay(replicas, limits)
    app: ASGIApp = Gate(relay, keys=keys, limits=limits, refused=relay.refused, open_paths={*OPEN_PATHS, *web.FILES})
    if origins:
        app = CORSMiddleware(app, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"])
    return TrustedHostMiddleware(app, allowed_hosts=list(hosts), www_redirect=False) if hosts else app


class Relay:
    """ASGI app that has its answers from replicas."""

    def __init__(self, replicas: Replicas, limits: Limits):
        self._replicas, self._send_s = replicas, limits.send_s
        self._own = CollectorRegistry()
        self._refused = Counter(
            "leadline:relay_refused", "Calls that no replica has seen, by status.", ("status",), registry=self._own
        )
        self._lost = Counter(
            "leadline:relay_lost", "Calls whose replica died, by what came next.", ("then",), registry=self._own
        )

    def refused(self, status: int) -> None:
        """Count a refusal."""
        self._refused.labels(str(status)).inc()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call.of(scope, (await receive())["body"])  # the gate has taken it in whole
        if call.path == "/metrics":
            text = metrics_of(await self._replicas.metrics()) + generate_latest(self._own)
            await Response(text, media_type=CONTENT_TYPE_LATEST)(scope, receive, send)
            return
        affinity = await asyncio.to_thread(affinity_of, call.body, scope["state"]["namespace"]) if call.body else ""
        await first_of(asyncio.ensure_future(self._answer(call, affinity, scope, receive, send)), gone(receive))

    async def _answer(self, call: Call, affinity: str, scope: Scope, receive: Receive, send: Send) -> None:
        said = _Said(call.path, send, self._send_s)
        for attempt in range(_ATTEMPTS):
            try:
                async with aclosing(self._replicas.answer(call, affinity)) as messages:
                    async for message in messages:
                        await said.add(message)
                return
            except ReplicaLost:
                if said.begun:
                    self._lost.labels("end").inc()
                    await said.break_off()
                    return
                self._lost.labels("retry").inc()
                await asyncio.sleep(_PAUSE_S * 2**attempt)
        self.refused(503)
        error = Refused(503, "no replica can be reached; come again later", kind="server_error", retry_s=_RETRY_S)
        await error_response(call.path, error)(scope, receive, send)


class _Said:
    """What the client of a call has heard. The first message of an answer, the status, is held back until the second
    comes: a client that has only heard that all is well could not be sent to another replica any more."""

    def __init__(self, path: str, send: Send, send_s: float):
        self._path, self._send, self._send_s = path, send, send_s
        self._start: Message | None = None
        self.begun = False

    async def add(self, message: Message) -> None:
        """Raises TimeoutError when the client leaves what was sent unread."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        async with asyncio.timeout(self._send_s):
            if not self.begun:
                assert self._start is not None
                self.begun = True
                await self._send(self._start)
            await self._send(message)

    async def break_off(self) -> None:
        """End an answer that cannot go on: in words where there are events, else by closing the connection."""
        assert self._start is not None
        if not any(value.startswith(b"text/event-stream") for _, value in self._start["headers"]):
            raise ConnectionAbortedError("a replica died in the middle of an answer that is one piece")
        error = Refused(503, "the replica that worked on this answer has stopped; ask again", kind="server_error")
        last = sse(*_last_event(self._path, error))
        await self.add({"type": "http.response.body", "body": last.encode(), "more_body": False})


def _last_event(path: str, error: Refused) -> tuple[Any, str | None]:
    """Data and name of the event that says so, in the protocol of a path."""
    if path.startswith("/v1/responses"):
        return {"type": "error", "code": error.kind, "message": str(error), "param": None}, "error"
    return error_body(path, error), "error" if path.startswith("/v1/messages") else None


# -- metrics -------------------------------------------------------------------------------------------------------


def metrics_of(texts: Mapping[str, str]) -> bytes:
    """One text of the metrics of several replicas; each sample has the label `replica`."""
    registry = CollectorRegistry()
    registry.register(_Merged(texts))
    return generate_latest(registry)


class _Merged(Collector):
    def __init__(self, texts: Mapping[str, str]):
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        found: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                merged = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    merged.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
        yield from found.values()
