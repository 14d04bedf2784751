from __future__ import annotations

from typing import Any

import pytest
from anthropic import Anthropic

from leadline.text.tokenizer import Tokenizer

ASK: Any = {"model": "tiny", "max_tokens": 20, "messages": [{"role": "user", "content": "hello"}]}
GREEDY: Any = {"extra_body": {"temperature": 0}}
THINKS: Any = {"thinking": {"type": "enabled", "budget_tokens": 6}}
TOOL: Any = {
    "name": "pick",
    "description": "Pick.",
    "input_schema": {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}, "of": {"enum": ["red", "blue"]}},
        "required": ["n", "of"],
    },
}


@pytest.mark.parametrize("extra", [{}, THINKS])
def test_streaming_equals_not_streaming(anthropic_client: Anthropic, extra: Any) -> None:
    whole = anthropic_client.messages.create(**ASK, **extra, **GREEDY)
    with anthropic_client.messages.stream(**ASK, **extra, **GREEDY) as stream:
        streamed = stream.get_final_message()
    assert [block.type for block in whole.content] == (["thinking", "text"] if extra else ["text"])
    assert [block.model_dump(exclude={"parsed_output"}) for block in streamed.content] == [
        block.model_dump() for block in whole.content
    ]
    assert streamed.stop_reason == whole.stop_reason == "max_tokens"
    assert streamed.usage.output_tokens == whole.usage.output_tokens == 20


def test_a_call_is_enforced_and_its_result_is_taken_in(anthropic_client: Anthropic) -> None:
    ask = {**ASK, "max_tokens": 250, "tools": [TOOL], "tool_choice": {"type": "tool", "name": "pick"}, **GREEDY}
    whole = anthropic_client.messages.create(**ask)
    (call,) = whole.content
    assert call.type == "tool_use"
    assert whole.stop_reason == "tool_use"
    assert set(call.input) == {"n", "of"}
    with anthropic_client.messages.stream(**ask) as stream:
        (streamed,) = stream.get_final_message().content
    assert streamed.type == "tool_use"
    assert (streamed.name, streamed.input) == (call.name, call.input)
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "done"}]}
    messages: Any = [
        *ASK["messages"],
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, call.model_dump()]},
        {"role": "user", "content": [result, {"type": "text", "text": "and?"}]},
    ]
    answer = anthropic_client.messages.create(
        **{**ask, "messages": messages, "tool_choice": {"type": "none"}, "max_tokens": 5}
    )
    assert all(block.type == "text" for block in answer.content)
    assert answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) > whole.usage.input_tokens


def test_a_stop_sequence_is_named(anthropic_client: Anthropic) -> None:
    (block,) = anthropic_client.messages.create(**ASK, **GREEDY).content
    assert block.type == "text"
    stop = block.text[4:6]
    cut = anthropic_client.messages.create(**ASK, stop_sequences=[stop], **GREEDY)
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    assert cut.content[0].type == "text"
    assert cut.content[0].text == block.text[: block.text.index(stop)]


def test_the_assistant_is_continued(anthropic_client: Anthropic, tokenizer: Tokenizer) -> None:
    messages: Any = [*ASK["messages"], {"role": "assistant", "content": "fox"}]
    count = anthropic_client.messages.count_tokens(model="tiny", messages=ASK["messages"]).input_tokens
    answer = anthropic_client.messages.create(**{**ASK, "messages": messages, "max_tokens": 1})
    assert answer.usage.input_tokens == count + len(tokenizer.encode("fox"))


def test_tokens_are_counted_as_they_are_asked(anthropic_client: Anthropic) -> None:
    ask: Any = {"messages": ASK["messages"], "tools": [TOOL], "system": [{"type": "text", "text": "Be kind."}]}
    count = anthropic_client.messages.count_tokens(model="tiny", **ask).input_tokens
    usage = anthropic_client.messages.create(**{**ASK, **ask, "max_tokens": 1}).usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == count


def test_a_schema_is_enforced(anthropic_client: Anthropic) -> None:
    form: Any = {"type": "json_schema", "schema": {"enum": ["yes", "no"]}}
    answer = anthropic_client.messages.create(**{**ASK, "max_tokens": 100}, output_config={"format": form})
    assert answer.content[0].type == "text"
    assert answer.content[0].text in ('"yes"', '"no"')


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "reads text only"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, "called nothing"),
        ({"tools": [{"name": "bash", "type": "bash_20250124"}]}, "no input_schema"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "needs a name"),
    ],
)
def test_what_is_wrong_is_said(server: Any, change: Any, words: str) -> None:
    answer = server.post("/v1/messages", {**ASK, **change})
    assert answer.status_code == 400
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert words in answer.json()["error"]["message"]
