"""Responses: OpenAI's newer protocol, in which an answer is a list of items.

    POST /v1/responses   GET /v1/responses/ID   DELETE /v1/responses/ID

A conversation comes whole with each request, its reasoning and calls as the items that earlier answers had. Where the
server keeps answers (`kept.py`), one can be given in the background and fetched later.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from leadline.serve.ask import Ask, mode_of, open_replies, sampling_of, tool_choice_of
from leadline.serve.background import Background
from leadline.serve.chat_completions import Thinking
from leadline.serve.fields import Body, Positive, Sampled, Text
from leadline.serve.http import EventStream, unless_gone
from leadline.serve.items import Answer
from leadline.serve.limits import Refused
from leadline.serve.reply import FETCH_PATH, new_id
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


def router(service: Service, background: Background) -> APIRouter:
    routes = APIRouter()

    @routes.post(FETCH_PATH, response_model=None)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation."""
        service.require_model(body.model)
        if body.background:
            background.require_kept(body.stream)
        ask = body.ask(service)
        frame = _frame(body, ask)
        (reply,) = await open_replies(service, ask, request.state.namespace, frame)
        if body.background:
            return JSONResponse(await background.begin(reply), headers=body.ignored())
        answer = Answer(reply, service.policy.name)
        if body.stream:
            chunks = answer.stream()
            return EventStream(chunks, send_s=service.limits.send_s, on_end=reply.close, headers=body.ignored())
        return await unless_gone(request, _whole(answer, body.ignored()))

    @routes.get(f"{FETCH_PATH}/{{id}}")
    async def fetch(id: str, request: Request) -> dict[str, Any]:
        """An answer that was given in the background, or that a server could not end before it was stopped."""
        return background.fetch(id, request.state.namespace)

    @routes.delete(f"{FETCH_PATH}/{{id}}")
    async def delete(id: str, request: Request) -> dict[str, Any]:
        """Forget such an answer; one that has not ended is given up."""
        background.delete(id, request.state.namespace)
        return {"id": id, "object": "response", "deleted": True}

    return routes


async def _whole(answer: Answer, headers: dict[str, str]) -> Response:
    return JSONResponse(await answer.whole(), headers=headers)


def _frame(body: ResponsesRequest, ask: Ask) -> dict[str, Any]:
    """What is known of a response when it is asked for."""
    return {
        "id": new_id("resp"),
        "created_at": int(time.time()),
        "background": bool(body.background),
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": ask.parallel,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "store": bool(body.background),
        "temperature": ask.sampling.temperature,
        "text": {"format": (body.text and body.text.format) or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_p": ask.sampling.top_p,
    }


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
