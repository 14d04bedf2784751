from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from starlette.types import Message

from leadline.serve.http import EventStream, sse

ASK: Any = {"messages": [{"role": "user", "content": "hello"}], "thinking": {"type": "disabled"}, "seed": 1}
PATH = "/v1/chat/completions"


class TestGate:
    @pytest.mark.parametrize("path", [PATH, "/v1/messages", "/v1/models", "/metrics", "/tokenize", "/openapi.json"])
    def test_without_a_key_nothing_is_answered(self, guarded: Any, path: str) -> None:
        answer = guarded.get(path)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        kind = answer.json()["error"]["type"]
        assert kind == "authentication_error"

    def test_health_needs_no_key(self, guarded: Any) -> None:
        assert guarded.get("/health").json() == {"status": "ok"}

    def test_keys_do_not_share_a_prefix_cache(self, guarded: Any, keys: tuple[str, ...]) -> None:
        body = {**ASK, "max_tokens": 1, "messages": [{"role": "user", "content": "w" * 300}]}

        def cached(key: str) -> int:
            answer = guarded.post(PATH, body, **{"x-api-key": key}).json()
            return answer["usage"]["prompt_cache_hit_tokens"]

        assert [cached(keys[0]), cached(keys[0]), cached(keys[1])] == [0, 256, 0]

    @pytest.mark.parametrize("path", [PATH, "/v1/messages"])
    def test_a_large_body_is_refused(self, server: Any, path: str) -> None:
        answer = server.raw(path, b" " * 200_001)
        assert answer.status_code == 413
        assert "200,000 bytes" in answer.json()["error"]["message"]

    def test_a_large_body_of_unknown_length_is_refused(self, server: Any) -> None:
        def pieces() -> Any:
            for _ in range(300):
                yield b" " * 1000

        answer = httpx.post(server.url + PATH, content=pieces(), headers={"content-type": "application/json"})
        assert answer.status_code == 413

    @pytest.mark.parametrize(
        "body",
        [b"", b"{", b"[]", b"null", b"\xff", b'{"messages": 3}', b"[" * 100_000, b'{"a":' * 20_000, b'"\\ud800"'],
    )
    @pytest.mark.parametrize("path", [PATH, "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize"])
    def test_a_malformed_body_is_refused(self, server: Any, path: str, body: bytes) -> None:
        answer = server.raw(path, body)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]

    @pytest.mark.parametrize("depth", [200, 480, 700, 900, 960, 980, 990])
    def test_deep_values_are_refused_or_served(self, server: Any, depth: int) -> None:
        deep = '{"a":' * depth + "1" + "}" * depth
        messages = '"messages": [{"role": "user", "content": "a"}]'
        for fields in (
            f'"messages": [{{"role": "user", "content": {deep}}}]',
            f'{messages}, "response_format": {deep}',
            f'{messages}, "tools": [{{"function": {{"name": "f", "x": {deep}}}}}]',
            f'{messages}, "tool_choice": {deep}',
            f'{messages}, "frobnicate": {deep}',
        ):
            answer = server.raw(PATH, b'{"max_tokens": 1, %b}' % fields.encode())
            assert answer.status_code in (200, 400)

    def test_only_json_is_read(self, server: Any) -> None:
        # Web pages may send text to any server without asking; JSON they may not.
        answer = server.raw(PATH, json.dumps(ASK).encode(), **{"content-type": "text/plain"})
        assert answer.status_code == 400

    def test_a_foreign_name_of_this_machine_is_refused(self, server: Any) -> None:
        assert server.get("/v1/models", host="evil.example").status_code == 400

    def test_unknown_paths_and_methods(self, server: Any) -> None:
        assert server.get("/v2").json()["error"]["message"] == "Not Found"
        assert server.get(PATH).status_code == 405


class TestQueue:
    def test_a_full_queue_says_when_to_come_again(self, guarded: Any, keys: tuple[str, ...]) -> None:
        headers = {"x-api-key": keys[0]}
        with httpx.Client(base_url=guarded.url, headers=headers, timeout=30) as client:
            endless = {str(guarded.service.tokenizer.eos_id): -100}
            body = {**ASK, "max_tokens": 1500, "stream": True, "logit_bias": endless}
            streams = [client.stream("POST", PATH, json=body) for _ in range(3)]
            lines = [stream.__enter__().iter_lines() for stream in streams]  # one that is dropped hangs up
            assert all(next(each).startswith("data: ") for each in lines)
            refused = client.post(PATH, json={**ASK, "max_tokens": 1})
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
            for stream in streams:
                stream.__exit__(None, None, None)
        guarded.settle()
        assert guarded.post(PATH, {**ASK, "max_tokens": 1}, **headers).status_code == 200


class TestHangingUp:
    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("prompt_tokens", [1, 1500])
    def test_pages_are_free_at_once(self, server: Any, stream: bool, prompt_tokens: int) -> None:
        """During the prompt as well as during the answer."""
        server.settle()
        engine = server.service.worker.engine
        body = {**ASK, "messages": [{"role": "user", "content": "z" * prompt_tokens}], "stream": stream}
        body["logit_bias"] = {str(server.service.tokenizer.eos_id): -100}
        data = json.dumps({**body, "max_tokens": 2000 - prompt_tokens}).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        address = server.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as connection:
            connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            for _ in range(500):
                if engine.running:
                    break
                time.sleep(0.01)
            assert engine.running
        server.settle()
        held = engine.memory.pool.num_pages - engine.memory.pool.num_free
        assert held == engine.memory.prefix.num_pages  # only the prefix cache holds any
        assert server.service.worker.num_open == 0

    def test_many_clients_of_whom_some_hang_up(self, server: Any) -> None:
        """Whoever stays hears what a solo run says, and nothing is left behind."""
        server.settle()
        rng = random.Random(0)
        bodies = [
            {**ASK, "seed": n, "max_tokens": 10, "stream": True, "messages": [{"role": "user", "content": "ab" * n}]}
            for n in range(5)
        ]
        solo = [server.post(PATH, {**body, "stream": False}).json() for body in bodies]
        expected = [answer["choices"][0]["message"]["content"] for answer in solo]

        async def talk(client: httpx.AsyncClient, number: int, patience: int) -> None:
            await asyncio.sleep(rng.random() / 2)
            content = ""
            async with client.stream("POST", PATH, json=bodies[number]) as answer:
                assert answer.status_code == 200
                async for line in answer.aiter_lines():
                    patience -= 1
                    if patience < 0:
                        return
                    if line.startswith("data: {"):
                        content += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            assert content == expected[number]

        async def crowd() -> None:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                patience = [rng.choice((0, 3, 8, 1000, 1000, 1000)) for _ in range(24)]
                await asyncio.gather(*(talk(client, n % 5, patience[n]) for n in range(24)))

        asyncio.run(crowd())
        server.settle()
        memory = server.service.worker.engine.memory
        assert memory.pool.num_pages - memory.pool.num_free == memory.prefix.num_pages
        assert server.service.worker.num_open == 0

    def test_a_slow_client_counts_as_gone(self) -> None:
        closed: list[bool] = []
        ended: list[bool] = []

        async def chunks() -> AsyncGenerator[str, None]:
            try:
                while True:
                    yield sse("more")
            finally:
                closed.append(True)

        async def run() -> None:
            async def receive() -> Message:
                await asyncio.sleep(60)
                raise AssertionError("nobody hangs up")

            async def send(message: Message) -> None:
                if message["type"] == "http.response.body":
                    await asyncio.sleep(60)

            stream = EventStream(chunks(), send_s=0.05, on_end=lambda: ended.append(True))
            with pytest.raises(TimeoutError):
                await stream({"type": "http"}, receive, send)

        asyncio.run(run())
        assert closed == ended == [True]

    def test_a_client_that_is_gone_before_the_first_chunk_is_noticed(self) -> None:
        ended: list[bool] = []

        async def chunks() -> AsyncGenerator[str, None]:
            yield sse("never read")

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            await asyncio.sleep(60)

        stream = EventStream(chunks(), send_s=60, on_end=lambda: ended.append(True))
        asyncio.run(stream({"type": "http"}, receive, send))
        assert ended == [True]

    def test_a_quiet_stream_shows_that_it_is_alive(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("leadline.serve.http._QUIET_S", 0.01)
        bodies: list[bytes] = []

        async def chunks() -> AsyncGenerator[str, None]:
            await asyncio.sleep(0.2)
            yield sse("at last")

        async def receive() -> Message:
            await asyncio.sleep(60)
            raise AssertionError("nobody hangs up")

        async def send(message: Message) -> None:
            bodies.append(message.get("body", b""))

        asyncio.run(EventStream(chunks(), send_s=1, on_end=lambda: None)({"type": "http"}, receive, send))
        assert bodies.count(b": still working\n\n") > 1
        assert bodies[-2:] == [b"data: at last\n\n", b""]
