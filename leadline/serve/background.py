"""Background: answers that nobody waits for, until they are fetched.

They begin because a client asks for one (`background: true`), or because the server before this one had to end while it
was saying something (`Service.suspend`). From then on they are answers like all others, and their ends are kept.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from leadline.serve.grammar import GrammarError
from leadline.serve.items import Answer, response_of
from leadline.serve.kept import Kept, Unfinished
from leadline.serve.limits import Refused
from leadline.serve.reply import Reply
from leadline.serve.service import Service
from leadline.serve.wanted import Wanted

_LOG = logging.getLogger("leadline.serve")


class Background:
    """The answers of a service that run without a connection. All of it belongs to the event loop."""

    def __init__(self, service: Service):
        self._service = service
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def go_on(self) -> None:
        """Take up what the server before this one has left."""
        if self._service.kept is None:
            return
        found, self._service.kept.unfinished = self._service.kept.unfinished, []
        if found:
            _LOG.info("answers of the server before this one that go on: %d", len(found))
        for answer in found:
            self._start(answer.id, self._take_up(answer))

    async def stop(self) -> None:
        """Wait for answers that have just been ended."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def require_kept(self, stream: bool | None) -> None:
        """Raises Refused where an answer cannot be given in the background."""
        if self._service.kept is None:
            raise Refused(
                400,
                "this server keeps no answers; leave background out and wait, or start it with keep=FOLDER",
                param="background",
            )
        if stream:
            raise Refused(
                400, "an answer in the background does not stream; fetch it when it has ended", param="stream"
            )

    async def begin(self, reply: Reply) -> dict[str, Any]:
        """Give an answer in the background; its response so far."""
        try:
            await asyncio.to_thread(self._kept.keep, reply.record())
        except OSError as error:
            reply.close()
            raise Refused(507, f"the answer cannot be kept: {error.strerror}", kind="server_error") from None
        id = reply.frame["id"]
        self._start(id, self._read(id, reply))
        return response_of(reply.frame, self._service.policy.name, "in_progress")

    def fetch(self, id: str, namespace: str) -> dict[str, Any]:
        """The response of an answer, ended or not. Raises Refused."""
        found = self._service.kept.response(id, namespace) if self._service.kept is not None else None
        if found is None:
            raise _unknown(id)
        response, has_ended = found
        return dict(response) if has_ended else response_of(response, self._service.policy.name, "in_progress")

    def delete(self, id: str, namespace: str) -> None:
        """Forget an answer, and end it if it has not ended. Raises Refused."""
        if self._service.kept is None or not self._service.kept.delete(id, namespace):
            raise _unknown(id)
        if id in self._tasks:
            self._tasks[id].cancel()

    # -- inside ----------------------------------------------------------------------------------------------------

    @property
    def _kept(self) -> Kept:
        assert self._service.kept is not None
        return self._service.kept

    def _start(self, id: str, work: Any) -> None:
        task = self._tasks[id] = asyncio.ensure_future(work)
        task.add_done_callback(lambda _: self._tasks.pop(id, None))

    async def _take_up(self, answer: Unfinished) -> None:
        """Go on with an answer behind what was said."""
        service = self._service
        try:
            wanted = Wanted.from_json(answer.wanted)
            grammar = None
            if wanted.form is not None:
                grammar = await asyncio.to_thread(service.grammars.compile, wanted.form)
        except (ValueError, TypeError, KeyError, GrammarError) as error:
            _LOG.warning("%s: cannot be gone on with: %s", answer.id, error)
            await self._fail(answer.id, answer.frame, f"the answer cannot be gone on with: {error}")
            return
        await self._read(answer.id, Reply(service, wanted, grammar, frame=answer.frame, said=answer.said))

    async def _read(self, id: str, reply: Reply) -> None:
        try:
            response = await Answer(reply, self._service.policy.name).whole()
        except Refused as error:
            if self._service.worker.suspended:
                return  # it is on disk, as far as it was said then
            await self._fail(id, reply.frame, str(error))
            return
        await self._finish(id, response)

    async def _fail(self, id: str, frame: Any, reason: str) -> None:
        await self._finish(id, response_of(frame, self._service.policy.name, "failed", reason))

    async def _finish(self, id: str, response: dict[str, Any]) -> None:
        try:
            await asyncio.to_thread(self._kept.finish, id, response)
        except OSError as error:
            _LOG.error("%s: the end of answer %s cannot be kept: %s", self._kept.folder, id, error.strerror)


def _unknown(id: str) -> Refused:
    return Refused(404, f"no answer {id[:64]!r} is kept here", code="response_not_found", param="id")
