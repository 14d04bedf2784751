"""Responses: OpenAI's newer protocol, in which an answer is a list of items.

    POST /v1/responses

Nothing is stored: a conversation comes whole with each request, its reasoning and calls as the items that earlier
answers had.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from leadline.serve.ask import Ask, mode_of, open_replies, sampling_of, tool_choice_of
from leadline.serve.blocks import Block, Blocks, Change
from leadline.serve.chat_completions import Thinking, endings, new_id
from leadline.serve.fields import Body, Positive, Sampled, Text
from leadline.serve.http import EventStream, sse, unless_gone
from leadline.serve.limits import Refused
from leadline.serve.reply import Ending, Reply
from leadline.serve.service import Service

_TEXT_PARTS = ("input_text", "output_text", "text")


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class Reasoning(_Open):
    effort: str | None = None


class TextOptions(_Open):
    format: dict[str, Any] | None = None


class ResponsesRequest(Body):
    """What a client asks for."""

    model: str | None = None
    input: Text | list[dict[str, Any]]
    instructions: Text | None = None
    max_output_tokens: Positive | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    thinking: Thinking | None = None
    text: TextOptions | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    metadata: dict[str, Any] | None = Field(None)

    def ask(self, service: Service) -> Ask:
        """Raises Refused."""
        if self.previous_response_id is not None:
            raise Refused(400, "answers are not stored; send the whole conversation", param="previous_response_id")
        if self.background:
            raise Refused(400, "answers are not stored; leave background out and wait", param="background")
        choice, names_one = tool_choice_of(self.tool_choice)
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        thinking = self.thinking or Thinking(type="auto", budget_tokens=None)
        return Ask(
            [*system, *_messages(self.input)],
            mode_of(service, self.reasoning.effort if self.reasoning else None, thinking.enabled),
            sampling_of(service, Sampled(temperature=self.temperature, top_p=self.top_p), None),
            self.max_output_tokens,
            [_tool(tool) for tool in self.tools or []],
            choice,
            self.parallel_tool_calls is not False and not names_one,
            _response_format(self.text.format if self.text else None),
            thinking.budget_tokens,
        )


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/responses", response_model=None)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation."""
        service.require_model(body.model)
        ask = body.ask(service)
        (reply,) = await open_replies(service, ask, request.state.namespace)
        answer = _Answer(service, body, ask, reply)
        if body.stream:
            chunks = answer.stream()
            return EventStream(chunks, send_s=service.limits.send_s, on_end=reply.close, headers=body.ignored())
        return await unless_gone(request, answer.whole())

    return routes


# -- from their words to ours -------------------------------------------------------------------------------------


def _messages(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as messages. What the assistant thought, said and called stands in several items and is one message."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    for item in given:
        kind = item.get("type", "message")
        if kind == "function_call_output":
            output = item.get("output", "")
            content = output if isinstance(output, str) else _plain(output)
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
        elif kind == "message" and item.get("role") != "assistant":
            messages.append({"role": item.get("role"), "content": _plain(item.get("content"))})
        elif kind in ("message", "reasoning", "function_call"):
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            _add(messages[-1], kind, item)
        else:
            raise Refused(400, f"input: an item has type {kind!r}, which this server does not know", param="input")
    return messages


def _add(message: dict[str, Any], kind: str, item: dict[str, Any]) -> None:
    if kind == "message":
        message["content"] += _plain(item.get("content"))
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
        message.setdefault("tool_calls", []).append({"id": item.get("call_id"), "function": function})
    else:
        parts = item.get("content") or item.get("summary") or []
        text = "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
        message["reasoning_content"] = message.get("reasoning_content", "") + text


def _plain(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise Refused(400, "input: content is neither text nor a list of parts", param="input")
    strange = next((part.get("type") for part in content if part.get("type") not in _TEXT_PARTS), None)
    if strange is not None:
        raise Refused(400, f"input: a part has type {strange!r}; the model reads text only", param="input")
    return "\n\n".join(str(part.get("text", "")) for part in content)


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise Refused(400, f"tools: type {tool.get('type')!r} is not offered here; use functions", param="tools")
    function = {key: value for key, value in tool.items() if key != "type" and value is not None}
    return {"type": "function", "function": function}


def _response_format(form: dict[str, Any] | None) -> dict[str, Any] | None:
    if form is None or form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {key: value for key, value in form.items() if key != "type"}}


# -- from our words to theirs -------------------------------------------------------------------------------------


class _Answer:
    """A response, whole or as a stream."""

    def __init__(self, service: Service, body: ResponsesRequest, ask: Ask, reply: Reply):
        self._service, self._body, self._ask, self._reply = service, body, ask, reply
        self._blocks = Blocks()
        self._ids: dict[Block, dict[str, str]] = {}
        self._id, self._created, self._number = new_id("resp"), int(time.time()), 0

    async def whole(self) -> Response:
        async for step in self._reply.steps():
            self._blocks.feed(step.events)
        (ending,) = endings([self._reply])
        return JSONResponse(self._response(ending), headers=self._body.ignored())

    async def stream(self) -> AsyncGenerator[str, None]:
        yield self._event("response.created", response=self._response(None))
        yield self._event("response.in_progress", response=self._response(None))
        try:
            async with aclosing(self._reply.steps()) as steps:
                async for step in steps:
                    for change in self._blocks.feed(step.events):
                        for event in self._change(*change):
                            yield event
        except Refused as error:
            failed = {"code": "server_error", "message": str(error)}
            response = {**self._response(None), "status": "failed", "error": failed}
            yield self._event("response.failed", response=response)
            return
        for change in self._blocks.finish():
            for event in self._change(*change):
                yield event
        (ending,) = endings([self._reply])
        kind = "response.incomplete" if ending.reason == "length" else "response.completed"
        yield self._event(kind, response=self._response(ending))

    def _change(self, change: Change, block: Block, text: str) -> Iterator[str]:
        place = {"output_index": block.index, "item_id": self._id_of(block)["id"]}
        part = {**place, "content_index": 0}
        name = {"reasoning": "reasoning_text", "content": "output_text", "call": "function_call_arguments"}[block.kind]
        if change == "open":
            opened = self._item(block, "in_progress")
            yield self._event("response.output_item.added", output_index=block.index, item=opened)
            if block.kind != "call":
                yield self._event("response.content_part.added", **part, part=_part(block))
        elif change == "delta":
            extra = {"logprobs": []} if block.kind == "content" else {}
            where = place if block.kind == "call" else part
            yield self._event(f"response.{name}.delta", **where, delta=text, **extra)
        elif block.kind == "call":
            yield self._event(f"response.{name}.done", **place, name=block.name, arguments=block.text)
            yield self._event("response.output_item.done", output_index=block.index, item=self._item(block))
        else:
            extra = {"logprobs": []} if block.kind == "content" else {}
            yield self._event(f"response.{name}.done", **part, text=block.text, **extra)
            yield self._event("response.content_part.done", **part, part=_part(block))
            yield self._event("response.output_item.done", output_index=block.index, item=self._item(block))

    def _event(self, kind: str, **fields: Any) -> str:
        number, self._number = self._number, self._number + 1
        return sse({"type": kind, "sequence_number": number, **fields}, kind)

    def _id_of(self, block: Block) -> dict[str, str]:
        """Ids of a block's item; they stay the same while it grows."""
        if block not in self._ids:
            prefix = {"reasoning": "rs", "content": "msg", "call": "fc"}[block.kind]
            self._ids[block] = {"id": new_id(prefix), "call_id": new_id("call")}
        return self._ids[block]

    def _item(self, block: Block, status: str | None = None) -> dict[str, Any]:
        ids = self._id_of(block)
        status = status or ("completed" if block.complete else "incomplete")
        if block.kind == "call":
            return {"type": "function_call", **ids, "name": block.name, "arguments": block.text, "status": status}
        parts = [] if status == "in_progress" else [_part(block)]
        if block.kind == "reasoning":
            return {"type": "reasoning", "id": ids["id"], "summary": [], "content": parts, "status": status}
        return {"type": "message", "id": ids["id"], "role": "assistant", "content": parts, "status": status}

    def _response(self, ending: Ending | None) -> dict[str, Any]:
        body, cut = self._body, ending is not None and ending.reason == "length"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": "in_progress" if ending is None else "incomplete" if cut else "completed",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._service.policy.name,
            "output": [] if ending is None else [self._item(block) for block in self._blocks.all],
            "parallel_tool_calls": self._ask.parallel,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": self._ask.sampling.temperature,
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": self._ask.sampling.top_p,
            "truncation": "disabled",
            "usage": None if ending is None else _usage(ending),
        }


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}


def _usage(ending: Ending) -> dict[str, Any]:
    return {
        "input_tokens": ending.prompt_tokens,
        "input_tokens_details": {"cached_tokens": ending.cached_tokens},
        "output_tokens": ending.output_tokens,
        "output_tokens_details": {"reasoning_tokens": ending.reasoning_tokens},
        "total_tokens": ending.prompt_tokens + ending.output_tokens,
    }
