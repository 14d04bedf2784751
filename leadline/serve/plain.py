"""Plain routes: what is served, how text becomes tokens, and how the server is.

GET /v1/models   POST /tokenize   POST /detokenize   GET /health   GET /metrics
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import Field

from leadline.serve.ask import Ask, encoded, mode_of, require_ids
from leadline.serve.fields import Body, Text, Tool
from leadline.serve.limits import Refused
from leadline.serve.service import MAX_NEEDS_TOKENS, Service
from leadline.text.chat import EFFORT
from leadline.text.tokenizer import TokenizerError


class TokenizeRequest(Body):
    """A text, or a conversation as it would be asked."""

    model: str | None = None
    prompt: Text | None = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1)
    tools: list[Tool] | None = None
    reasoning_effort: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """Token ids."""

    model: str | None = None
    tokens: list[int]


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served, with the modes that it can be asked for."""
        return {"object": "list", "data": [_card(service)]}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        service.require_model(name)
        return _card(service)

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Ids of a text, with the token that opens a document before it unless `add_special_tokens` is false, or of a
        conversation."""
        service.require_model(body.model)
        ids = await asyncio.to_thread(_tokenized, service, body)
        found: dict[str, Any] = {"count": len(ids), "max_model_len": service.context_tokens, "tokens": ids}
        if body.return_token_strs:
            found["token_strs"] = [service.tokenizer.decode([id]) for id in ids]
        return found

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """The text of ids; control tokens are spelled out."""
        service.require_model(body.model)
        require_ids(service, body.tokens)
        try:
            return {"prompt": await asyncio.to_thread(service.tokenizer.decode, body.tokens)}
        except TokenizerError as error:
            raise Refused(400, str(error), param="tokens") from None

    @routes.get("/health")
    async def health() -> Response:
        """200 while the engine runs, 503 once it has stopped."""
        if service.worker.failure is not None:
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok"})

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Figures in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes


def _card(service: Service) -> dict[str, Any]:
    policy = service.policy
    short = service.context_tokens < MAX_NEEDS_TOKENS and not policy.allow_short_max
    return {
        "id": policy.name,
        "object": "model",
        "created": 0,
        "owned_by": "leadline",
        "max_model_len": service.context_tokens,
        "modes": [mode for mode in EFFORT[policy.release] if not (mode == "max" and short)],
        "default_mode": policy.mode,
    }


def _tokenized(service: Service, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise Refused(400, "give either a prompt or messages", param="prompt")
    if body.messages is not None:
        tools = [tool.plain() for tool in body.tools or []]
        return encoded(service, Ask(body.messages, mode_of(service, body.reasoning_effort, None), tools=tools))[1]
    try:
        ids = service.tokenizer.encode(body.prompt or "")
    except TokenizerError as error:
        raise Refused(400, str(error), param="prompt") from None
    return [service.tokenizer.bos_id, *ids] if body.add_special_tokens else ids
