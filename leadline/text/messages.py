"""Messages: a conversation as clients send it, checked and joined into turns.

Messages come from outside, so every field is looked at: a wrong one raises ChatError, with the number of the message
and what to do. What is left are turns, records in which nothing can be wrong any more. They are fewer than messages,
because neighbouring user messages and tool results are one user turn.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Required, TypedDict, TypeGuard, TypeVar, cast

from leadline.text.tools import Call, to_json

_Name = TypeVar("_Name", bound=str)

ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")
TASK_NAMES = ("action", "query", "authority", "domain", "title", "read_url")

_USER_TASKS = tuple(task for task in TASK_NAMES if task != "title")
_ROLES_WITH = {
    "tools": ("system", "developer"),
    "response_format": ("system", "developer"),
    "reasoning_content": ("assistant",),
    "reasoning": ("assistant",),
    "tool_calls": ("assistant",),
    "prefix": ("assistant",),
    "wo_eos": ("assistant",),
    "tool_call_id": ("tool",),
    "task": ("user", "developer", "assistant"),
    "extracted_url": ("user",),
}


class ChatError(ValueError):
    """A conversation that the format cannot express; one line that names the message and says what to do."""


class Message(TypedDict, total=False):
    """One message in OpenAI's shape, with DeepSeek's additions. Keys that the format has no place for are ignored."""

    role: Required[str]
    """system, user, assistant or tool; latest_reminder: a note of the application (date, place) before a user turn;
    developer: a user turn with tools, of DeepSeek's search agents."""
    content: str | Sequence[Mapping[str, object]] | None
    """Text, or parts `{"type": "text", "text": ...}`, which are joined by blank lines."""
    reasoning_content: str | None
    """assistant: what was thought before the content. `reasoning`, the name that some servers use, is read as well."""
    tool_calls: Sequence[Mapping[str, object]] | None
    """assistant: `{"id": ..., "function": {"name": ..., "arguments": ...}}`; arguments: a JSON object as text, or the
    object itself. Text that is not JSON, as of a reply that was cut, becomes one parameter named `arguments`."""
    tool_call_id: str | None
    """tool: the id of the call that the content answers."""
    tools: Sequence[Mapping[str, object]] | None
    """system, developer: `{"type": "function", "function": {...}}`; the inner object reaches the model as it is."""
    response_format: object
    """system, developer: the JSON schema of the reply, or `{"type": "json_object"}` for any JSON."""
    task: str | None
    """user, developer: action, query, authority, domain or read_url; assistant: title."""
    extracted_url: str | None
    """user, with the task read_url: the address in question."""
    prefix: bool
    """assistant, last: the reply goes on where this text ends: the content, or the reasoning if there is no content."""
    wo_eos: bool
    """assistant: leave out the end of the turn."""


@dataclass(frozen=True)
class Part:
    """Text of a user turn. order: position of the call that a tool result answers; None for text of the user."""

    text: str
    order: int | None = None


@dataclass(frozen=True)
class User:
    index: int
    parts: list[Part]
    task: str | None = None
    url: str | None = None


@dataclass(frozen=True)
class Instructions:
    """A system or developer message. functions: JSON of each tool. response_format: JSON, or empty."""

    index: int
    is_developer: bool
    content: str
    functions: list[str]
    response_format: str
    task: str | None = None


@dataclass(frozen=True)
class Reminder:
    index: int
    content: str
    task: None = None


@dataclass(frozen=True)
class Assistant:
    """reasoning: None if none was given. order: position of each call by its id."""

    index: int
    content: str
    reasoning: str | None
    calls: list[Call]
    order: dict[str, int]
    task: str | None
    is_prefix: bool
    has_eos: bool


Turn = User | Instructions | Reminder | Assistant
"""index: the message that the turn begins with."""


def read_turns(messages: Sequence[Mapping[str, object]]) -> list[Turn]:
    """Turns of a conversation. Raises ChatError."""
    if not messages:
        raise ChatError("the conversation has no messages; give at least one")
    turns: list[Turn] = []
    caller: Assistant | None = None
    for index, message in enumerate(messages):
        fields = _Fields(index, message)
        role = fields.role()
        if role == "assistant":
            caller = _read_assistant(fields, is_last=index == len(messages) - 1)
            turns.append(caller)
        elif role == "tool":
            _join(turns, User(index, [_read_result(fields, caller)]), fields)
        elif role == "user":
            _join(turns, _read_user(fields), fields)
        elif role == "latest_reminder":
            turns.append(Reminder(index, fields.required_content()))
        else:
            turns.append(_read_instructions(fields, is_developer=role == "developer"))
    return turns


def known(value: object, names: Iterable[_Name], what: str) -> _Name:
    """The value, if it is one of the names; otherwise raises ChatError with the nearest name."""
    names = tuple(names)
    if value in names:
        return cast(_Name, value)
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(names)}"
    raise ChatError(f"{what} {value!r} is unknown; {hint}")


def is_mapping(value: object) -> TypeGuard[Mapping[str, object]]:
    """Whether a value from outside is an object, in the sense of JSON."""
    return isinstance(value, Mapping)


# -- one message ------------------------------------------------------------------------------------------------


def _join(turns: list[Turn], new: User, fields: _Fields) -> None:
    """Add a user turn, or its parts to the user turn before it. A task closes a turn to text, not to tool results."""
    last = turns[-1] if turns else None
    is_result = new.parts[0].order is not None
    if not isinstance(last, User) or (last.task is not None and not is_result):
        turns.append(new)
    elif new.task is not None:
        raise fields.wrong(
            "its task would be lost, because it joins the user turn before it", "put both texts in one message"
        )
    else:
        last.parts.extend(new.parts)


def _read_user(fields: _Fields) -> User:
    task = fields.task(_USER_TASKS)
    url = fields.text("extracted_url")
    if url is not None and task != "read_url":
        raise fields.wrong("extracted_url without the task read_url", "set the task, or put the address in the content")
    return User(fields.index, [Part(fields.required_content())], task, url)


def _read_result(fields: _Fields, caller: Assistant | None) -> Part:
    if caller is None or not caller.calls:
        raise fields.wrong("a tool result, but the assistant called nothing", "put it after a message with tool_calls")
    call_id = fields.text("tool_call_id") or ""
    if call_id and caller.order and call_id not in caller.order:
        found = f"tool_call_id {call_id!r} is no call of message {caller.index}"
        raise fields.wrong(found, f"use one of {', '.join(caller.order)}")
    return Part(f"<tool_result>{fields.required_content()}</tool_result>", caller.order.get(call_id, 0))


def _read_instructions(fields: _Fields, is_developer: bool) -> Instructions:
    content = fields.content() or ""
    if is_developer and not content:
        raise fields.wrong("a developer message without content", "give it text")
    functions = [fields.json("tools", _function(fields, "tools", tool)) for tool in fields.objects("tools")]
    response_format = fields.values.get("response_format")
    schema = fields.json("response_format", response_format) if response_format else ""
    return Instructions(fields.index, is_developer, content, functions, schema, fields.task(_USER_TASKS))


def _read_assistant(fields: _Fields, is_last: bool) -> Assistant:
    content = fields.content() or ""
    reasoning = fields.text("reasoning_content")
    if reasoning is None:
        reasoning = fields.text("reasoning")
    calls: list[Call] = []
    order: dict[str, int] = {}
    for position, item in enumerate(fields.objects("tool_calls")):
        calls.append(_read_call(fields, item))
        call_id = _Fields(fields.index, item).text("id")
        if call_id:
            order[call_id] = position
    is_prefix = bool(fields.values.get("prefix"))
    if is_prefix and (not is_last or calls or not (content or reasoning)):
        raise fields.wrong(
            "prefix is set where the reply cannot go on",
            "set it on the last message only, with content or reasoning and without tool_calls",
        )
    has_eos = not is_prefix and not fields.values.get("wo_eos")
    return Assistant(fields.index, content, reasoning, calls, order, fields.task(("title",)), is_prefix, has_eos)


def _read_call(fields: _Fields, item: Mapping[str, object]) -> Call:
    function = _function(fields, "tool_calls", item)
    name = _Fields(fields.index, function).text("name")
    if not name or '"' in name or "\n" in name:
        raise fields.wrong(f"tool_calls name the function {name!r}", "use letters, digits, _ and -")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed_arguments(arguments)
    if not is_mapping(arguments):
        raise fields.wrong(f"the arguments of {name!r} are of type {type(arguments).__name__}", "give a JSON object")
    fields.json("tool_calls", arguments)
    return Call(name, arguments)


def _parsed_arguments(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"arguments": text}


def _function(fields: _Fields, key: str, item: Mapping[str, object]) -> Mapping[str, object]:
    function = item.get("function")
    if not is_mapping(function):
        raise fields.wrong(f"an entry of {key} has no function", 'use {"type": "function", "function": {"name": ...}}')
    return function


# -- one field --------------------------------------------------------------------------------------------------


class _Fields:
    """Fields of a message, each with its check. index: the number of the message, for errors."""

    def __init__(self, index: int, values: object) -> None:
        self.index = index
        if not is_mapping(values):
            raise self.wrong(
                f"it is of type {type(values).__name__}", 'give an object such as {"role": "user", "content": "Hi"}'
            )
        self.values = values

    def role(self) -> str:
        role = known(self.values.get("role"), ROLES, f"message {self.index}: role")
        for key, roles in _ROLES_WITH.items():
            if self.values.get(key) and role not in roles:
                raise self.wrong(f"the role {role} has no {key}", f"only {' and '.join(roles)} messages can")
        return role

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        return None if value is None else self._checked(key, value)

    def content(self) -> str | None:
        content = self.values.get("content")
        if not isinstance(content, list | tuple):
            return self.text("content")
        return "\n\n".join(self._part(part) for part in cast("Iterable[object]", content))

    def required_content(self) -> str:
        content = self.content()
        if content is None:
            raise self.wrong(f"a {self.values['role']} message without content", "give it text; it may be empty")
        return content

    def objects(self, key: str) -> list[Mapping[str, object]]:
        value = self.values.get(key)
        items = list(cast("Iterable[object]", value)) if isinstance(value, list | tuple) else [value]
        if value is not None and not all(map(is_mapping, items)):
            raise self.wrong(f"{key} is no list of objects", "give a list; OpenAI's chat completions show its shape")
        return [item for item in items if is_mapping(item)]

    def task(self, allowed: Sequence[str]) -> str | None:
        task = self.values.get("task")
        what = f"message {self.index}: {self.values['role']} task"
        return None if task is None else known(task, allowed, what)

    def json(self, key: str, value: object) -> str:
        try:
            text = to_json(value)
        except ValueError as error:
            raise self.wrong(f"{key}: {error}", "give plain objects, lists, text, numbers, booleans and null") from None
        return self._checked(key, text)

    def wrong(self, found: str, remedy: str) -> ChatError:
        return ChatError(f"message {self.index}: {found}; {remedy}")

    def _part(self, part: object) -> str:
        if not is_mapping(part):
            raise self.wrong(f"a content part is of type {type(part).__name__}", 'use {"type": "text", "text": ...}')
        if part.get("type") == "text":
            return _Fields(self.index, part).text("text") or ""
        if self.values["role"] == "tool":
            return f"[Unsupported {part.get('type')}]"
        raise self.wrong(f"a content part has type {part.get('type')!r}", "the model reads text only")

    def _checked(self, key: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.wrong(f"{key} is of type {type(value).__name__}", "give text")
        try:
            value.encode("utf8")
        except UnicodeEncodeError as error:
            lone = f"U+{ord(value[error.start]):04X}"
            raise self.wrong(f"{key} holds the lone surrogate {lone}", "remove or replace it") from None
        return value
