from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import OpenAI

from leadline.engine.request import Request, Sampling, ThinkingBudget
from leadline.serve.grammar import KnownOnly
from leadline.text.chat import render
from leadline.text.events import message_of
from leadline.text.parse import TokenParser
from leadline.text.tokenizer import Tokenizer
from leadline.text.tools import DSML, THINK_END

ASK: Any = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 20, "seed": 1}
QUIET: Any = {"thinking": {"type": "disabled"}}
THINKS: Any = {"thinking": {"type": "enabled", "budget_tokens": 6}}

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 4},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["city", "days", "unit"],
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "get_time"}}


def arguments_fit(call: Any) -> bool:
    arguments = json.loads(call.function.arguments)
    kinds = list(arguments) == ["city", "days", "unit"] and len(arguments["city"]) <= 4
    return kinds and 1 <= arguments["days"] <= 9 and arguments["unit"] in ("C", "F")


def streamed(client: OpenAI, **ask: Any) -> tuple[list[dict[str, Any]], Any]:
    """The messages that a stream adds up to, one for each choice, and its usage."""
    messages: dict[int, dict[str, Any]] = {}
    usage = None
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            message = messages.setdefault(choice.index, {"content": "", "reasoning_content": "", "calls": []})
            message["content"] += choice.delta.content or ""
            message["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or []:
                function: Any = call.function
                if call.id:
                    message["calls"].append([function.name, ""])
                message["calls"][call.index][1] += function.arguments or ""
            message["finish"] = choice.finish_reason
    return [messages[index] for index in sorted(messages)], usage


class TestAnswers:
    @pytest.mark.parametrize("mode", [QUIET, THINKS])
    def test_an_answer_is_that_of_its_solo_run(
        self, openai_client: OpenAI, tokenizer: Tokenizer, server: Any, alone: Callable[[Request], list[int]], mode: Any
    ) -> None:
        prompt = render(ASK["messages"], "non-think" if mode is QUIET else "high")
        request = Request(
            tuple(prompt.ids(tokenizer)),
            20,
            Sampling(seed=1, logit_bias={tokenizer.token_id(DSML): float("-inf")}),
            frozenset({tokenizer.eos_id}),
            thinking=None if mode is QUIET else ThinkingBudget(6, tokenizer.token_id(THINK_END)),
            mask=KnownOnly(server.service.grammars.known_V),
        )
        assert prompt.opens is not None
        parser = TokenParser(tokenizer, prompt.opens)
        expected: Any = message_of([*parser.feed(alone(request)), *parser.finish()])
        answer = openai_client.chat.completions.create(**ASK, extra_body=mode).choices[0]
        assert answer.message.content == expected["content"]
        assert (getattr(answer.message, "reasoning_content", None) or "") == expected["reasoning_content"]
        assert answer.finish_reason == "length"

    @pytest.mark.parametrize("extra", [QUIET, THINKS])
    def test_streaming_equals_not_streaming(self, openai_client: OpenAI, extra: Any) -> None:
        whole = openai_client.chat.completions.create(**ASK, n=2, extra_body=extra)
        parts, usage = streamed(openai_client, **ASK, n=2, extra_body=extra)
        assert [part["content"] for part in parts] == [choice.message.content for choice in whole.choices]
        assert parts[0]["content"] != parts[1]["content"]  # choices have seeds of their own
        reasoning = [getattr(choice.message, "reasoning_content", None) or "" for choice in whole.choices]
        assert [part["reasoning_content"] for part in parts] == reasoning
        assert [part["finish"] for part in parts] == [choice.finish_reason for choice in whole.choices]
        assert whole.usage is not None
        counts = ("prompt_tokens", "completion_tokens", "total_tokens")
        assert [getattr(usage, name) for name in counts] == [getattr(whole.usage, name) for name in counts]

    def test_answers_side_by_side_are_those_of_solo_runs(self, openai_client: OpenAI) -> None:
        asks = [{**ASK, "seed": seed, "extra_body": QUIET, "max_tokens": 12} for seed in range(6)]

        def content(ask: Any) -> str | None:
            return openai_client.chat.completions.create(**ask).choices[0].message.content

        one_by_one = [content(ask) for ask in asks]
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(content, asks)) == one_by_one

    def test_thinking_is_counted_and_ends_with_its_budget(self, openai_client: OpenAI) -> None:
        answer = openai_client.chat.completions.create(**ASK, extra_body=THINKS)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 20
        assert answer.usage.completion_tokens_details is not None
        assert answer.usage.completion_tokens_details.reasoning_tokens == 7  # the token that ends it counts too
        extra: Any = answer.usage
        assert extra.thinking_mode == "high"
        assert extra.prompt_cache_hit_tokens + extra.prompt_cache_miss_tokens == answer.usage.prompt_tokens
        message: Any = answer.choices[0].message
        assert message.reasoning == message.reasoning_content

    @pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
    def test_reasoning_is_accepted_back(self, server: Any, name: str) -> None:
        messages = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", name: "why", "tool_calls": [{"id": "1", **_call("get_time", "{}")}]},
            {"role": "tool", "tool_call_id": "1", "content": "noon"},
        ]
        body = {**ASK, "messages": messages, "tools": [CLOCK], "max_tokens": 1}
        without = {**body, "messages": [messages[0], {**messages[1], name: None}, messages[2]]}
        answers = [server.post("/v1/chat/completions", each).json() for each in (body, without)]
        assert answers[0]["usage"]["prompt_tokens"] == answers[1]["usage"]["prompt_tokens"] + 3  # one for each letter

    def test_a_second_question_comes_from_the_cache(self, openai_client: OpenAI) -> None:
        ask = {**ASK, "messages": [{"role": "user", "content": "x" * 300}], "extra_body": QUIET, "max_tokens": 2}
        openai_client.chat.completions.create(**ask)
        usage = openai_client.chat.completions.create(**ask).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == 256

    def test_user_text_is_no_control_token(self, server: Any, tokenizer: Tokenizer) -> None:
        def tokens(content: str) -> int:
            body = {**ASK, **QUIET, "messages": [{"role": "user", "content": content}], "max_tokens": 1}
            return server.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"]

        assert tokens(THINK_END) == tokens("") + len(tokenizer.encode("</think>"))
        assert len(tokenizer.encode("</think>")) > 1


class TestSampling:
    def test_stop_texts_cut_the_content(self, openai_client: OpenAI) -> None:
        content = openai_client.chat.completions.create(**ASK, extra_body=QUIET).choices[0].message.content
        assert content is not None
        stop = content[5:8]
        cut, usage = streamed(openai_client, **ASK, stop=["never said", stop], extra_body=QUIET)
        assert cut[0]["content"] == content[: content.index(stop)]
        assert cut[0]["finish"] == "stop"
        assert usage.completion_tokens < 20

    def test_logprobs_come_with_alternatives(self, openai_client: OpenAI) -> None:
        ask = {**ASK, "logprobs": True, "top_logprobs": 3, "temperature": 0, "extra_body": THINKS}
        choice = openai_client.chat.completions.create(**ask).choices[0]
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        thinking = choice.logprobs.model_dump()["reasoning_content"]
        rows = [row.model_dump() for row in choice.logprobs.content]
        assert len(thinking) == 6
        assert 0 < len(rows) <= 13  # without the one that ends the thinking, and other control tokens
        data = bytes(byte for row in rows for byte in row["bytes"])
        assert data.decode("utf8", "replace") == choice.message.content
        assert all(len(row["top_logprobs"]) == 3 for row in rows)
        assert all(row["logprob"] <= row["top_logprobs"][0]["logprob"] <= 0 for row in rows)

    def test_bias_decides(self, openai_client: OpenAI, tokenizer: Tokenizer) -> None:
        (letter,) = tokenizer.encode("z")
        answer = openai_client.chat.completions.create(
            **{**ASK, "max_tokens": 4}, logit_bias={str(letter): 100}, extra_body=QUIET
        )
        assert answer.choices[0].message.content == "zzzz"

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"temperature": -1}, "temperature is -1"),
            ({"top_p": 0}, "top_p is 0"),
            ({"n": 0}, "n is 0"),
            ({"n": 9}, "n is 9"),
            ({"n": None, "max_tokens": 0}, "max_tokens"),
            ({"logit_bias": {"100000": 1}}, "100000 is no token"),
            ({"top_logprobs": 2}, "logprobs"),
            ({"stop": [""]}, "stop"),
            ({"reasoning_effort": "hard"}, "reasoning_effort 'hard' is unknown"),
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "usr", "content": "a"}]}, "did you mean 'user'?"),
            ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
            ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "no answer"),
            ({"messages": [{"role": "user", "content": "long " * 3000}]}, "context is 2,048"),
            ({"response_format": {"type": "jsn"}}, "json_schema"),
            ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}}, "enforced"),
            ({"tool_choice": "required"}, "there are no tools"),
            ({"tools": [CLOCK, CLOCK]}, "two tools are named 'get_time'"),
            ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "none of the tools"),
            ({"tools": [CLOCK], "tool_choice": {"type": "fn"}}, "tool_choice is not understood"),
            ({"tools": [{"type": "function", "function": {"name": 'a"b'}}]}, "a tool is named"),
        ],
    )
    def test_what_is_wrong_is_said(self, server: Any, change: Any, words: str) -> None:
        # By hand: a client would refuse to send half a surrogate pair.
        answer = server.raw("/v1/chat/completions", json.dumps({**ASK, **change}).encode())
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
        assert answer.json()["error"]["type"] == "invalid_request_error"

    def test_another_model_is_not_found(self, server: Any) -> None:
        answer = server.post("/v1/chat/completions", {**ASK, "model": "gpt"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")

    def test_unknown_fields_are_named(self, server: Any) -> None:
        strange = {"frobnicate": 1, "a\r\nset-cookie: b": 1, "é": 1, "user": "me"}
        answer = server.post("/v1/chat/completions", {**ASK, **QUIET, "max_tokens": 1, **strange})
        assert answer.headers["x-leadline-ignored"] == "a??set-cookie??b, frobnicate, ?"
        assert "set-cookie" not in answer.headers


class TestTools:
    @pytest.mark.parametrize(
        ("choice", "extra"),
        [("required", THINKS), ({"type": "function", "function": {"name": "get_weather"}}, QUIET)],
    )
    def test_a_call_is_enforced(self, openai_client: OpenAI, choice: Any, extra: Any) -> None:
        # The model is random: only the grammar can bring a call about.
        ask = {**ASK, "max_tokens": 250, "tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False}
        answer = openai_client.chat.completions.create(**ask, extra_body=extra).choices[0]
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content is None
        assert answer.message.tool_calls is not None
        (call,) = answer.message.tool_calls
        assert call.type == "function"
        assert call.function.name == "get_weather"
        assert arguments_fit(call)

    def test_a_call_streams(self, openai_client: OpenAI) -> None:
        ask = {**ASK, "max_tokens": 250, "tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
        whole = openai_client.chat.completions.create(**ask, extra_body=QUIET).choices[0].message.tool_calls
        (message,), _ = streamed(openai_client, **ask, extra_body=QUIET)
        assert whole is not None
        assert whole[0].type == "function"
        assert message["calls"] == [["get_weather", whole[0].function.arguments]]
        assert message["finish"] == "tool_calls"

    def test_only_allowed_tools_are_called(self, openai_client: OpenAI) -> None:
        allowed: Any = {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_time"}}]},
        }
        closed = {
            "type": "function",
            "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}},
        }
        ask = {
            **ASK,
            "max_tokens": 120,
            "tools": [WEATHER, closed],
            "tool_choice": allowed,
            "parallel_tool_calls": False,
        }
        calls = openai_client.chat.completions.create(**ask, extra_body=QUIET).choices[0].message.tool_calls
        assert calls is not None
        assert [(call.function.name, call.function.arguments) for call in calls if call.type == "function"] == [
            ("get_time", "{}")
        ]

    @pytest.mark.parametrize("extra", [{}, {"tools": [CLOCK], "tool_choice": "none"}])
    def test_without_tools_no_call_can_be_drawn(self, openai_client: OpenAI, tokenizer: Tokenizer, extra: Any) -> None:
        bias: Any = {str(tokenizer.token_id(DSML)): 100}
        answer = openai_client.chat.completions.create(**ASK, **extra, logit_bias=bias, extra_body=QUIET).choices[0]
        assert answer.message.tool_calls is None
        assert answer.message.content

    def test_strict_tools_are_checked_also_where_no_call_is_due(self, server: Any) -> None:
        function = {"name": "f", "strict": True, "parameters": {"type": 3}}
        body = {**ASK, **QUIET, "max_tokens": 4, "tools": [{"type": "function", "function": function}]}
        answer = server.post("/v1/chat/completions", body)
        assert (answer.status_code, "enforced" in answer.text) == (400, True)
        function["parameters"] = {"type": "object", "properties": {}}
        assert server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]

    @pytest.mark.parametrize("extra", [QUIET, THINKS])
    def test_a_schema_is_enforced(self, openai_client: OpenAI, extra: Any) -> None:
        schema = {
            "type": "object",
            "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}, "ok": {"type": "boolean"}},
            "required": ["n", "ok"],
        }
        form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        ask = {**ASK, "max_tokens": 250, "response_format": form}
        answer = openai_client.chat.completions.create(**ask, extra_body=extra).choices[0]
        found = json.loads(answer.message.content or "")
        assert set(found) == {"n", "ok"}
        assert isinstance(found["ok"], bool)
        assert found["n"] in range(10)
        assert answer.finish_reason == "stop"

    def test_any_object_is_enforced(self, openai_client: OpenAI) -> None:
        ask = {**ASK, "max_tokens": 8, "response_format": {"type": "json_object"}, "extra_body": QUIET}
        content = openai_client.chat.completions.create(**ask).choices[0].message.content
        assert content is not None
        assert content.startswith("{")


class TestModes:
    @pytest.mark.parametrize(
        ("extra", "mode"),
        [
            ({}, "high"),
            ({"reasoning_effort": "none"}, "non-think"),
            ({"reasoning_effort": "minimal"}, "high"),  # the preview has no low
            ({"reasoning_effort": "medium"}, "high"),
            ({"reasoning_effort": "ultra"}, "max"),
            ({"thinking": {"type": "disabled"}, "reasoning_effort": "max"}, "non-think"),
            ({"chat_template_kwargs": {"thinking": False}}, "non-think"),
            ({"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "max"}}, "max"),
        ],
    )
    def test_clients_ask_in_many_words(self, server: Any, extra: Any, mode: str) -> None:
        answer = server.post("/v1/chat/completions", {**ASK, **extra, "max_tokens": 1})
        assert answer.json()["usage"]["thinking_mode"] == mode

    def test_max_needs_a_long_context(self, guarded: Any, keys: tuple[str, ...]) -> None:
        body = {**ASK, "reasoning_effort": "max"}
        answer = guarded.post("/v1/chat/completions", body, authorization=f"Bearer {keys[0]}")
        assert answer.status_code == 400
        assert "393,216" in answer.json()["error"]["message"]
        assert "2,048" in answer.json()["error"]["message"]


def _call(name: str, arguments: str) -> Any:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}
