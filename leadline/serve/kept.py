"""Kept: answers that outlive their connection and the process, as files in a folder.

An answer is kept when nobody can wait for it: because the server has to end while it is being said, or because a
client asked for it in the background. Each is a file of one line of JSON. As long as the answer has not ended, that is
what was asked, and the tokens said when it was written; once it has, the response. A file is written under another
name, synced and renamed, so at any moment there is either the old line or the new one.

The files hold what was asked and answered. They are readable for their owner alone, and go when their time is up.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ID = re.compile(r"resp-[0-9a-f]{24}")
_NEW = ".new"


class KeptError(ValueError):
    """The folder cannot be used; the message names it and the reason."""


@dataclass(frozen=True)
class Unfinished:
    """An answer that has not ended. namespace: of whoever may fetch it. frame: what is known of the response object,
    with the id. wanted: see `Wanted.as_json`. said: tokens of the answer."""

    id: str
    namespace: str
    frame: Mapping[str, Any]
    wanted: Mapping[str, Any]
    said: Sequence[int] = ()


@dataclass
class _Entry:
    """frame: None once the answer has ended."""

    namespace: str
    frame: Mapping[str, Any] | None


class Kept:
    """The answers in a folder, which one server has for itself. model: which one may go on with them. keep_s: how long
    they stay. report: gets a line about what is wrong with a file."""

    def __init__(self, folder: Path, model: str, keep_s: float, report: Callable[[str], None]):
        self.folder, self._model, self._keep_s, self._report = folder, model, keep_s, report
        self._entries: dict[str, _Entry] = {}
        self._changing = threading.Lock()  # the engine's thread writes, and so do those that wait for a disk
        self.unfinished: list[Unfinished] = []
        """Answers that were found at the start and are to go on."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = (folder / "lock").open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise KeptError(f"{folder}: another server keeps its answers there; name another folder") from None
        except OSError as error:
            raise KeptError(f"{folder}: no answers can be kept there: {error.strerror}") from None
        for path in sorted(folder.iterdir()):
            if path.suffix == _NEW:
                path.unlink()  # its writer was killed; what it was to replace is still there
            elif path.suffix == ".json" and _ID.fullmatch(path.stem) and not self._expired(path):
                self._take_in(path)

    def close(self) -> None:
        """Another server may have the folder."""
        self._lock.close()

    def keep(self, answer: Unfinished) -> None:
        """Write down an answer that has not ended. Raises OSError, and then what was there before is still there."""
        for id, entry in list(self._entries.items()):
            if entry.frame is None and self._expired(self._path(id)):
                self._entries.pop(id, None)
        with self._changing:
            self._write(answer.id, {"model": self._model, **vars(answer)})
            self._entries[answer.id] = _Entry(answer.namespace, answer.frame)

    def finish(self, id: str, response: Mapping[str, Any]) -> None:
        """Write down how a kept answer has ended; without effect if it was deleted meanwhile. Raises OSError."""
        with self._changing:
            if id in self._entries:
                namespace = self._entries[id].namespace
                self._write(id, {"id": id, "namespace": namespace, "response": response})
                self._entries[id] = _Entry(namespace, None)

    def response(self, id: str, namespace: str) -> tuple[Mapping[str, Any], bool] | None:
        """The response and whether it has ended; of one that has not, its frame. None: no answer of this id is kept for
        whoever asks."""
        entry = self._entries.get(id)
        if entry is None or entry.namespace != namespace:
            return None
        if entry.frame is not None:
            return entry.frame, False
        path = self._path(id)
        if self._expired(path):
            del self._entries[id]
            return None
        return json.loads(path.read_text("utf8"))["response"], True

    def delete(self, id: str, namespace: str) -> bool:
        """Returns whether there was such an answer."""
        with self._changing:
            entry = self._entries.get(id)
            if entry is None or entry.namespace != namespace:
                return False
            del self._entries[id]
            self._path(id).unlink(missing_ok=True)
            return True

    # -- files -----------------------------------------------------------------------------------------------------

    def _path(self, id: str) -> Path:
        assert _ID.fullmatch(id)
        return self.folder / f"{id}.json"

    def _expired(self, path: Path) -> bool:
        """Whether an answer's time is up; its file is gone then."""
        try:
            if time.time() - path.stat().st_mtime <= self._keep_s:
                return False
        except FileNotFoundError:
            return True
        path.unlink(missing_ok=True)
        return True

    def _take_in(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text("utf8"))
            if "response" in found:
                self._entries[path.stem] = _Entry(found["namespace"], None)
                return
            if found.pop("model") != self._model:
                self._report(f"{path}: is an answer of another model, and waits for it")
                return
            answer = Unfinished(**found)
        except (ValueError, TypeError, KeyError, OSError) as error:
            self._report(f"{path}: is damaged and is left alone ({type(error).__name__}: {error}); delete it")
            return
        self._entries[answer.id] = _Entry(answer.namespace, answer.frame)
        self.unfinished.append(answer)

    def _write(self, id: str, line: Mapping[str, Any]) -> None:
        path = self._path(id)
        new = path.with_suffix(_NEW)
        try:
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
