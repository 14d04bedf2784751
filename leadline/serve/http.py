"""HTTP: the gate before every request, answers that stream, and clients that hang up.

The gate is the first thing that a request meets: without a valid key nothing of its body is read, and with one no more
than a limit, within a limit of time. Answers notice at once when nobody listens any more, whether they stream or not;
a client that keeps its connection but reads too slowly counts as gone.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from leadline.serve.limits import Keys, Limits, Refused

_Value = TypeVar("_Value")

OPEN_PATHS = ("/health", "/")
"""Paths that need no key."""
_ANTHROPIC_PATH = "/v1/messages"
_BODY_S = 60.0
_QUIET_S = 15.0
# Not in the standard: nobody is there to read it. The number is what nginx writes into its log.
_CLIENT_GONE = 499

_ANTHROPIC_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


# -- errors -------------------------------------------------------------------------------------------------------


def error_body(path: str, error: Refused) -> dict[str, Any]:
    """What a refusal looks like in the protocol of a path."""
    message = _printable(str(error))
    kept = {"response_ids": list(error.kept)} if error.kept else {}
    if path.startswith(_ANTHROPIC_PATH):
        kind = _ANTHROPIC_KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": message, **kept}}
    return {"error": {"message": message, "type": error.kind, "param": error.param, "code": error.code, **kept}}


def error_response(path: str, error: Refused) -> JSONResponse:
    headers = {"Retry-After": str(error.retry_s)} if error.retry_s is not None else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(path, error), error.status, headers)


def _printable(text: str) -> str:
    """What a client sent may come back in an error; half a surrogate pair in it has no UTF-8 form."""
    return text.encode("utf8", "replace").decode("utf8")


# -- the gate -----------------------------------------------------------------------------------------------------


class Gate:
    """ASGI middleware: checks the key, takes in the body up to the limit, and leaves the caller's prefix-cache
    namespace in `request.state.namespace`. refused: told the status of each refusal."""

    def __init__(
        self, app: ASGIApp, *, keys: Keys, limits: Limits, refused: Callable[[int], None], open_paths: Iterable[str]
    ):
        self._app, self._keys, self._limits, self._refused = app, keys, limits, refused
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin1").lower(): value.decode("latin1") for name, value in scope["headers"]}
        try:
            namespace = "" if scope["path"] in self._open_paths else self._keys.namespace(headers)
            scope.setdefault("state", {})["namespace"] = namespace
            body = await self._body(headers, receive)
        except Refused as error:
            self._refused(error.status)
            await error_response(scope["path"], error)(scope, receive, send)
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        await self._app(scope, replay, send)

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        most = self._limits.body_bytes
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise _too_large(most)
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the connection was closed before the body was complete")
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise _too_large(most)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {_BODY_S:.0f} s") from None


def _too_large(most: int) -> Refused:
    return Refused(413, f"the request is larger than {most:,} bytes", code="request_too_large")


# -- answers ------------------------------------------------------------------------------------------------------


def sse(data: Any, event: str | None = None) -> str:
    """One server-sent event."""
    name = f"event: {event}\n" if event else ""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"{name}data: {_printable(text)}\n\n"


class EventStream(Response):
    """A response of server-sent events.

    chunks: closed, and `on_end` called, at the end, when the client is gone, or when it leaves what was sent unread for
    `send_s` seconds. When nothing comes for a while, as before the first token of a long prompt, a comment keeps the
    connection open.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[str, None],
        *,
        send_s: float,
        on_end: Callable[[], None],
        headers: dict[str, str] | None = None,
    ):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._chunks, self._send_s, self._on_end = chunks, send_s, on_end
        self._sending, self._quiet = asyncio.Lock(), True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        try:
            await first_of(writing, gone(receive))
        finally:
            await self._chunks.aclose()
            self._on_end()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        beating = asyncio.ensure_future(self._beat(send))
        try:
            async for chunk in self._chunks:
                self._quiet = False
                await self._put(send, chunk)
            await self._put(send, "", more=False)
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    async def _beat(self, send: Send) -> None:
        while True:
            self._quiet = True
            await asyncio.sleep(_QUIET_S)
            if self._quiet:
                await self._put(send, ": still working\n\n")

    async def _put(self, send: Send, text: str, more: bool = True) -> None:
        async with self._sending, asyncio.timeout(self._send_s):
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})


async def unless_gone(request: Request, answer: Awaitable[Response]) -> Response:
    """The answer, given up as soon as the client hangs up."""
    response = await first_of(asyncio.ensure_future(answer), gone(request.receive))
    return Response(status_code=_CLIENT_GONE) if response is None else response


async def first_of(work: asyncio.Future[_Value], end: Awaitable[None]) -> _Value | None:
    """The result of the work, or None if the end comes first; the work has ended in both cases."""
    leaving = asyncio.ensure_future(end)
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        return None
    finally:
        for task in (work, leaving):
            task.cancel()
        await asyncio.gather(work, leaving, return_exceptions=True)


async def gone(receive: Callable[[], Awaitable[Message]]) -> None:
    """Returns once the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass
