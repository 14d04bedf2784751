from __future__ import annotations

import json
from typing import Any

import pytest
from openai import OpenAI

ASK: Any = {"model": "tiny", "input": "hello", "max_output_tokens": 20, "temperature": 0}
QUIET: Any = {"thinking": {"type": "disabled"}}
THINKS: Any = {"thinking": {"type": "enabled", "budget_tokens": 6}}
TOOL: Any = {
    "type": "function",
    "name": "pick",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["n"],
    },
}


def plain(item: Any) -> dict[str, Any]:
    return item.model_dump(exclude={"id": True, "call_id": True, "content": {"__all__": {"parsed"}}})


@pytest.mark.parametrize("extra", [QUIET, THINKS])
def test_streaming_equals_not_streaming(openai_client: OpenAI, extra: Any) -> None:
    whole = openai_client.responses.create(**ASK, extra_body=extra)
    events = list(openai_client.responses.create(**ASK, extra_body=extra, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.incomplete")
    last: Any = events[-1]
    assert [item.type for item in whole.output] == (["message"] if extra is QUIET else ["reasoning", "message"])
    assert [plain(item) for item in last.response.output] == [plain(item) for item in whole.output]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None
    assert whole.usage.output_tokens == 20
    assert whole.usage.output_tokens_details.reasoning_tokens == (0 if extra is QUIET else 7)


def test_the_client_adds_a_stream_up(openai_client: OpenAI) -> None:
    ask = {**ASK, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 200}
    with openai_client.responses.stream(**ask, extra_body=QUIET) as stream:
        response = stream.get_final_response()
    (call,) = response.output
    assert call.type == "function_call"
    assert response.status == "completed"
    assert 1 <= json.loads(call.arguments)["n"] <= 9
    given: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": "4"},
    ]
    following = openai_client.responses.create(
        **{**ASK, "input": given, "tools": [TOOL], "tool_choice": "none"}, instructions="Be kind.", extra_body=QUIET
    )
    assert following.output_text


def test_a_schema_is_enforced(openai_client: OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "x", "schema": {"enum": ["yes", "no"]}}}
    ask = {**ASK, "max_output_tokens": 100, "text": form, "extra_body": QUIET}
    assert openai_client.responses.create(**ask).output_text in ('"yes"', '"no"')


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"previous_response_id": "resp-1"}, "answers are not stored"),
        ({"background": True}, "keeps no answers"),
        ({"tools": [{"type": "web_search"}]}, "not offered here"),
        ({"input": [{"type": "computer_call"}]}, "does not know"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "reads text only"),
        ({"input": [{"role": "user", "content": 3}]}, "neither text"),
        ({"input": []}, "no messages"),
    ],
)
def test_what_is_wrong_is_said(server: Any, change: Any, words: str) -> None:
    answer = server.post("/v1/responses", {**ASK, **change})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
