"""App: the routes, the gate before them, and a life that begins and ends with the engine's thread.

    app = create_app(Service(engine, tokenizer, Policy("my-model"), Keys([])))

The app takes any ASGI server; `leadline serve` runs it on uvicorn.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from leadline import __version__
from leadline.serve import chat_completions, completions, messages, plain, responses, web
from leadline.serve.background import Background
from leadline.serve.http import OPEN_PATHS, Gate, error_response
from leadline.serve.limits import Refused
from leadline.serve.service import Service

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "Refused; the body says why, in the words of the protocol."},
    "5XX": {"description": "The engine gave the answer up, or has stopped."},
}


def create_app(service: Service, *, origins: Sequence[str] = (), hosts: Sequence[str] = ()) -> FastAPI:
    """The server of one service.

    origins: web pages from elsewhere that may call it (CORS). hosts: names that requests may call the server by; empty:
    any. With names, a web page cannot reach a server on this machine by a domain that it points here.
    """

    background = Background(service)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        background.go_on()
        yield
        await service.suspend()
        await background.stop()
        await service.worker.stop()
        if service.kept is not None:
            service.kept.close()

    app = FastAPI(title="leadline", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    routers = [module.router(service) for module in (chat_completions, completions, messages, plain, web)]
    for router in (*routers, responses.router(service, background)):
        app.include_router(router, responses=_ERRORS)
    _speak_in_errors(app, service)
    open_paths = {*OPEN_PATHS, *web.FILES}
    app.add_middleware(
        Gate, keys=service.keys, limits=service.limits, refused=service.metrics.refused, open_paths=open_paths
    )
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"]
        )
    if hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    return app


def _speak_in_errors(app: FastAPI, service: Service) -> None:
    """Errors in the words of the protocol that was spoken, and counted."""

    def refuse(request: Request, error: Refused) -> JSONResponse:
        service.metrics.refused(error.status)
        return error_response(request.url.path, error)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return refuse(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return refuse(request, Refused(400, f"{where or 'the body'}: {first['msg']}", param=where or None))

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> JSONResponse:
        return refuse(request, Refused(error.status_code, str(error.detail)))
