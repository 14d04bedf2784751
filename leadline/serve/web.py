"""Web: the page at `/`, the files it is made of, and the figures for its meters.

The page lies in `page/` as plain HTML, CSS and modules: no build step, nothing from elsewhere. It shows what a model
says, and a model says whatever it was tricked into; so the page builds its document node by node, and the policy below
makes the browser refuse everything else: scripts and styles of another origin or written into the page, strings that
become markup (`require-trusted-types-for`), pictures that would report to another server, frames around the page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import Response

from leadline.model import accounting, v32
from leadline.model.page_table import num_pages
from leadline.serve.service import Service

_FOLDER = Path(__file__).parent / "page"
_KINDS = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
FILES = {
    "/" if path.name == "index.html" else f"/page/{path.name}": path
    for path in sorted(_FOLDER.iterdir())
    if path.suffix in _KINDS
}
"""Path of each file of the page. None of them needs a key: the page is where one is typed in."""

_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def router(service: Service) -> APIRouter:
    routes = APIRouter()
    for path, file in FILES.items():
        routes.add_api_route(path, _sender(file), include_in_schema=False)

    @routes.get("/meter")
    async def meter(tokens: Annotated[int, Query(ge=0, le=2**31)]) -> dict[str, Any]:
        """Bytes of cache for a sequence of so many tokens.

        `cache_bytes` and `v32_cache_bytes` count this model and DeepSeek-V3.2 by one rule, in the formats that they
        are published with; `held_bytes` is what this server sets aside for such a sequence, in the formats it runs.
        """
        engine = service.worker.engine
        state = engine.memory.state
        return {
            "tokens": tokens,
            "cache_bytes": accounting.kv_cache_bytes(engine.runner.model.config, tokens),
            "v32_cache_bytes": v32.kv_cache_bytes(tokens),
            "held_bytes": state.bytes_per_slot + num_pages(tokens) * state.bytes_per_page,
        }

    return routes


def _sender(file: Path) -> Any:
    """A route that sends one file, read when the server starts: no path of a request ever reaches the disk."""
    content, kind = file.read_bytes(), _KINDS[file.suffix]

    async def send() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return send
