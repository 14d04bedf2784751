"""Service: everything that answering a request needs, in one record that is made once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from leadline.engine.engine import Engine
from leadline.serve.grammar import Grammars
from leadline.serve.kept import Kept
from leadline.serve.limits import Keys, Limits, Refused
from leadline.serve.metrics import Metrics
from leadline.serve.worker import Stream, Worker
from leadline.text.chat import EFFORT, Mode, Release
from leadline.text.tokenizer import Tokenizer

_LOG = logging.getLogger("leadline.serve")
_BACK_S = 5

MAX_NEEDS_TOKENS = 384 * 1024
"""Context that DeepSeek asks for where the model thinks as hard as it can."""


class ServiceError(ValueError):
    """A server that cannot be set up as asked; one line that says why."""


@dataclass(frozen=True)
class Policy:
    """What the server promises and allows.

    name: of the model, as clients call it. aliases: names that stand for it too; `*` is any. mode: how hard the model
    thinks when a request does not say. allow_short_max: serve the mode `max` with less context than it needs.
    log_prompts: write prompts to the log.
    """

    name: str
    aliases: tuple[str, ...] = ()
    release: Release = "preview"
    mode: Mode = "high"
    allow_short_max: bool = False
    log_prompts: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.mode not in EFFORT[self.release]:
            modes = ", ".join(EFFORT[self.release])
            raise ServiceError(f"mode={self.mode}: release {self.release} knows {modes}")


class Service:
    """A model that answers. keys: who may ask. kept: answers that wait to be fetched, or to go on."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, policy: Policy, keys: Keys, kept: Kept | None = None):
        vocabulary = engine.runner.model.config.vocab_size
        if tokenizer.vocab_size > vocabulary:
            raise ServiceError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model knows {vocabulary}: "
                f"they do not belong together"
            )
        self.tokenizer, self.policy, self.keys, self.kept = tokenizer, policy, keys, kept
        self.limits = policy.limits
        self.vocab_size = vocabulary
        self.context_tokens = engine.max_tokens
        self.slots = engine.settings.slots
        self.worker = Worker(engine)
        self.metrics = Metrics(self.worker, policy.name)
        self.grammars = Grammars(tokenizer, vocabulary)

    def require_model(self, name: str | None) -> None:
        """Raises Refused (404) for the name of another model. None asks for whatever is served."""
        policy = self.policy
        if name is None or name == policy.name or name in policy.aliases or "*" in policy.aliases:
            return
        raise Refused(
            404, f"the model {name!r} is not served here; use {policy.name!r}", code="model_not_found", param="model"
        )

    def require_room(self, sequences: int) -> None:
        """Raises Refused (429) when the queue is full, (503) when the engine has stopped or is about to."""
        if self.worker.suspended:
            raise Refused(503, "the server is shutting down", kind="server_error", retry_s=_BACK_S)
        if self.worker.failure is not None:
            raise Refused(503, "the engine has stopped; the server needs a restart", kind="server_error")
        most = self.slots + self.limits.queue
        if self.worker.num_open + sequences > most:
            raise Refused(
                429,
                f"the server is full: {self.worker.num_open} of {most} places are taken; come again later",
                kind="rate_limit_error",
                code="queue_full",
                retry_s=1 + self.worker.num_open // max(1, self.slots),
            )

    async def suspend(self) -> None:
        """End whatever is being said, and take in nothing any more. Where answers are kept, those that somebody still
        waits for go on at the next start; their clients are told so once they are on disk."""
        await self.worker.suspend(self._keep)

    def _keep(self, said: Mapping[Stream, list[int]]) -> None:
        for stream, tokens in said.items():
            if self.kept is None or stream.record is None:
                continue
            try:
                self.kept.keep(replace(stream.record(), said=tokens))
                stream.kept = True
            except OSError as error:
                _LOG.error("%s: an answer cannot be kept: %s", self.kept.folder, error.strerror)
