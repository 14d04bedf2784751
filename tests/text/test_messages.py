"""Messages from outside: what is wrong with a conversation, in one line that names the message."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leadline.text.chat import render
from leadline.text.messages import ROLES, ChatError, User, read_turns

Message = dict[str, Any]

USER: Message = {"role": "user", "content": "Hi"}
CALL: Message = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLER: Message = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def function(**fields: Any) -> Message:
    return {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}", **fields}}]}


NESTED: list[Any] = []
NESTED.append(NESTED)

WRONG = [
    ([], "the conversation has no messages"),
    ([USER, "Hi"], "message 1: it is of type str; give an object"),
    ([USER, {"content": "Hi"}], "message 1: role None is unknown; use one of system,"),
    ([{"role": "asistant", "content": "Hi"}], "message 0: role 'asistant' is unknown; did you mean 'assistant'?"),
    ([{"role": "user"}], "message 0: a user message without content"),
    ([{"role": "user", "content": 7}], "message 0: content is of type int; give text"),
    ([{"role": "user", "content": ["Hi"]}], "message 0: a content part is of type str"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "message 0: a content part has type 'image_url'"),
    ([{"role": "user", "content": [{"type": "text", "text": 7}]}], "message 0: text is of type int"),
    ([{"role": "user", "content": "\ud800"}], r"message 0: content holds the lone surrogate U\+D800"),
    ([{"role": "latest_reminder", "content": None}], "message 0: a latest_reminder message without content"),
    ([{"role": "developer", "content": ""}], "message 0: a developer message without content"),
    # fields on the wrong role
    ([{**USER, "tools": [{"function": {}}]}], "message 0: the role user has no tools; only system and developer"),
    ([{**USER, "response_format": {"x": 1}}], "message 0: the role user has no response_format"),
    ([{**USER, "reasoning_content": "r"}], "message 0: the role user has no reasoning_content; only assistant"),
    ([{**USER, "tool_calls": [CALL]}], "message 0: the role user has no tool_calls; only assistant"),
    ([{"role": "system", "content": "", "task": "query"}], "message 0: the role system has no task; only user"),
    # tasks
    ([{**USER, "task": "title"}], "message 0: user task 'title' is unknown; use one of action"),
    ([{**USER, "task": "querry"}], "message 0: user task 'querry' is unknown; did you mean 'query'"),
    ([{"role": "assistant", "task": "query"}], "message 0: assistant task 'query' is unknown"),
    ([USER, {**USER, "task": "query"}], "message 1: its task would be lost, because it joins the user turn"),
    ([{**USER, "task": "query"}, USER], "message 0: its task 'query' would be lost, because no answer follows"),
    ([{**USER, "extracted_url": "u"}], "message 0: extracted_url without the task read_url"),
    # calls
    ([{"role": "tool", "content": "x"}], "message 0: a tool result, but the assistant called nothing"),
    (
        [USER, {"role": "assistant", "content": "x"}, {"role": "tool", "content": "x"}],
        "message 2: a tool result, but the assistant called nothing",
    ),
    ([CALLER, {"role": "tool", "tool_call_id": "b", "content": "x"}], "message 1: tool_call_id 'b' is no call of mess"),
    ([CALLER, {"role": "tool", "tool_call_id": "a"}], "message 1: a tool message without content"),
    ([{"role": "assistant", "tool_calls": "f"}], "message 0: tool_calls is no list of objects"),
    ([{"role": "assistant", "tool_calls": [{"id": "a"}]}], "message 0: an entry of tool_calls has no function"),
    ([function(name="")], "message 0: tool_calls name the function ''"),
    ([function(name='f">')], "message 0: tool_calls name the function"),
    ([function(arguments="[1]")], "message 0: the arguments of 'f' are of type list; give a JSON object"),
    ([function(arguments=None)], "message 0: the arguments of 'f' are of type NoneType"),
    ([function(arguments='{"x": "\\ud800"}')], "message 0: tool_calls holds the lone surrogate"),
    ([function(arguments={"x": NESTED})], "message 0: tool_calls: "),
    ([{"role": "system", "tools": [{"function": {"name": {1, 2}}}]}], "message 0: tools: not JSON"),
    # replies to go on with
    ([USER, {"role": "assistant", "prefix": True}], "message 1: prefix is set where the reply cannot go on"),
    ([USER, {**CALLER, "content": "x", "prefix": True}], "message 1: prefix is set where the reply cannot go on"),
    ([USER, {"role": "assistant", "content": "x", "prefix": True}, USER], "message 1: prefix is set where"),
]


@pytest.mark.parametrize(("messages", "message"), WRONG)
def test_wrong_conversation(messages: list[Any], message: str) -> None:
    with pytest.raises(ChatError, match=f"^{message}") as caught:
        render(messages)
    assert "\n" not in str(caught.value)


def test_neighbouring_user_messages_and_results_are_one_turn() -> None:
    result = {"role": "tool", "tool_call_id": "a", "content": "r"}
    turns = read_turns([USER, USER, CALLER, result, USER, result])
    assert [turn.index for turn in turns] == [0, 2, 3]
    last = turns[-1]
    assert isinstance(last, User)
    assert [(part.text, part.order) for part in last.parts] == [
        ("<tool_result>r</tool_result>", 0),
        ("Hi", None),
        ("<tool_result>r</tool_result>", 0),
    ]


def test_a_result_without_id_answers_the_first_call() -> None:
    """As in the published encoder, which sorts it to the front."""
    caller = {**CALLER, "tool_calls": [CALL, {**CALL, "id": "b"}]}
    named = {"role": "tool", "tool_call_id": "b", "content": "second"}
    text = render([caller, named, {"role": "tool", "content": "first"}]).text
    assert text.index("first") < text.index("second")


def test_a_task_keeps_user_text_apart_and_takes_results() -> None:
    query = {**USER, "task": "query"}
    assert len(read_turns([query, USER])) == 2
    assert len(read_turns([CALLER, query, {"role": "tool", "content": "r"}])) == 2


def test_content_parts_are_joined_by_blank_lines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for role in ("system", "user", "developer", "latest_reminder"):
        assert "a\n\nb" in render([{"role": role, "content": parts}]).text
    result = {"role": "tool", "content": [*parts, {"type": "image_url"}]}
    assert "<tool_result>a\n\nb\n\n[Unsupported image_url]</tool_result>" in render([CALLER, result]).text


def test_arguments_are_an_object_or_its_text() -> None:
    as_object, as_text = function(arguments={"x": [1, "é"]}), function(arguments='{"x": [1,"\\u00e9"]}')
    assert render([as_object]).text == render([as_text]).text
    cut = render([function(arguments='{"x": [1')]).text
    assert '<｜DSML｜parameter name="arguments" string="true">{"x": [1</｜DSML｜parameter>' in cut


def test_reasoning_under_either_name() -> None:
    answers = [{"role": "assistant", "content": "x", name: "why"} for name in ("reasoning_content", "reasoning")]
    first, second = (render([USER, answer]).text for answer in answers)
    assert first == second
    assert "<think>why</think>x" in first


def test_fields_of_other_servers_are_ignored() -> None:
    extra = {"name": "x", "refusal": None, "annotations": [], "mask": 1, "tool_calls": None, "reasoning_content": None}
    assert render([{**USER, **extra}]).text == render([USER]).text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats() | st.sampled_from(ROLES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("content", "reasoning_content", "tool_calls", "tool_call_id", "tools", "response_format", "task", "prefix")


@settings(max_examples=300)
@given(
    messages=st.lists(
        st.builds(
            lambda role, fields: {"role": role, **fields},
            st.sampled_from(ROLES),
            st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4),
        )
        | VALUES,
        max_size=4,
    )
)
def test_anything_is_rendered_or_refused_in_one_line(messages: list[Any]) -> None:
    try:
        outcome = render(messages).text
    except ChatError as refusal:
        outcome = str(refusal)
    assert outcome.startswith("<｜begin▁of▁sentence｜>") or "\n" not in outcome
    outcome.encode("utf8")
