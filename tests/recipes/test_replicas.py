"""Two replicas on CPU behind one address: where calls go, and what becomes of them when a replica is killed."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
CHAT = "/v1/chat/completions"
START_S = 90.0

pytestmark = pytest.mark.ray


@dataclass(frozen=True)
class Running:
    """`leadline serve` with replicas."""

    url: str
    process: psutil.Process

    def ask(self, prompt: str, **body: Any) -> Any:
        messages = [{"role": "user", "content": prompt}]
        body = {"messages": messages, "reasoning_effort": "none", "max_tokens": 4, "temperature": 0, **body}
        return httpx.post(self.url + CHAT, json=body, timeout=60).raise_for_status().json()

    def figure(self, name: str) -> dict[str, float]:
        """A metric, summed up for each replica."""
        found: dict[str, float] = {}
        for replica, value in re.findall(
            rf'^leadline:{name}{{.*replica="(\w+)".*}} (\S+)$', httpx.get(f"{self.url}/metrics").text, re.M
        ):
            found[replica] = found.get(replica, 0) + float(value)
        return found

    def actors(self) -> list[psutil.Process]:
        """The replicas' processes."""
        below = self.process.children(recursive=True)
        return [each for each in below if each.name().startswith("ray::ServeRepl")]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("replicas")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        checkpoint = importlib.import_module("serve_load").write_checkpoint(folder)
    settings = ["port=0", "replicas=2", "slots=4", "context=1024", "batch_invariant=yes", "grace=5"]
    command = [sys.executable, "-m", "leadline", "serve", str(checkpoint), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    log = folder / "log"
    with log.open("wb") as output, subprocess.Popen(command, stderr=output, stdout=output, env=environment) as process:
        children: list[psutil.Process] = []
        try:
            deadline = time.monotonic() + START_S
            while not (match := re.search(r"^serving model at (http://\S+)/v1$", log.read_text("utf8"), re.M)):
                assert time.monotonic() < deadline, log.read_text("utf8")
                assert process.poll() is None, log.read_text("utf8")
                time.sleep(0.2)
            yield Running(match[1], psutil.Process(process.pid))
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            process.wait(30)
        finally:
            process.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, "Ray left processes behind"


def test_turns_of_a_conversation_go_where_its_beginning_is(running: Running) -> None:
    openings = [f"{number} " + "the quick brown fox " * 60 for number in range(8)]
    cached = [
        [running.ask(opening, seed=turn)["usage"]["prompt_cache_hit_tokens"] for opening in openings]
        for turn in range(3)
    ]
    assert cached[0] == [0] * len(openings)
    assert all(tokens >= 128 for turn in cached[1:] for tokens in turn)
    queries = running.figure("prefix_cache_queries_total")
    assert len(queries) == 2
    assert all(queries.values()), "one replica has all the homes"


def test_a_killed_replica_takes_nothing_with_it_but_what_it_was_saying(running: Running) -> None:
    due = {seed: running.ask("hello", seed=seed, max_tokens=40, temperature=1.0) for seed in range(4)}
    before = set(running.figure("num_free_slots"))
    streams, pieces = asyncio.run(_kill_under_load(running))

    for seed, answer in pieces:  # nothing of them was heard: another replica began them anew
        assert answer["choices"][0]["message"]["content"] == due[seed]["choices"][0]["message"]["content"]
    ends = [lines[-1] for lines in streams]
    broken = [json.loads(end) for end in ends if end != "[DONE]"]
    assert 0 < len(broken) < len(streams)
    assert {each["error"]["message"] for each in broken} == {
        "the replica that worked on this answer has stopped; ask again"
    }
    for lines in streams:
        whole = lines[-1] == "[DONE]"
        assert any(json.loads(line)["choices"][0]["finish_reason"] for line in lines[:-1]) is whole
    assert "leadline:relay_lost_total" in httpx.get(f"{running.url}/metrics").text

    deadline = time.monotonic() + START_S
    while len(after := set(running.figure("num_free_slots"))) < 2:  # another one is started
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert len(before & after) == 1
    assert running.ask("hello", seed=0, max_tokens=40, temperature=1.0)["choices"] == due[0]["choices"]
    assert set(running.figure("num_free_slots").values()) == {4.0}


async def _kill_under_load(running: Running) -> tuple[list[list[str]], list[tuple[int, Any]]]:
    """Data of eight long streams, and eight answers in one piece, while a replica that says something is killed."""
    speaking = asyncio.Event()
    async with httpx.AsyncClient(base_url=running.url, timeout=120) as client:

        async def stream(number: int) -> list[str]:
            messages = [{"role": "user", "content": f"question {number}"}]
            body = {"messages": messages, "max_tokens": 150, "stream": True, "seed": number}
            lines: list[str] = []
            async with client.stream("POST", CHAT, json=body) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: "):
                        lines.append(line.removeprefix("data: "))
                        if len(lines) > 8:
                            speaking.set()
            return lines

        async def piece(number: int) -> tuple[int, Any]:
            seed = number % 4
            body = {
                "messages": [{"role": "user", "content": "hello"}],
                "reasoning_effort": "none",
                "max_tokens": 40,
                "temperature": 1.0,
                "seed": seed,
            }
            return seed, (await client.post(CHAT, json=body)).raise_for_status().json()

        async def kill() -> None:
            await asyncio.wait_for(speaking.wait(), 60)
            running.actors()[0].kill()

        streams, pieces, _ = await asyncio.gather(
            asyncio.gather(*map(stream, range(8))), asyncio.gather(*map(piece, range(8))), kill()
        )
    return streams, pieces
