"""Answers that outlive their server: what the next one says is what the first would have said."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from leadline.engine.engine import Engine, Settings
from leadline.engine.sequence import Event
from leadline.model.transformer import Transformer
from leadline.serve.kept import Kept
from leadline.serve.limits import Keys
from leadline.serve.service import Policy, Service
from leadline.text.tokenizer import Tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "pick",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
HELLO = [{"role": "user", "content": "hello"}]
QUIET = {"thinking": {"type": "disabled"}}
CHAT = {"messages": HELLO, "max_tokens": 40, "seed": 5}
ASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {**CHAT, **QUIET, "frequency_penalty": 0.5, "top_p": 0.9}),
    "thinking": ("/v1/chat/completions", {**CHAT, "thinking": {"type": "enabled", "budget_tokens": 20}}),
    "several": ("/v1/chat/completions", {**CHAT, **QUIET, "n": 2}),
    "call": ("/v1/chat/completions", {**CHAT, **QUIET, "max_tokens": 150, "tools": [TOOL], "tool_choice": "required"}),
    "completion": ("/v1/completions", {"prompt": "the quick", "max_tokens": 40, "seed": 5}),
    "response": (
        "/v1/responses",
        {"input": "hello", "max_output_tokens": 40, "temperature": 0, "metadata": {"a": "b"}},
    ),
    "message": ("/v1/messages", {"messages": HELLO, "max_tokens": 40, "temperature": 0}),
}


class Held(Engine):
    """An engine that stops after so many steps, until what it says is cancelled."""

    steps_left: int | None = None

    def step(self) -> list[Event]:
        if self.steps_left is not None and self.running:
            if self.steps_left == 0:
                time.sleep(0.002)
                return []
            self.steps_left -= 1
        return super().step()


Start = Callable[..., AbstractContextManager[Any]]


@pytest.fixture
def start(model: Transformer, tokenizer: Tokenizer, serving: Any, tmp_path: Path) -> Start:
    """start(steps, keys): a server that keeps answers in one folder; after so many steps its engine stands still."""

    def run(steps: int | None = None, keys: tuple[str, ...] = ()) -> AbstractContextManager[Any]:
        engine = Held(model, Settings(slots=4, pages=40, max_tokens=1024, step_tokens=256))
        engine.steps_left = steps
        kept = Kept(tmp_path / "kept", "tiny", 60.0, print)
        return serving(Service(engine, tokenizer, Policy("tiny"), Keys(list(keys)), kept))

    return run


def suspend(running: Any) -> None:
    """What the server does when its time to end has come."""
    asyncio.run_coroutine_threadsafe(running.service.suspend(), running.service.worker._loop).result(20)


def stands_still(running: Any) -> None:
    """Wait until the engine has made its steps."""
    while running.service.worker.engine.steps_left or not running.service.worker.engine.running:
        time.sleep(0.002)


def fetched(running: Any, id: str, **headers: str) -> dict[str, Any]:
    """The response, once it has ended."""
    for _ in range(500):
        response = running.get(f"/v1/responses/{id}", **headers)
        assert response.status_code == 200, response.text
        if response.json()["status"] != "in_progress":
            return response.json()
        time.sleep(0.02)
    raise AssertionError("the answer does not end")


def parts(response: dict[str, Any]) -> list[tuple[str, str]]:
    """Kind and text of each item."""
    return [
        (item["type"], item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
        for item in response["output"]
    ]


def due_parts(path: str, body: Any) -> list[list[tuple[str, str]]]:
    """The same of each answer to a request in any protocol."""
    if path == "/v1/responses":
        return [parts(body)]
    if path == "/v1/messages":
        return [[("message", block["text"]) for block in body["content"]]]
    if path == "/v1/completions":
        return [[("message", choice["text"])] for choice in body["choices"]]
    found = []
    for message in (choice["message"] for choice in body["choices"]):
        calls = [("function_call", call["function"]["arguments"]) for call in message.get("tool_calls") or []]
        texts = [("reasoning", message.get("reasoning_content")), ("message", message["content"])]
        found.append([(kind, text) for kind, text in texts if text] + calls)
    return found


def last_event(running: Any, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The last event of a stream that is ended when the engine stands still."""
    events: list[dict[str, Any]] = []
    with httpx.stream("POST", running.url + path, json={**body, "stream": True}, timeout=30) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                if not events:
                    stands_still(running)
                    suspend(running)
                events.append(json.loads(line.removeprefix("data: ")))
    return events[-1]


@pytest.mark.parametrize("name", ASKS)
def test_the_next_server_says_the_rest(start: Start, server: Any, name: str) -> None:
    path, body = ASKS[name]
    due = due_parts(path, server.post(path, body).raise_for_status().json())
    with start(steps=12) as first:
        last = last_event(first, path, body)
        assert first.post(path, body).status_code == 503
    if name == "response":
        ids = [last["response"]["id"]]
        assert last["type"] == "response.failed"
        assert ids[0] in last["response"]["error"]["message"]
    else:
        ids = last["error"]["response_ids"]
        assert ids[0] in last["error"]["message"]
        assert name == "message" or last["error"]["code"] == "answer_kept"
    with start() as second:
        responses = [fetched(second, id) for id in ids]
        second.settle()
    assert [parts(response) for response in responses] == due
    for response in responses:
        assert response["usage"]["output_tokens"] <= (150 if name == "call" else 40)
        assert name != "response" or response["metadata"] == {"a": "b"}


def test_an_answer_in_one_piece_is_kept_too(start: Start, server: Any) -> None:
    path, body = ASKS["chat"]
    due = due_parts(path, server.post(path, body).json())
    with start(steps=12) as first, httpx.Client(timeout=30) as client:
        ending = threading.Thread(target=lambda: (stands_still(first), suspend(first)))
        ending.start()
        refused = client.post(first.url + path, json=body)
        ending.join()
        assert refused.status_code == 503
        (id,) = refused.json()["error"]["response_ids"]
    with start() as second:
        assert [parts(fetched(second, id))] == due


def test_it_can_be_put_off_again_and_again(start: Start, server: Any) -> None:
    path, body = ASKS["thinking"]
    due = due_parts(path, server.post(path, body).json())
    with start(steps=9) as first:
        (id,) = last_event(first, path, body)["error"]["response_ids"]
    for steps in (5, 0, 11):
        with start(steps) as another:
            stands_still(another)
            assert another.get(f"/v1/responses/{id}").json()["status"] == "in_progress"
    with start() as last:
        assert [parts(fetched(last, id))] == due
    with start() as later:
        assert [parts(fetched(later, id))] == due
        assert later.service.worker.num_open == 0


def test_a_client_that_has_gone_is_not_waited_for(start: Start) -> None:
    with start(steps=12) as first:
        body = {**CHAT, **QUIET, "stream": True}
        with httpx.stream("POST", f"{first.url}/v1/chat/completions", json=body, timeout=30) as answer:
            next(answer.iter_lines())
        first.settle()
        suspend(first)
        assert not list(first.service.kept.folder.glob("*.json"))


def test_answers_in_the_background(start: Start, server: Any) -> None:
    path, body = ASKS["response"]
    due = due_parts(path, server.post(path, body).json())
    with start() as running, OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        ask: Any = {key: value for key, value in body.items() if key != "stream"}
        begun = client.responses.create(model="tiny", background=True, **ask)
        assert begun.status == "in_progress"
        assert begun.background
        while client.responses.retrieve(begun.id).status == "in_progress":
            time.sleep(0.02)
        found = client.responses.retrieve(begun.id)
        assert found.status == "incomplete"
        assert [parts(found.model_dump())] == due
        client.responses.delete(begun.id)
        assert running.get(f"/v1/responses/{begun.id}").status_code == 404
        refused = running.post(path, {**body, "background": True, "stream": True})
        assert refused.status_code == 400


def test_a_killed_server_has_kept_what_runs_in_the_background(start: Start, server: Any, tmp_path: Path) -> None:
    path, body = ASKS["response"]
    due = due_parts(path, server.post(path, body).json())
    with start(steps=5) as running:
        id = running.post(path, {**body, "background": True}).json()["id"]
        stands_still(running)
        shutil.copytree(tmp_path / "kept", tmp_path / "as it is")
    shutil.rmtree(tmp_path / "kept")
    (tmp_path / "as it is").rename(tmp_path / "kept")
    with start() as second:
        assert [parts(fetched(second, id))] == due


def test_a_deleted_answer_is_given_up(start: Start) -> None:
    path, body = ASKS["response"]
    with start(steps=5) as running:
        id = running.post(path, {**body, "background": True}).json()["id"]
        assert running.service.worker.num_open == 1
        assert httpx.delete(f"{running.url}/v1/responses/{id}").json() == {
            "id": id,
            "object": "response",
            "deleted": True,
        }
        assert httpx.delete(f"{running.url}/v1/responses/{id}").status_code == 404
        running.settle()
        assert not list(running.service.kept.folder.glob("*.json"))


def test_an_answer_is_its_owners(start: Start, keys: tuple[str, ...]) -> None:
    mine, other = ({"x-api-key": key} for key in keys)
    with start(keys=keys) as running:
        id = running.post("/v1/responses", {**ASKS["response"][1], "background": True}, **mine).json()["id"]
        fetched(running, id, **mine)
        assert running.get(f"/v1/responses/{id}", **other).status_code == 404
        assert running.get(f"/v1/responses/{id}").status_code == 401
        assert httpx.delete(f"{running.url}/v1/responses/{id}", headers=other).status_code == 404


def test_what_can_no_longer_be_served_ends_with_the_reason(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(steps=12) as first:
        (id,) = last_event(first, *ASKS["call"])["error"]["response_ids"]
    path = first.service.kept.folder / f"{id}.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "wanted": {**found["wanted"], "form": {"type": "none such"}}}))
    with start() as second:
        response = fetched(second, id)
    assert response["status"] == "failed"
    assert "cannot be gone on with" in response["error"]["message"]
