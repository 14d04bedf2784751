"""Strict parsing: complete replies that keep to the format in every character, as the published encoder reads them.

For checking what a model or a data set produces. A server reads replies with `leadline/text/parse.py`, which forgives.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from leadline.text.chat import BOS, EOS
from leadline.text.events import assistant_message
from leadline.text.messages import Message
from leadline.text.tools import DSML, THINK_END, THINK_START, to_json

_BLOCK_START = f"\n\n<{DSML}tool_calls"
_BLOCK_END = f"</{DSML}tool_calls>"
_INVOKE = f"<{DSML}invoke"
_INVOKE_END = f"</{DSML}invoke"
_PARAMETER = f"<{DSML}parameter"
_PARAMETER_END = f"/{DSML}parameter"


class MarkupError(ValueError):
    """A reply leaves the format; one line that says where."""


def parse_strictly(text: str, thinking: bool) -> Message:
    """The message of a complete reply, end of turn included.

    thinking: whether the reply starts with reasoning. Raises MarkupError where the reply leaves the format. Control
    tokens are known by their spelling, so a reply that quotes one in its content is refused.
    """
    reasoning, position = "", 0
    if thinking:
        reasoning, tag, position = _read_until(text, 0, (THINK_END, _BLOCK_START))
        _require(tag == THINK_END, f"the reasoning does not end with {THINK_END}")
    content, tag, position = _read_until(text, position, (EOS, _BLOCK_START))
    calls: list[tuple[str, str]] = []
    if tag == _BLOCK_START:
        calls, position = _read_calls(text, position)
        after, _, position = _read_until(text, position, (EOS,))
        _require(not after, f"the tool calls are followed by {_shown(after)}")
    else:
        _require(tag == EOS, f"the reply does not end with {EOS}")
    _require(position == len(text), f"the end of the turn is followed by {_shown(text[position:])}")
    for token in (BOS, EOS, THINK_START, THINK_END, DSML):
        _require(token not in content and token not in reasoning, f"{token} stands in the text")
    return assistant_message(content, reasoning, calls)


def _read_calls(text: str, position: int) -> tuple[list[tuple[str, str]], int]:
    """Calls of a block, each as (function name, arguments as JSON), and where the block ends.

    position: directly after `_BLOCK_START`.
    """
    calls: list[tuple[str, str]] = []
    while position < len(text):
        between, tag, position = _read_until(text, position, (_INVOKE, _BLOCK_END))
        _require(between == ">\n", f"expected '>' and a line break before the next tag, found {_shown(between)}")
        if tag == _BLOCK_END:
            break
        _require(tag is not None, "the block is not closed")
        header, tag, position = _read_until(text, position, (_PARAMETER, _INVOKE_END))
        match = re.match(r'\s*name="(.*?)">\n$', header, re.DOTALL)
        if match is None:
            raise MarkupError(f"reply: {_shown(header)} does not name a function")
        arguments: dict[str, str] = {}
        while tag == _PARAMETER:
            name, value, position = _read_parameter(text, position)
            _require(name not in arguments, f"parameter {name!r} appears twice")
            arguments[name] = value
            between, tag, position = _read_until(text, position, (_PARAMETER, _INVOKE_END))
            _require(
                between == ">\n", f"expected '>' and a line break after parameter {name!r}, found {_shown(between)}"
            )
        calls.append((match[1], "{" + ", ".join(f"{to_json(key)}: {arguments[key]}" for key in arguments) + "}"))
    return calls, position


def _read_until(text: str, position: int, tags: Iterable[str]) -> tuple[str, str | None, int]:
    """Text up to the first of the tags, that tag, and the position after it; without one, all text, None, its end."""
    match = re.compile("|".join(map(re.escape, tags))).search(text, position)
    if match is None:
        return text[position:], None, len(text)
    return text[position : match.start()], match[0], match.end()


def _read_parameter(text: str, position: int) -> tuple[str, str, int]:
    body, _, position = _read_until(text, position, (_PARAMETER_END,))
    match = re.match(r' name="(.*?)" string="(true|false)">(.*?)<$', body, re.DOTALL)
    if match is None:
        raise MarkupError(f'reply: {_shown(body)} is not a parameter with a name and string="true|false"')
    name, is_string, value = match.groups()
    return name, to_json(value) if is_string == "true" else value, position


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise MarkupError(f"reply: {message}")
