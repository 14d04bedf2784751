"""Items: an answer as OpenAI's response object, whole or as the events by which it grows.

The object begins as a *frame*, everything that is known before the answer is; items, usage and status come with it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any, Literal

from leadline.serve.blocks import Block, Blocks, Change
from leadline.serve.chat_completions import endings
from leadline.serve.http import sse
from leadline.serve.limits import Refused
from leadline.serve.reply import Ending, Reply, new_id

Status = Literal["in_progress", "completed", "incomplete", "failed"]

# A response of which nothing is known but its id.
_NEUTRAL: Mapping[str, Any] = {
    "object": "response",
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "store": False,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
}


def response_of(frame: Mapping[str, Any], model: str, status: Status, error: str | None = None) -> dict[str, Any]:
    """The object without an answer. error: why there will be none."""
    return {
        "id": frame["id"],
        **_NEUTRAL,
        "model": model,
        **frame,
        "status": status,
        "error": None if error is None else {"code": "server_error", "message": error},
        "incomplete_details": None,
        "output": [],
        "usage": None,
    }


class Answer:
    """A reply as a response object. model: name of the model."""

    def __init__(self, reply: Reply, model: str):
        self._reply, self._model = reply, model
        self._blocks = Blocks()
        self._ids: dict[Block, dict[str, str]] = {}
        self._number = 0

    async def whole(self) -> dict[str, Any]:
        """Raises Refused when the answer is given up."""
        async for step in self._reply.steps():
            self._blocks.feed(step.events)
        (ending,) = endings([self._reply])
        return self._ended(ending)

    async def stream(self) -> AsyncGenerator[str, None]:
        """Server-sent events."""
        yield self._event("response.created", response=self._begun())
        yield self._event("response.in_progress", response=self._begun())
        try:
            async with aclosing(self._reply.steps()) as steps:
                async for step in steps:
                    for change in self._blocks.feed(step.events):
                        for event in self._change(*change):
                            yield event
        except Refused as error:
            response = response_of(self._reply.frame, self._model, "failed", str(error))
            yield self._event("response.failed", response=response)
            return
        for change in self._blocks.finish():
            for event in self._change(*change):
                yield event
        (ending,) = endings([self._reply])
        kind = "response.incomplete" if ending.reason == "length" else "response.completed"
        yield self._event(kind, response=self._ended(ending))

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

    def _begun(self) -> dict[str, Any]:
        return response_of(self._reply.frame, self._model, "in_progress")

    def _ended(self, ending: Ending) -> dict[str, Any]:
        cut = ending.reason == "length"
        return {
            **response_of(self._reply.frame, self._model, "incomplete" if cut else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._item(block) for block in self._blocks.all],
            "usage": _usage(ending),
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
