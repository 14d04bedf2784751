"""Tools: how a prompt declares them, and the DSML markup in which the model calls them.

The prompt lists each function as one line of JSON, between a preamble and a closing line. Their very words belong to
the format, because the model was trained on them. A call is markup around plain values:

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="get_weather">
    <｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>
    <｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

A value with `string="true"` is the string itself, without quotes or escapes: code in a parameter reads like code. Any
other value is JSON. Nothing is escaped, and nothing needs to be: `｜DSML｜` is a control token, which ordinary text
cannot contain, so a value may spell a closing tag and still be a value.

JSON is written as Python's `json.dumps` does by default, with spaces after colon and comma, keys in the order given and
non-ASCII characters kept. The model has seen no other form, and another one means other tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from leadline.text.tokenizer import Control

THINK_START = Control("<think>")
THINK_END = Control("</think>")
DSML = Control("｜DSML｜")

_PREAMBLE = """\
## Tools

You have access to a set of tools to help answer the user's question. \
You can invoke tools by writing a "<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. \
For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), \
you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
_CLOSING = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""


@dataclass(frozen=True)
class Call:
    """One call of a function."""

    name: str
    arguments: Mapping[str, object]


def to_json(value: object) -> str:
    """JSON as the model knows it. Raises ValueError for what JSON cannot hold."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None


def tools_block(functions: Iterable[str]) -> list[str]:
    """Pieces of the section that declares tools; functions: each function's JSON, see `to_json`."""
    return [*_with_controls(_PREAMBLE), "\n".join(functions), _CLOSING]


def calls_block(calls: Iterable[Call]) -> list[str]:
    """Pieces of the markup that calls functions, with the blank line that sets it apart from the text before."""
    pieces = ["\n\n", *_start("tool_calls>\n")]
    for call in calls:
        pieces += _start(f'invoke name="{call.name}">\n')
        for position, (name, value) in enumerate(call.arguments.items()):
            pieces += ["\n"] if position else []
            pieces += _parameter(name, value)
        pieces += ["\n", *_end("invoke>\n")]
    return [*pieces, *_end("tool_calls>")]


def _parameter(name: str, value: object) -> list[str]:
    is_string = isinstance(value, str)
    text = value if is_string else to_json(value)
    flag = "true" if is_string else "false"
    return [*_start(f'parameter name="{name}" string="{flag}">'), text, *_end("parameter>")]


def _start(rest: str) -> list[str]:
    return ["<", DSML, rest]


def _end(rest: str) -> list[str]:
    return ["</", DSML, rest]


def _with_controls(text: str) -> list[str]:
    """Pieces of trusted text, in which spellings of control tokens are control tokens."""
    pieces = re.split(f"({DSML}|{THINK_START}|{THINK_END})", text)
    return [Control(piece) if n % 2 else piece for n, piece in enumerate(pieces)]
