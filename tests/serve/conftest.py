"""A tiny random model behind a real server on a loopback port, and a tokenizer trained for it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import pytest
import torch
import uvicorn
from anthropic import Anthropic
from openai import OpenAI

from leadline.engine.engine import Engine, Settings
from leadline.engine.request import Request
from leadline.model.config import TINY
from leadline.model.transformer import Transformer
from leadline.serve.app import create_app
from leadline.serve.limits import Keys, Limits
from leadline.serve.service import Policy, Service
from leadline.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from leadline.text.tools import Call, calls_block, tools_block

KEYS = ("sk-aaaaaaaaaaaaaaaaaaaa", "sk-bbbbbbbbbbbbbbbbbbbb")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """It knows the words of the markup, so that prompts with tools are short."""
    markup = "".join(calls_block([Call("get_weather", {"city": "", "days": 1, "unit": "C"})]))
    texts = ["the quick brown fox", *tools_block([]), '{"type": "object", "properties": {"string"', markup]
    return Tokenizer.train(texts * 20, 256 + len(SPECIAL_TOKENS) + 300)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> Transformer:
    """In float64, where no two logits are too close to call; with some rows that no token has."""
    generator = torch.Generator().manual_seed(7)
    config = TINY.replace(vocab_size=tokenizer.vocab_size + 5)
    model = Transformer(config).double()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                tensor.random_(0, config.n_routed_experts, generator=generator)
            elif "norm" in name:
                tensor.uniform_(0.8, 1.2, generator=generator)
            else:
                tensor.normal_(0, 0.3, generator=generator)
    return model


def engine(model: Transformer, slots: int = 4, pages: int = 80, max_tokens: int = 2048) -> Engine:
    return Engine(model, Settings(slots=slots, pages=pages, max_tokens=max_tokens, step_tokens=256))


@pytest.fixture(scope="session")
def make_engine() -> Callable[..., Engine]:
    """`engine`, by a fixture because test files do not import each other."""
    return engine


@dataclass(frozen=True)
class Running:
    """A server on a loopback port."""

    service: Service
    url: str

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=headers, timeout=30)

    def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=headers, timeout=60)

    def raw(self, path: str, body: bytes, **headers: str) -> httpx.Response:
        headers = {"content-type": "application/json", **headers}
        return httpx.post(self.url + path, content=body, headers=headers, timeout=60)

    def settle(self) -> None:
        """Wait until nothing runs any more."""
        memory, engine = self.service.worker.engine.memory, self.service.worker.engine
        for _ in range(500):
            if not engine.busy and memory.num_free_slots == engine.settings.slots:
                return
            time.sleep(0.01)
        raise AssertionError("the engine does not come to rest")


@contextlib.contextmanager
def serve(service: Service) -> Iterator[Running]:
    """Run a service on uvicorn, in a thread with a loop of its own."""
    app = create_app(service, hosts=["127.0.0.1", "localhost"])
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=2, ws="none", lifespan="on")
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(service, f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def keys() -> tuple[str, ...]:
    """Keys of `guarded`."""
    return KEYS


@pytest.fixture(scope="session")
def openai_client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def anthropic_client(server: Running) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def alone(model: Transformer) -> Callable[[Request], list[int]]:
    """alone(request): its tokens when an engine serves nothing else, with a cold cache."""

    def solo(request: Request) -> list[int]:
        lonely = engine(model, slots=1, pages=20)
        lonely.submit(request)
        ids: list[int] = []
        while lonely.busy:
            ids += [token.id for event in lonely.step() for token in event.tokens]
        return ids

    return solo


@pytest.fixture(scope="session")
def serving() -> Callable[[Service], contextlib.AbstractContextManager[Running]]:
    """serving(service): a server of its own."""
    return serve


@pytest.fixture(scope="session")
def server(model: Transformer, tokenizer: Tokenizer) -> Iterator[Running]:
    """Everybody may ask; the mode max is allowed."""
    policy = Policy("tiny", allow_short_max=True, limits=Limits(body_bytes=200_000))
    with serve(Service(engine(model), tokenizer, policy, Keys([]))) as running:
        yield running


@pytest.fixture(scope="session")
def guarded(model: Transformer, tokenizer: Tokenizer) -> Iterator[Running]:
    """One slot, a queue of two, two keys, no short max."""
    policy = Policy("tiny", limits=Limits(queue=2))
    with serve(Service(engine(model, slots=1, pages=20), tokenizer, policy, Keys(list(KEYS)))) as running:
        yield running


@pytest.fixture
def short(model: Transformer, tokenizer: Tokenizer) -> Iterator[Running]:
    """A context of 64 tokens, so that no answer takes long."""
    service = Service(engine(model, max_tokens=64), tokenizer, Policy("tiny", aliases=("*",)), Keys([]))
    with serve(service) as running:
        yield running
