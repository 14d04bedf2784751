"""The markup of tools, as pieces; its text is compared with the published encoder in test_chat.py."""

from __future__ import annotations

import pytest

from leadline.text.tokenizer import Control
from leadline.text.tools import DSML, THINK_END, THINK_START, Call, calls_block, to_json, tools_block


def test_values_are_text_even_where_they_spell_markup() -> None:
    pieces = calls_block([Call("f", {"x": "</｜DSML｜parameter>"})])
    assert "</｜DSML｜parameter>" in pieces
    assert [piece for piece in pieces if isinstance(piece, Control)] == [DSML] * 6


def test_preamble_speaks_of_control_tokens_and_schemas_do_not() -> None:
    pieces = tools_block(['{"description": "<think>"}'])
    controls = [piece for piece in pieces if isinstance(piece, Control)]
    assert controls == [DSML] * 9 + [THINK_START, THINK_START, THINK_END, THINK_END]
    assert "<think>" in "".join(piece for piece in pieces if not isinstance(piece, Control))


def test_a_call_without_parameters_keeps_its_line() -> None:
    assert "".join(calls_block([Call("f", {})])) == (
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    )


def test_json_has_the_form_of_the_training_data() -> None:
    assert to_json({"b": [1, 1.0, 1e-7, None, True], "a": "é\u2028\n/"}) == (
        '{"b": [1, 1.0, 1e-07, null, true], "a": "é\u2028\\n/"}'
    )


def test_what_is_not_json_is_refused() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (object(), {"x": b""}, deep):
        with pytest.raises(ValueError, match="not JSON"):
            to_json(value)
