"""Parse: what the model writes to reasoning, content and tool calls, while it is being written.

A reply is text with control tokens in it (`leadline/text/tools.py` shows the markup of calls):

    I should look.</think>Let me see.

    <｜DSML｜tool_calls>...</｜DSML｜tool_calls><｜end▁of▁sentence｜>

The reader is fed in pieces, of any size, and answers with events. It holds text back only while the next piece may turn
it into markup: a `<`, two line breaks before it, a tag that has begun. However a reply is cut, the events add up to the
same text, no markup is in it, and none of the text is missing.

Two front ends feed the reader. `TokenParser` takes token ids and knows control tokens by their ids, so that a reply may
spell `</think>` in its text. `TextParser` takes text or bytes from an engine that hides the ids, and has to believe
every spelling. Such an engine must not skip special tokens: that deletes `</think>` and the tags.

Models make mistakes, and clients should not see them. The reader repairs what has been met in the wild:

- A call without `</think>` before it ends the reasoning.
- A tag that is missing is implied by the next: `<invoke>` without its block, `</parameter>`, `</invoke>`.
- A control token where it means nothing (`</think>` twice, half a tag) is dropped; the text around it stays.
- Text between or after calls is content; white space there is layout and is dropped.
- A value that claims to be JSON (`string="false"`) and is not becomes a string, as does one that makes no claim.

So the arguments of a complete call are always valid JSON. They stream as they come, except for values that are not
strings: whether these are JSON shows only at their end.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from itertools import groupby
from typing import NoReturn, cast

from leadline.text.chat import BOS, EOS, Section
from leadline.text.events import (
    ArgumentsDelta,
    CallBegin,
    CallEnd,
    ContentDelta,
    Delta,
    EndOfTurn,
    Event,
    ReasoningDelta,
)
from leadline.text.tokenizer import Control, Tokenizer
from leadline.text.tools import DSML, THINK_END, THINK_START, to_json

# -- front ends -------------------------------------------------------------------------------------------------


class TokenParser:
    """Events of a reply that comes as token ids."""

    def __init__(self, tokenizer: Tokenizer, section: Section) -> None:
        """section: what the reply starts with, see `Prompt.opens`."""
        for token in (THINK_START, THINK_END, DSML):
            tokenizer.token_id(token)  # raises TokenizerError if the tokenizer is not V4's
        self._eos_id = tokenizer.eos_id
        self._tokenizer = tokenizer
        self._reader = _Reader(section)
        self._characters = _character_decoder()

    def feed(self, ids: Iterable[int]) -> list[Event]:
        """Events that more ids bring. The last bytes wait if they are only a part of a character."""
        run: list[bytes] = []
        for id in ids:
            token = EOS if id == self._eos_id else self._tokenizer.control_token(id)
            if token is None:
                run.append(self._tokenizer.token_bytes(id))
            else:
                self._reader.text(self._characters.decode(b"".join(run), final=True))
                self._reader.control(token)
                run = []
        self._reader.text(self._characters.decode(b"".join(run)))
        return self._reader.take()

    def finish(self) -> list[Event]:
        """Events that waited for more ids."""
        self._reader.text(self._characters.decode(b"", final=True))
        self._reader.finish()
        return self._reader.take()


class TextParser:
    """Events of a reply that comes as text, or as bytes of UTF-8."""

    def __init__(self, section: Section) -> None:
        """section: what the reply starts with, see `Prompt.opens`."""
        self._reader = _Reader(section)
        self._characters = _character_decoder()
        self._held = ""  # the end of the text so far, where a control token may have begun

    def feed(self, text: str | bytes) -> list[Event]:
        """Events that more text brings."""
        more = text if isinstance(text, str) else self._characters.decode(text)
        *spelled, rest = _SPELLED.split(self._held + more)
        self._read(spelled)
        match = _SPELLED_IN_PART.search(rest, max(len(rest) - _LONGEST_SPELLED, 0))
        cut = match.start() if match else len(rest)
        self._reader.text(rest[:cut])
        self._held = rest[cut:]
        return self._reader.take()

    def finish(self) -> list[Event]:
        """Events that waited for more text."""
        self._read(_SPELLED.split(self._held + self._characters.decode(b"", final=True)))
        self._reader.finish()
        return self._reader.take()

    def _read(self, pieces: Iterable[str]) -> None:
        """Pieces as `_SPELLED` splits them: text and control tokens in turn."""
        for n, piece in enumerate(pieces):
            if n % 2:
                self._reader.control(Control(piece))
            else:
                self._reader.text(piece)


# What can be told apart from text by its spelling alone; the tokens of a user's turn, for one, may well be quoted.
_READ_TOKENS = (BOS, EOS, THINK_START, THINK_END, DSML)
_SPELLED = re.compile(f"({'|'.join(_READ_TOKENS)})")
_LONGEST_SPELLED = max(map(len, _READ_TOKENS))
_STARTS = {token[:length] for token in _READ_TOKENS for length in range(1, len(token))}
_SPELLED_IN_PART = re.compile(rf"(?:{'|'.join(sorted(_STARTS, key=len, reverse=True))})\Z")


def _character_decoder() -> codecs.IncrementalDecoder:
    """Holds back a part of a character; what can never become one is U+FFFD."""
    return codecs.getincrementaldecoder("utf8")(errors="replace")


# -- the reader -------------------------------------------------------------------------------------------------


class _Place(Enum):
    """Where in the reply the reader stands: what plain text means there."""

    REASONING = auto()
    CONTENT = auto()
    CALL = auto()  # inside of a call, between its parameters
    STRING = auto()  # a value that is a string
    JSON = auto()  # a value that is JSON, if it keeps its word
    ENDED = auto()


_BLOCK, _INVOKE, _PARAMETER = "tool_calls>", 'invoke name="', 'parameter name="'
_INVOKE_END, _PARAMETER_END = "invoke>", "parameter>"

# What ends a header. A name needs no end quote to be read: a line break ends it as well.
_INVOKE_HEADER = re.compile('">|>?\n')
_PARAMETER_HEADER = re.compile('" string="(true|false)">')
_LONGEST_HEADER_END = len('" string="false">')
# A parameter whose header is damaged, as far as it can still be told from the value.
_DAMAGED_PARAMETER = re.compile(r"""(.*?)"?(?: string=["']?(\w*)["']?)?>(.*)""", re.DOTALL)

# Text that may belong to the tag of a coming control token: brackets, and before a block of calls a blank line.
_BEFORE_BLOCK = re.compile(r"\n{0,2}(?:</?)?\Z")
_BEFORE_TAG = re.compile(r"(?:</?)?\Z")
_LONGEST_BEFORE = len("\n\n</")


@dataclass
class _Tag:
    """A tag that has begun. before: line breaks in front of it; text, if this turns out to be no tag."""

    is_end: bool
    before: str
    text: list[str] = field(default_factory=list[str])
    header: re.Pattern[str] | None = None
    """What ends the name, once it is known which tag this is; `text` then holds the name so far."""
    tail: str = ""
    """The end of `text`, where `header` may have begun to match."""


class _Reader:
    """The state machine: takes text and control tokens, collects events."""

    def __init__(self, section: Section) -> None:
        self._place = _Place.REASONING if section == "reasoning" else _Place.CONTENT
        self._events: list[Event] = []
        self._held = ""  # the end of the text so far that may yet turn out to be markup
        self._tag: _Tag | None = None
        self._skips_space = False  # between and after calls, until text follows
        self._has_content = False
        self._index = -1  # of the latest call
        self._has_arguments = False
        self._value: list[str] = []  # a JSON value so far

    def take(self) -> list[Event]:
        """Events since the last time, with neighbouring deltas of one kind joined."""
        events, self._events = self._events, []
        return _joined(events)

    def text(self, text: str) -> None:
        while text and self._place is not _Place.ENDED:
            text = self._plain(text) if self._tag is None else self._tag_text(self._tag, text)

    def control(self, token: Control) -> None:
        if self._place is _Place.ENDED:
            return
        if self._tag is not None:
            self._leave_tag(self._tag)
        if token == DSML:
            self._begin_tag()
            return
        self._release()
        if token == EOS:
            self._end_call()
            self._events.append(EndOfTurn())
            self._place = _Place.ENDED
        elif token == THINK_END and self._place is _Place.REASONING:
            self._place = _Place.CONTENT
        elif token == THINK_START and self._place is _Place.CONTENT and not self._has_content and self._index < 0:
            self._place = _Place.REASONING
            self._skips_space = False

    def finish(self) -> None:
        """The reply ends here, complete or cut. A call that is cut has no end, so that nobody takes it for complete."""
        if self._place is _Place.ENDED:
            return
        if self._tag is not None:
            self._leave_tag(self._tag, is_cut=True)
        self._release()
        self._arguments("".join(self._value))
        self._place = _Place.ENDED

    # -- plain text ---------------------------------------------------------------------------------------------

    def _plain(self, text: str) -> str:
        """Give out text, except its end if that may belong to a tag; returns nothing left."""
        text = self._held + text
        before = _BEFORE_TAG if self._place in (_Place.STRING, _Place.JSON) else _BEFORE_BLOCK
        match = before.search(text, max(len(text) - _LONGEST_BEFORE, 0))
        cut = match.start() if match else len(text)
        self._give(text[:cut])
        self._held = text[cut:]
        return ""

    def _release(self) -> None:
        """What was held back is text after all."""
        held, self._held = self._held, ""
        self._give(held)

    def _give(self, text: str) -> None:
        if self._skips_space:
            text = text.lstrip()
        if not text:
            return
        if self._place is _Place.REASONING:
            self._events.append(ReasoningDelta(text))
        elif self._place is _Place.STRING:
            self._arguments(to_json(text)[1:-1])
        elif self._place is _Place.JSON:
            self._value.append(text)
        else:
            self._skips_space = False
            self._has_content = self._has_content or not text.isspace()
            self._events.append(ContentDelta(text))

    def _arguments(self, text: str) -> None:
        if text:
            self._events.append(ArgumentsDelta(self._index, text))

    # -- tags ---------------------------------------------------------------------------------------------------

    def _begin_tag(self) -> None:
        held, self._held = self._held, ""
        before = held.rstrip("</")
        self._tag = _Tag(is_end=held.endswith("</"), before=before)

    def _tag_text(self, tag: _Tag, text: str) -> str:
        """Take text of a tag; returns what stands behind it."""
        if tag.header is not None:
            return self._header_text(tag, tag.header, text)
        text = "".join(tag.text) + text
        for name in (_BLOCK, _INVOKE_END, _PARAMETER_END) if tag.is_end else (_BLOCK, _INVOKE, _PARAMETER):
            if text.startswith(name):
                self._name_tag(tag, name)
                return text[len(name) :]
            if name.startswith(text):
                tag.text = [text]
                return ""
        self._tag = None  # not a tag after all: the marker is dropped, the text stays
        self._give(tag.before)
        return text

    def _name_tag(self, tag: _Tag, name: str) -> None:
        tag.text = []
        if name in (_INVOKE, _PARAMETER):
            tag.header = _INVOKE_HEADER if name == _INVOKE else _PARAMETER_HEADER
            return
        self._tag = None
        if not tag.is_end:
            self._open_block()
            return
        self._give(tag.before)
        if name == _PARAMETER_END:
            self._end_value()
        else:
            self._end_call()

    def _header_text(self, tag: _Tag, header: re.Pattern[str], text: str) -> str:
        """Take text of a header up to the end of the name; returns what stands behind it."""
        tag.text.append(text)
        seen = tag.tail + text
        match = header.search(seen)
        if match is None:
            tag.tail = seen[1 - _LONGEST_HEADER_END :]
            return ""
        whole = "".join(tag.text)
        name = whole[: len(whole) - len(seen) + match.start()]
        self._tag = None
        if header is _INVOKE_HEADER:
            self._begin_call(name.strip('"'))
        else:
            self._begin_value(tag, name, is_string=match[1] == "true")
        return seen[match.end() :]

    def _leave_tag(self, tag: _Tag, is_cut: bool = False) -> None:
        """The tag will get no more text. What there is of it is dropped, unless it holds a value."""
        self._tag = None
        text = "".join(tag.text)
        damaged = _DAMAGED_PARAMETER.fullmatch(text) if tag.header is _PARAMETER_HEADER else None
        if damaged is not None:
            self._begin_value(tag, damaged[1], is_string=damaged[2] == "true")
            self._plain(damaged[3])
            return
        self._give(tag.before)
        if tag.header is not None and not is_cut:
            self._plain(text)

    def _open_block(self) -> None:
        self._end_call()
        self._place = _Place.CONTENT
        self._skips_space = True

    def _begin_call(self, name: str) -> None:
        self._end_call()
        self._index += 1
        self._events.append(CallBegin(self._index, name))
        self._has_arguments = False
        self._place = _Place.CALL
        self._skips_space = True

    def _begin_value(self, tag: _Tag, name: str, is_string: bool) -> None:
        self._end_value()
        if self._place is not _Place.CALL:  # the parameter of no call: its value is text like any other
            self._give(tag.before)
            return
        quote = '"' if is_string else ""
        self._arguments(f"{', ' if self._has_arguments else '{'}{to_json(name)}: {quote}")
        self._has_arguments = True
        self._place = _Place.STRING if is_string else _Place.JSON
        self._skips_space = False

    def _end_value(self) -> None:
        if self._place is _Place.STRING:
            self._arguments('"')
        elif self._place is _Place.JSON:
            value, self._value = "".join(self._value), []
            self._arguments(value if _is_json(value) else to_json(value))
        else:
            return
        self._place = _Place.CALL
        self._skips_space = True

    def _end_call(self) -> None:
        self._end_value()
        if self._place is not _Place.CALL:
            return
        self._arguments("}" if self._has_arguments else "{}")
        self._events.append(CallEnd(self._index))
        self._place = _Place.CONTENT


def _is_json(text: str) -> bool:
    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        json.loads(text, parse_int=str, parse_constant=no_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _joined(events: Iterable[Event]) -> list[Event]:
    joined: list[Event] = []
    for _, group in groupby(events, type):
        run = list(group)
        first = run[0]
        if isinstance(first, ReasoningDelta | ContentDelta | ArgumentsDelta):
            joined.append(replace(first, text="".join(delta.text for delta in cast("list[Delta]", run))))
        else:
            joined += run
    return joined
