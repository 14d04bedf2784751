"""Chat completions: OpenAI's protocol of conversations, with DeepSeek's fields for thinking.

    POST /v1/chat/completions

The thinking comes as `reasoning_content`, and once more as `reasoning`, the name that newer clients read; both are
accepted back. It is asked for with `thinking: {"type": "enabled", "budget_tokens": 1000}`, `reasoning_effort`, or
`chat_template_kwargs`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from leadline.engine.sequence import Token
from leadline.serve.ask import Ask, mode_of, open_replies, sampling_of, stops_of, tool_choice_of
from leadline.serve.fields import Positive, Sampled, Tool
from leadline.serve.http import EventStream, error_body, sse, unless_gone
from leadline.serve.limits import Refused
from leadline.serve.reply import Ending, Reply, Said, Step, close_all, merged, new_id
from leadline.serve.service import Service
from leadline.text.events import ArgumentsDelta, CallBegin, ContentDelta, Event, ReasoningDelta
from leadline.text.tokenizer import Tokenizer, TokenizerError

_PATH = "/v1/chat/completions"


class Thinking(BaseModel):
    """Whether the model thinks, and how many tokens it may think."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools", "auto"] = "enabled"
    budget_tokens: int | None = Field(None, ge=0, le=2**31)

    @property
    def enabled(self) -> bool | None:
        return {"enabled": True, "disabled": False}.get(self.type)


class TemplateWords(BaseModel):
    """Words that other servers pass to a chat template."""

    model_config = ConfigDict(extra="allow")

    thinking: bool | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None


class StreamOptions(BaseModel):
    """include_usage: the tokens, in a chunk at the end. continuous_usage_stats: those so far, in each one."""

    model_config = ConfigDict(extra="allow")

    include_usage: bool = False
    continuous_usage_stats: bool = False


class ChatRequest(Sampled):
    """What a client asks for."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    thinking: Thinking | None = None
    thinking_budget: int | None = Field(None, ge=0, le=2**31)
    chat_template_kwargs: TemplateWords | None = None

    def ask(self, service: Service) -> Ask:
        """Raises Refused."""
        words = self.chat_template_kwargs or TemplateWords()
        thinking = self.thinking or Thinking(type="auto", budget_tokens=None)
        enabled = next(
            (each for each in (thinking.enabled, words.thinking, words.enable_thinking) if each is not None), None
        )
        choice, names_one = tool_choice_of(self.tool_choice)
        wants_logprobs = bool(self.logprobs)
        if self.top_logprobs is not None and not wants_logprobs:
            raise Refused(400, "top_logprobs without logprobs; set logprobs to true", param="top_logprobs")
        return Ask(
            self.messages,
            mode_of(service, self.reasoning_effort or words.reasoning_effort, enabled),
            sampling_of(service, self, (self.top_logprobs or 0) if wants_logprobs else None),
            self.max_completion_tokens or self.max_tokens,
            [tool.plain() for tool in self.tools or []],
            choice,
            self.parallel_tool_calls is not False and not names_one,
            self.response_format,
            thinking.budget_tokens if thinking.budget_tokens is not None else self.thinking_budget,
            stops_of(self.stop),
            1 if self.n is None else self.n,
        )


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post(_PATH, response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        service.require_model(body.model)
        replies = await open_replies(service, body.ask(service), request.state.namespace)
        if body.stream:
            chunks = _Chunks(service, replies, body.stream_options or StreamOptions()).stream()
            return EventStream(
                chunks, send_s=service.limits.send_s, on_end=lambda: close_all(replies), headers=body.ignored()
            )
        return await unless_gone(request, _answer(service, replies, body.ignored()))

    return routes


async def _answer(service: Service, replies: Sequence[Reply], headers: dict[str, str]) -> Response:
    steps: list[list[Step]] = [[] for _ in replies]
    async for number, step in merged(replies):
        if step is not None:
            steps[number].append(step)
    choices = [_choice(service.tokenizer, *each) for each in zip(range(len(replies)), replies, steps, strict=True)]
    body = {
        "id": new_id("chatcmpl"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": service.policy.name,
        "choices": choices,
        "usage": usage_of(endings(replies)),
    }
    return JSONResponse(body, headers=headers)


def _choice(tokenizer: Tokenizer, number: int, reply: Reply, steps: Sequence[Step]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": None}
    for step in steps:
        for event in step.events:
            _add(message, _delta(event))
    (ending,) = endings([reply])
    calls = message.get("tool_calls")
    if not calls and message["content"] is None:
        message["content"] = ""
    return {
        "index": number,
        "message": message,
        "logprobs": _logprobs(tokenizer, [said for step in steps for said in step.said]),
        "finish_reason": ending.reason,
    }


def _add(message: dict[str, Any], delta: dict[str, Any]) -> None:
    """Put a delta into the message, as a client would."""
    for key, value in delta.items():
        if key != "tool_calls":
            message[key] = (message.get(key) or "") + value
            continue
        for call in value:
            calls = message.setdefault("tool_calls", [])
            if "id" in call:
                calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]


class _Chunks:
    """The stream of a chat completion."""

    def __init__(self, service: Service, replies: Sequence[Reply], options: StreamOptions):
        self._service, self._replies, self._options = service, replies, options
        self._frame = {
            "id": new_id("chatcmpl"),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": service.policy.name,
        }

    async def stream(self) -> AsyncGenerator[str, None]:
        for number in range(len(self._replies)):
            yield self._chunk(number, {"role": "assistant", "content": ""})
        try:
            async with aclosing(merged(self._replies)) as steps:
                async for number, step in steps:
                    for chunk in self._end(number) if step is None else self._step(number, step):
                        yield chunk
        except Refused as error:
            yield sse(error_body(_PATH, error))
            return
        if self._options.include_usage:
            yield sse({**self._frame, "choices": [], "usage": usage_of(endings(self._replies))})
        yield sse("[DONE]")

    def _step(self, number: int, step: Step) -> Iterable[str]:
        logprobs = _logprobs(self._service.tokenizer, step.said)
        deltas: list[dict[str, Any]] = [delta for event in step.events if (delta := _delta(event))]
        if logprobs and not deltas:
            deltas = [{}]
        for place, delta in enumerate(deltas):
            yield self._chunk(number, delta, logprobs if place == 0 else None)

    def _end(self, number: int) -> Iterable[str]:
        (ending,) = endings([self._replies[number]])
        yield self._chunk(number, {}, finish=ending.reason)

    def _chunk(
        self, number: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> str:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": usage_so_far(self._replies)} if self._options.continuous_usage_stats else {}
        return sse({**self._frame, "choices": [choice], **usage})


def _delta(event: Event) -> dict[str, Any]:
    if isinstance(event, ReasoningDelta):
        return {"reasoning_content": event.text, "reasoning": event.text}
    if isinstance(event, ContentDelta):
        return {"content": event.text}
    if isinstance(event, CallBegin):
        function = {"name": event.name, "arguments": ""}
        return {"tool_calls": [{"index": event.index, "id": new_id("call"), "type": "function", "function": function}]}
    if isinstance(event, ArgumentsDelta):
        return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
    return {}


# -- shared with the other protocols ------------------------------------------------------------------------------


def endings(replies: Iterable[Reply]) -> list[Ending]:
    """How answers ended that have all ended."""
    found = [reply.ending for reply in replies]
    assert all(ending is not None for ending in found)
    return [ending for ending in found if ending is not None]


def usage_of(found: Sequence[Ending]) -> dict[str, Any]:
    """Tokens of a request in OpenAI's form, with DeepSeek's fields; of several answers the prompt counts once."""
    first = found[0]
    output = sum(ending.output_tokens for ending in found)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": output,
        "total_tokens": first.prompt_tokens + output,
        "prompt_tokens_details": {"cached_tokens": first.cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": sum(ending.reasoning_tokens for ending in found),
            "thinking_budget_tokens": first.budget,
        },
        "prompt_cache_hit_tokens": first.cached_tokens,
        "prompt_cache_miss_tokens": first.prompt_tokens - first.cached_tokens,
        "thinking_mode": first.mode,
    }


def usage_so_far(replies: Sequence[Reply]) -> dict[str, Any]:
    """Tokens of a request whose answers have not ended."""
    prompt, output = replies[0].prompt_tokens, sum(reply.output_tokens for reply in replies)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "completion_tokens_details": {"reasoning_tokens": sum(reply.reasoning_tokens for reply in replies)},
    }


def _logprobs(tokenizer: Tokenizer, said: Sequence[Said]) -> dict[str, Any] | None:
    """Log-probabilities of tokens that have some, content and thinking apart."""
    rows: dict[str, list[dict[str, Any]]] = {"content": [], "reasoning": []}
    for each in said:
        if each.token.logprob is not None:
            rows[each.section].append(_row(tokenizer, each.token))
    if not any(rows.values()):
        return None
    return {"content": rows["content"], "reasoning_content": rows["reasoning"]}


def _row(tokenizer: Tokenizer, token: Token) -> dict[str, Any]:
    top = [spelled(tokenizer, id, logprob) for id, logprob in token.top or ()]
    return {**spelled(tokenizer, token.id, token.logprob), "top_logprobs": top}


def spelled(tokenizer: Tokenizer, id: int, logprob: float | None) -> dict[str, Any]:
    try:
        data = tokenizer.token_bytes(id) or (tokenizer.control_token(id) or "").encode()
    except TokenizerError:  # an alternative that the model has a row for, and the tokenizer no token
        data = b""
    return {"token": data.decode("utf8", "replace"), "logprob": logprob, "bytes": list(data)}
