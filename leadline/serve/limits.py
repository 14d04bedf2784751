"""Limits: who may ask, how much, and how many at once.

A server on the open network meets clients that are greedy, broken or hostile. Every limit is checked before any work is
done, and what is refused is refused in words, with the status that the clients' own retry logic understands: 400 for a
request that can never be served, 401 for a wrong key, 413 for too many bytes, 429 with `Retry-After` when it may come
again later.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_FEWEST_KEY_CHARACTERS = 16


class KeyFileError(ValueError):
    """A file of API keys that cannot be used; one line that names it and says what to do."""


class Refused(Exception):
    """A request that is not served. status: of HTTP. kind, code: OpenAI's words for it. retry_s: when to come again.
    kept: ids of answers that will go on later."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_s: int | None = None,
        kept: Sequence[str] = (),
    ):
        super().__init__(message)
        self.status, self.kind, self.code, self.param, self.retry_s = status, kind, code, param, retry_s
        self.kept = kept


@dataclass(frozen=True)
class Limits:
    """body_bytes: of a request. queue: requests that may wait beyond those that run. choices: answers to one request.
    output_tokens: of an answer that does not say itself how long it may be; None: as long as fits. send_s: how long a
    client may leave sent bytes unread before its request ends. grammar_bytes: of a JSON schema."""

    body_bytes: int = 32 * 2**20
    queue: int = 64
    choices: int = 8
    output_tokens: int | None = None
    send_s: float = 20.0
    grammar_bytes: int = 64 * 2**10


class Keys:
    """API keys. Without any, everybody may ask. Only hashes are kept."""

    def __init__(self, keys: list[str]):
        self._hashes = [_hash(key) for key in keys]

    @classmethod
    def from_file(cls, path: Path) -> Keys:
        """One key on each line; empty lines and lines that begin with # do not count."""
        try:
            lines = path.read_text(encoding="utf8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise KeyFileError(
                f"{path}: cannot be read as text ({error}); name a file with one key on each line"
            ) from None
        keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
        if not keys:
            raise KeyFileError(f"{path}: holds no key; write one on each line")
        for number, key in enumerate(keys, start=1):
            if len(key) < _FEWEST_KEY_CHARACTERS or not key.isascii():
                raise KeyFileError(
                    f"{path}: key {number} is weak; use at least {_FEWEST_KEY_CHARACTERS} ASCII characters, for "
                    f"example from `openssl rand -hex 24`"
                )
        return cls(keys)

    @property
    def needed(self) -> bool:
        """Whether a request needs a key."""
        return bool(self._hashes)

    def namespace(self, headers: Mapping[str, str]) -> str:
        """The prefix-cache namespace of whoever sends these headers: one for each key, so that no client can find out
        by its waiting time what another one has asked. Raises Refused (401) without a valid key.

        The key is `Authorization: Bearer KEY` or `x-api-key: KEY`. All keys are compared, each in constant time.
        """
        if not self.needed:
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        found = _hash(key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", ""))
        matches = [hmac.compare_digest(found, known) for known in self._hashes]
        if not any(matches):
            raise Refused(
                401,
                "no valid API key: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                kind="authentication_error",
                code="invalid_api_key",
            )
        return found.hex()[:32]


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf8", "surrogatepass")).digest()
