"""Blocks: an answer as a list of parts, each of one kind.

OpenAI's chat completions put all content of an answer into one string. Newer protocols show an answer as it was said: a
list of thinking, text and calls, in their order, each of which opens, grows and closes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from leadline.text.events import ArgumentsDelta, CallBegin, CallEnd, ContentDelta, Event, ReasoningDelta

Kind = Literal["reasoning", "content", "call"]
Change = Literal["open", "delta", "close"]


@dataclass(eq=False)
class Block:
    """A part of an answer. index: its place. name: of a call's function. complete: false for a call that was cut."""

    index: int
    kind: Kind
    name: str = ""
    pieces: list[str] = field(default_factory=list[str])
    complete: bool = True

    @property
    def text(self) -> str:
        """The text, or a call's arguments as JSON."""
        return "".join(self.pieces)

    @property
    def arguments(self) -> dict[str, Any]:
        """Of a complete call."""
        return json.loads(self.text)


class Blocks:
    """Sorts events into blocks."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None

    def feed(self, events: Iterable[Event]) -> list[tuple[Change, Block, str]]:
        """What the events change; the text is that of a delta."""
        changes: list[tuple[Change, Block, str]] = []
        for event in events:
            if isinstance(event, CallBegin):
                changes += self._begin("call", event.name)
            elif isinstance(event, CallEnd):
                assert self._open is not None
                self._open.complete = True
                changes += self.finish()
            elif isinstance(event, ReasoningDelta | ContentDelta | ArgumentsDelta):
                changes += self._text(event)
        return changes

    def finish(self) -> list[tuple[Change, Block, str]]:
        """Close what is open."""
        block, self._open = self._open, None
        return [] if block is None else [("close", block, "")]

    def _text(self, event: ReasoningDelta | ContentDelta | ArgumentsDelta) -> list[tuple[Change, Block, str]]:
        kind: Kind = "call"
        if not isinstance(event, ArgumentsDelta):
            kind = "reasoning" if isinstance(event, ReasoningDelta) else "content"
        changes = [] if self._open is not None and self._open.kind == kind else self._begin(kind)
        assert self._open is not None
        self._open.pieces.append(event.text)
        return [*changes, ("delta", self._open, event.text)]

    def _begin(self, kind: Kind, name: str = "") -> list[tuple[Change, Block, str]]:
        changes = self.finish()
        self._open = Block(len(self.all), kind, name, complete=kind != "call")
        self.all.append(self._open)
        return [*changes, ("open", self._open, "")]
