"""Events: what a reply consists of, in the order in which the model writes it.

A parser gives them out while the reply is being written. Deltas of one kind add up: all `ContentDelta`s to the content,
all `ArgumentsDelta`s of a call to its arguments. Every protocol that streams has its own words for these six.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from leadline.text.messages import Message


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """A tool call starts. index: 0, 1, ... within the reply."""

    index: int
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """More of a call's arguments, as JSON text."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """A tool call is complete; its arguments are valid JSON."""

    index: int


@dataclass(frozen=True)
class EndOfTurn:
    """The model ended its turn. Whatever it writes afterwards is not part of the reply."""


Delta = ReasoningDelta | ContentDelta | ArgumentsDelta
Event = Delta | CallBegin | CallEnd | EndOfTurn


def message_of(events: Iterable[Event]) -> Message:
    """The assistant message that the events of a reply add up to, with calls in OpenAI's shape but without ids."""
    reasoning: list[str] = []
    content: list[str] = []
    names: list[str] = []
    arguments: list[list[str]] = []
    for event in events:
        if isinstance(event, ReasoningDelta):
            reasoning.append(event.text)
        elif isinstance(event, ContentDelta):
            content.append(event.text)
        elif isinstance(event, CallBegin):
            names.append(event.name)
            arguments.append([])
        elif isinstance(event, ArgumentsDelta):
            arguments[event.index].append(event.text)
    calls = [(name, "".join(parts)) for name, parts in zip(names, arguments, strict=True)]
    return assistant_message("".join(content), "".join(reasoning), calls)


def assistant_message(content: str, reasoning: str, calls: Iterable[tuple[str, str]]) -> Message:
    """An assistant message in OpenAI's shape; calls: (function name, arguments as JSON)."""
    functions = ({"name": name, "arguments": arguments} for name, arguments in calls)
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": [{"type": "function", "function": function} for function in functions],
    }
