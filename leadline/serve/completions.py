"""Completions: OpenAI's protocol of plain text that the model continues.

    POST /v1/completions

A prompt that is text begins with the token that opens a document, and nothing in it acts as a control token; a prompt
of token ids is taken as it is. With `suffix` the model writes what belongs between the two texts.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from leadline.serve.ask import open_completion, require_ids, sampling_of, stops_of
from leadline.serve.chat_completions import StreamOptions, endings, spelled, usage_of, usage_so_far
from leadline.serve.fields import Positive, Sampled, Text
from leadline.serve.http import EventStream, error_body, sse, unless_gone
from leadline.serve.limits import Refused
from leadline.serve.reply import Reply, Said, Step, close_all, merged, new_id
from leadline.serve.service import Service
from leadline.text.events import ContentDelta
from leadline.text.tokenizer import BOS_TOKEN, Control, TokenizerError

_PATH = "/v1/completions"
_FIM = tuple(Control(f"<｜fim▁{part}｜>") for part in ("begin", "hole", "end"))


class CompletionRequest(Sampled):
    """What a client asks for."""

    prompt: Text | list[Text] | list[int] | list[list[int]]
    suffix: Text | None = None
    max_tokens: Positive | None = 16
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    stream_options: StreamOptions | None = None

    def prompts(self, service: Service) -> list[list[int]]:
        """Raises Refused."""
        several = isinstance(self.prompt, list) and not (self.prompt and isinstance(self.prompt[0], int))
        prompts: list[Any] = list(self.prompt) if several else [self.prompt]
        if not prompts:
            raise Refused(400, "the list of prompts is empty", param="prompt")
        return [self._ids(service, prompt) for prompt in prompts]

    def _ids(self, service: Service, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            if self.suffix:
                raise Refused(400, "suffix goes with a prompt that is text", param="suffix")
            require_ids(service, prompt)
            return prompt
        bos, (begin, hole, end) = Control(BOS_TOKEN), _FIM
        pieces = [bos, begin, prompt, hole, self.suffix, end] if self.suffix else [bos, prompt]
        try:
            return service.tokenizer.encode_pieces(pieces)
        except TokenizerError as error:
            raise Refused(400, str(error), param="prompt") from None


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post(_PATH, response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        service.require_model(body.model)
        if body.echo and not isinstance(body.prompt, str):
            raise Refused(400, "echo goes with one prompt that is text", param="echo")
        replies = _open(service, body, request.state.namespace)
        if body.stream:
            chunks = _stream(service, replies, body)
            return EventStream(
                chunks, send_s=service.limits.send_s, on_end=lambda: close_all(replies), headers=body.ignored()
            )
        return await unless_gone(request, _answer(service, replies, body))

    return routes


def _open(service: Service, body: CompletionRequest, namespace: str) -> list[Reply]:
    choices = 1 if body.n is None else body.n
    prompts = body.prompts(service)
    if not 1 <= choices * len(prompts) <= service.limits.choices:
        raise Refused(400, f"{choices * len(prompts)} answers: expected 1 to {service.limits.choices}", param="n")
    service.require_room(choices * len(prompts))
    stops = stops_of(body.stop)
    sampling = sampling_of(service, body, body.logprobs)
    samplings = [replace(sampling, seed=sampling.seed + choice) for choice in range(choices)]
    for ids in prompts:
        require_ids(service, ids)
    return [
        open_completion(service, ids, sampling, body.max_tokens, stops, namespace)
        for ids in prompts
        for sampling in samplings
    ]


async def _answer(service: Service, replies: Sequence[Reply], body: CompletionRequest) -> Response:
    steps: list[list[Step]] = [[] for _ in replies]
    async for number, step in merged(replies):
        if step is not None:
            steps[number].append(step)
    choices = [
        {
            "index": number,
            "text": (str(body.prompt) if body.echo else "") + "".join(map(_text, steps[number])),
            "logprobs": _logprobs(service, [said for step in steps[number] for said in step.said]),
            "finish_reason": ending.reason,
        }
        for number, ending in enumerate(endings(replies))
    ]
    return JSONResponse(
        {**_frame(service), "choices": choices, "usage": usage_of(endings(replies))}, headers=body.ignored()
    )


async def _stream(service: Service, replies: Sequence[Reply], body: CompletionRequest) -> AsyncGenerator[str, None]:
    frame, options = _frame(service), body.stream_options or StreamOptions()

    def chunk(number: int, text: str, logprobs: dict[str, Any] | None = None, finish: str | None = None) -> str:
        choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": usage_so_far(replies)} if options.continuous_usage_stats else {}
        return sse({**frame, "choices": [choice], **usage})

    if body.echo:
        for number in range(len(replies)):
            yield chunk(number, str(body.prompt))
    try:
        async with aclosing(merged(replies)) as steps:
            async for number, step in steps:
                if step is None:
                    yield chunk(number, "", finish=endings([replies[number]])[0].reason)
                else:
                    yield chunk(number, _text(step), _logprobs(service, step.said))
    except Refused as error:
        yield sse(error_body(_PATH, error))
        return
    if options.include_usage:
        yield sse({**frame, "choices": [], "usage": usage_of(endings(replies))})
    yield sse("[DONE]")


def _frame(service: Service) -> dict[str, Any]:
    return {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.policy.name,
    }


def _text(step: Step) -> str:
    return "".join(event.text for event in step.events if isinstance(event, ContentDelta))


def _logprobs(service: Service, said: Sequence[Said]) -> dict[str, Any] | None:
    tokens = [each.token for each in said if each.token.logprob is not None]
    if not tokens:
        return None
    rows = [spelled(service.tokenizer, token.id, token.logprob) for token in tokens]
    tops = [[spelled(service.tokenizer, *pair) for pair in token.top or ()] for token in tokens]
    return {
        "tokens": [row["token"] for row in rows],
        "token_logprobs": [row["logprob"] for row in rows],
        "top_logprobs": [{row["token"]: row["logprob"] for row in top} for top in tops],
    }
