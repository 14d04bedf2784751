"""The strict reader: what the published one accepts, with the same result, and nothing else."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from leadline.text.strict import MarkupError, parse_strictly

REPLIES = Path(__file__).parents[1] / "golden" / "encoding" / "replies.jsonl.xz"


def test_replies_as_published() -> None:
    with lzma.open(REPLIES, "rt", encoding="utf8") as lines:
        cases = [json.loads(line) for line in lines]
    assert len(cases) == 500
    refused = 0
    for case in cases:
        if case["message"] is not None:
            assert parse_strictly(case["text"], case["thinking"]) == case["message"]
            continue
        refused += 1
        with pytest.raises(MarkupError) as caught:
            parse_strictly(case["text"], case["thinking"])
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 200
    assert 100 < refused < 400


CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="x" string="false">1</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls><｜end▁of▁sentence｜>"
)
PARAMETER = '<｜DSML｜parameter name="x" string="false">1</｜DSML｜parameter>\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r" + CALL, "the reasoning does not end with </think>"),
        ("r</think>c", "the reply does not end with"),
        ("r</think>c<｜end▁of▁sentence｜>more", "the end of the turn is followed by 'more'"),
        ("r</think>" + CALL.replace("calls><", "calls>more<"), "the tool calls are followed by 'more'"),
        ("r</think>c<think><｜end▁of▁sentence｜>", "<think> stands in the text"),
        ("r</think>" + CALL.replace(">\n<｜DSML｜invoke", "><｜DSML｜invoke"), "expected '>' and a line break"),
        ("r</think>" + CALL.replace("invoke name", "invoke nam"), "does not name a function"),
        ("r</think>" + CALL.replace('"false"', '"no"'), 'is not a parameter with a name and string="true|false"'),
        ("r</think>" + CALL.replace(PARAMETER, PARAMETER * 2), "parameter 'x' appears twice"),
        ("r</think>" + CALL[: CALL.index("</｜DSML｜tool_calls")] + "x", "expected '>' and a line break"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(MarkupError, match=f"^reply: .*{message}".replace("|", r"\|")):
        parse_strictly(text, thinking=True)


def test_arguments_keep_the_text_of_their_values() -> None:
    message = parse_strictly(CALL.replace("1<", "[1,2]<"), thinking=False)
    assert message.get("tool_calls") == [{"type": "function", "function": {"name": "f", "arguments": '{"x": [1,2]}'}}]
