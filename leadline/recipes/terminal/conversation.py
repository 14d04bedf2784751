"""Conversation: what was said, and how it is laid out so that the cache answers most of it.

What changes least comes first: the packed files, then the system text, then the turns. So every question shares its
prompt with the one before, up to the latest answer: the reasoning in it is left out of the next prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from leadline.text.chat import Mode, Prompt, Release, render
from leadline.text.messages import ChatError
from leadline.train.atomic import write_text


class ConversationError(ValueError):
    """A conversation that cannot be stored, read or continued; the message says why."""


@dataclass
class Conversation:
    """files: packed, in front of everything. attached: packed, in front of the next question. budget: most tokens of
    thinking, None for any number. turns: messages of user and assistant in OpenAI's shape."""

    files: str = ""
    system: str = ""
    mode: Mode = "high"
    release: Release = "preview"
    budget: int | None = None
    attached: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)

    # -- turns -----------------------------------------------------------------------------------------------------

    def ask(self, text: str) -> None:
        """Add a question. One that was left without any answer is dropped first."""
        self.take_back()
        parts = [part for part in (self.attached, text) if part]
        self.turns.append({"role": "user", "content": "\n\n".join(parts)})
        self.attached = ""

    def answer(self, content: str, reasoning: str) -> None:
        """Add what was said, whole or cut short; nothing at all leaves the question open."""
        if content or reasoning:
            self.turns.append({"role": "assistant", "content": content, "reasoning_content": reasoning})

    def take_back(self) -> None:
        """Drop a question without an answer."""
        if self.is_open:
            self.turns.pop()

    def reopen(self) -> None:
        """Drop the latest answer, so that its question can be answered again."""
        if self.turns and not self.is_open:
            self.turns.pop()
        if not self.turns:
            raise ConversationError("there is no question yet that could be answered again")

    @property
    def is_open(self) -> bool:
        """Whether the latest question waits for an answer."""
        return bool(self.turns) and self.turns[-1]["role"] == "user"

    @property
    def reasoning(self) -> str:
        """What the model thought before its latest answer."""
        return self.turns[-1].get("reasoning_content", "") if self.turns else ""

    # -- prompts ---------------------------------------------------------------------------------------------------

    def opening(self) -> Prompt:
        """What stands in front of the first turn, the same for every question."""
        return render([self._system()], self.mode, self.release)

    def prompt(self) -> Prompt:
        """The whole conversation, ready for an answer. Raises ChatError."""
        return render([self._system(), *self.turns], self.mode, self.release)

    def _system(self) -> Mapping[str, object]:
        text = "\n\n".join(part for part in (self.files.rstrip("\n"), self.system) if part)
        return {"role": "system", "content": text}

    # -- files -----------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write everything to a JSON file, which appears complete or not at all."""
        try:
            write_text(path, json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise ConversationError(f"{path}: cannot be written ({error.strerror})") from None

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read what `save` wrote. Raises ConversationError for anything else."""
        try:
            values = json.loads(path.read_text(encoding="utf8"))
        except OSError as error:
            raise ConversationError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError):
            raise ConversationError(f"{path}: not a conversation: no JSON") from None
        try:
            found = cls(**_checked(values))
            found.prompt()
        except (ConversationError, ChatError) as error:
            raise ConversationError(f"{path}: not a conversation: {error}") from None
        return found


def _checked(values: Any) -> dict[str, Any]:
    """Fields of a conversation, each of its type."""
    if not isinstance(values, dict) or values.keys() != {each.name for each in fields(Conversation)}:
        raise ConversationError("expected a file that /save wrote")
    for name in ("files", "system", "mode", "release", "attached"):
        if not isinstance(values[name], str):
            raise ConversationError(f"{name} is no text")
    budget = values["budget"]
    if budget is not None and (type(budget) is not int or budget < 0):
        raise ConversationError(f"budget is {budget!r}, expected a number of tokens or null")
    turns = values["turns"]
    if not isinstance(turns, list) or not all(_is_turn(turn, number) for number, turn in enumerate(turns)):
        raise ConversationError("turns are not user and assistant in alternation")
    return values


def _is_turn(turn: Any, number: int) -> bool:
    keys = {"role", "content"} if number % 2 == 0 else {"role", "content", "reasoning_content"}
    return (
        isinstance(turn, dict)
        and turn.keys() == keys
        and turn["role"] == ("user", "assistant")[number % 2]
        and all(isinstance(value, str) for value in turn.values())
    )
