"""Messages: Anthropic's protocol of conversations.

    POST /v1/messages   POST /v1/messages/count_tokens

The model thinks when the request has `thinking` or `output_config.effort`. Thinking that comes back in a conversation
is taken in like any other; it needs no signature, so signatures are empty. A last message of the assistant is
continued.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from leadline.serve.ask import Ask, ToolChoice, encoded, mode_of, open_replies, sampling_of, stops_of
from leadline.serve.blocks import Block, Blocks, Change
from leadline.serve.chat_completions import Thinking, endings
from leadline.serve.fields import Body, Positive, Sampled
from leadline.serve.http import EventStream, error_body, sse, unless_gone
from leadline.serve.limits import Refused
from leadline.serve.reply import Ending, Reply, new_id
from leadline.serve.service import Service

_PATH = "/v1/messages"
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class Turn(_Open):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class ClientTool(_Open):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class Choice(_Open):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Format(_Open):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(_Open):
    effort: str | None = None
    format: Format | None = None


class CountRequest(Body):
    """A conversation whose tokens are counted."""

    model: str | None = None
    messages: list[Turn] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: list[ClientTool] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    def asked(self, service: Service) -> Ask:
        """The conversation alone. Raises Refused."""
        config = self.output_config or OutputConfig()
        form = config.format
        mode = "non-think"
        if config.effort is not None or (self.thinking is not None and self.thinking.type != "disabled"):
            mode = mode_of(service, config.effort, self.thinking.enabled if self.thinking else None)
        return Ask(
            list(_system(self.system)) + [message for turn in self.messages for message in _messages(turn)],
            mode,
            tools=[_tool(tool) for tool in self.tools or []],
            response_format=form and {"type": "json_schema", "json_schema": {"schema": form.schema_}},
        )


class MessagesRequest(CountRequest):
    """What a client asks for."""

    max_tokens: Positive
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def ask(self, service: Service) -> Ask:
        """Raises Refused."""
        asked, choice = self.asked(service), self.tool_choice or Choice(type="auto")
        messages = list(asked.messages)
        if messages[-1]["role"] == "assistant":
            messages[-1] = {**messages[-1], "prefix": True}
        sampled = Sampled(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)
        return Ask(
            messages,
            asked.mode,
            sampling_of(service, sampled, None),
            self.max_tokens,
            asked.tools,
            _tool_choice(choice),
            not choice.disable_parallel_tool_use and choice.type != "tool",
            asked.response_format,
            self.thinking.budget_tokens if self.thinking else None,
            stops_of(self.stop_sequences),
        )


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post(_PATH, response_model=None)
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation."""
        service.require_model(body.model)
        (reply,) = await open_replies(service, body.ask(service), request.state.namespace)
        if body.stream:
            chunks = _stream(service, reply)
            return EventStream(chunks, send_s=service.limits.send_s, on_end=reply.close, headers=body.ignored())
        return await unless_gone(request, _answer(service, reply, body.ignored()))

    @routes.post(f"{_PATH}/count_tokens")
    async def count_tokens(body: CountRequest) -> dict[str, int]:
        """Tokens of a conversation as it would be asked."""
        service.require_model(body.model)
        _, ids = await asyncio.to_thread(encoded, service, body.asked(service))
        return {"input_tokens": len(ids)}

    return routes


# -- from their words to ours -------------------------------------------------------------------------------------


def _system(system: str | list[dict[str, Any]] | None) -> Iterable[dict[str, Any]]:
    if system:
        yield {"role": "system", "content": system if isinstance(system, str) else [_text(part) for part in system]}


def _messages(turn: Turn) -> list[dict[str, Any]]:
    """A turn in OpenAI's shape: results of tools are messages of their own there."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    return _assistant(turn.content) if turn.role == "assistant" else _user(turn.role, turn.content)


def _user(role: str, blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for block in blocks:
        if block.get("type") == "tool_result":
            content = block.get("content") or ""
            parts = content if isinstance(content, str) else [_result_part(part) for part in content]
            messages.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": parts})
        else:
            messages.append({"role": role, "content": [_text(block)]})
    return messages


def _assistant(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for block in blocks:
        kind = block.get("type")
        if kind == "thinking":
            message["reasoning_content"] = message.get("reasoning_content", "") + str(block.get("thinking", ""))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            message.setdefault("tool_calls", []).append({"id": block.get("id"), "function": function})
        elif kind != "redacted_thinking":  # another model's, and sealed
            message["content"] += _text(block)["text"]
    return [message]


def _text(block: Any) -> dict[str, Any]:
    if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
        kind = block.get("type") if isinstance(block, dict) else type(block).__name__
        raise Refused(400, f"messages: a content block has type {kind!r}; the model reads text only", param="messages")
    return {"type": "text", "text": block["text"]}


def _result_part(part: Any) -> dict[str, Any]:
    return part if isinstance(part, dict) and part.get("type") != "text" else _text(part)


def _tool(tool: ClientTool) -> dict[str, Any]:
    if tool.type not in (None, "custom") or tool.input_schema is None:
        raise Refused(400, f"tools: {tool.name!r} has no input_schema; only the client's own tools can be used")
    description = {} if tool.description is None else {"description": tool.description}
    return {"type": "function", "function": {"name": tool.name, **description, "parameters": tool.input_schema}}


def _tool_choice(choice: Choice) -> ToolChoice:
    if choice.type == "tool":
        if choice.name is None:
            raise Refused(400, "tool_choice: type tool needs a name", param="tool_choice")
        return ToolChoice("required", (choice.name,))
    return ToolChoice("required" if choice.type == "any" else "none" if choice.type == "none" else "auto")


# -- from our words to theirs -------------------------------------------------------------------------------------


def _frame(service: Service) -> dict[str, Any]:
    return {
        "id": new_id("msg"),
        "type": "message",
        "role": "assistant",
        "model": service.policy.name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _stopped(ending: Ending) -> dict[str, Any]:
    reason = "stop_sequence" if ending.stop is not None else _REASONS[ending.reason]
    return {"stop_reason": reason, "stop_sequence": ending.stop}


def _usage(ending: Ending) -> dict[str, Any]:
    """Here, tokens from the cache are not among the input tokens."""
    return {
        "input_tokens": ending.prompt_tokens - ending.cached_tokens,
        "cache_read_input_tokens": ending.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": ending.output_tokens,
        "output_tokens_details": {"thinking_tokens": ending.reasoning_tokens},
    }


def _block(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    if block.kind == "content":
        return {"type": "text", "text": block.text}
    return {"type": "tool_use", "id": new_id("toolu"), "name": block.name, "input": block.arguments}


async def _answer(service: Service, reply: Reply, headers: dict[str, str]) -> Response:
    blocks = Blocks()
    async for step in reply.steps():
        blocks.feed(step.events)
    (ending,) = endings([reply])
    # A call that was cut has no input that could be run.
    content = [_block(block) for block in blocks.all if block.complete]
    body = {**_frame(service), "content": content, **_stopped(ending), "usage": _usage(ending)}
    return JSONResponse(body, headers=headers)


async def _stream(service: Service, reply: Reply) -> AsyncGenerator[str, None]:
    start = {"input_tokens": reply.prompt_tokens, "output_tokens": 0}
    yield _event("message_start", message={**_frame(service), "usage": start})
    blocks = Blocks()
    try:
        async with aclosing(reply.steps()) as steps:
            async for step in steps:
                for change in blocks.feed(step.events):
                    yield _change(*change)
    except Refused as error:
        yield sse(error_body(_PATH, error), "error")
        return
    for change in blocks.finish():
        yield _change(*change)
    (ending,) = endings([reply])
    yield _event("message_delta", delta=_stopped(ending), usage=_usage(ending))
    yield _event("message_stop")


def _change(change: Change, block: Block, text: str) -> str:
    if change == "close":
        return _event("content_block_stop", index=block.index)
    if change == "delta":
        kind, key = _DELTAS[block.kind]
        return _event("content_block_delta", index=block.index, delta={"type": kind, key: text})
    empty = Block(block.index, block.kind, block.name, ["{}"] if block.kind == "call" else [])
    return _event("content_block_start", index=block.index, content_block=_block(empty))


_DELTAS = {
    "reasoning": ("thinking_delta", "thinking"),
    "content": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}


def _event(kind: str, **fields: Any) -> str:
    return sse({"type": kind, **fields}, kind)
