from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from leadline.cli import UsageError
from leadline.model.config import TINY
from leadline.model.init import initialize
from leadline.model.transformer import Transformer
from leadline.recipes.serve import Options, bound, build, capacity, is_loopback, main
from leadline.serve.kept import KeptError
from leadline.serve.limits import KeyFileError, Keys
from leadline.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from leadline.weights.save import save_checkpoint

BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 200, "stream": True, "seed": 1}


def write_checkpoint(folder: Path, seed: int) -> Path:
    tokenizer = Tokenizer.train(["the quick brown fox"], 256 + len(SPECIAL_TOKENS))
    tokenizer.save(folder / "tokenizer")
    config = TINY.replace(vocab_size=tokenizer.vocab_size)
    model = Transformer(config)
    initialize(model, seed)
    files = sorted((folder / "tokenizer").iterdir())
    save_checkpoint(model, config, folder / "model", tokenizer_files=files)
    return folder / "model"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("serve"), 0)


@dataclass
class Server:
    """`leadline serve` in a process of its own."""

    url: str
    process: subprocess.Popen[str]
    before: str

    def ask(self, text: str) -> dict[str, Any]:
        body = {**BODY, "messages": [{"role": "user", "content": text}], "max_tokens": 8, "stream": False}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()

    def figure(self, name: str) -> float:
        """A metric."""
        match = re.search(rf"^leadline:{name}{{.*}} (\S+)$", httpx.get(f"{self.url}/metrics").text, re.M)
        assert match, name
        return float(match[1])

    def log(self) -> str:
        """Everything that it wrote, until its end."""
        assert self.process.stderr is not None
        return self.before + self.process.stderr.read()


@contextmanager
def started(checkpoint: Path, *settings: str) -> Iterator[Server]:
    """A server; it is killed when the context ends."""
    command = [sys.executable, "-m", "leadline", "serve", str(checkpoint), "port=0", "slots=1", *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            lines = [process.stderr.readline()]
            while not (match := re.fullmatch(r"serving model at (http://127\.0\.0\.1:\d+)/v1\n", lines[-1])):
                assert lines[-1], "".join(lines)
                lines.append(process.stderr.readline())
            yield Server(match[1], process, "".join(lines))
        finally:
            process.kill()


def test_sigterm_lets_a_running_answer_finish(checkpoint: Path) -> None:
    with started(checkpoint, "context=512") as server:
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=BODY, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        log = server.log()
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"' in rest[-2]
    assert "hello" not in log


def test_what_does_not_end_within_the_grace_goes_on_at_the_next_start(checkpoint: Path, tmp_path: Path) -> None:
    path, settings = "/v1/chat/completions", (f"keep={tmp_path}", "context=1K", "grace=0", "batch_invariant=yes")
    body = {**BODY, "max_tokens": 200, "logit_bias": {1: -100}, "reasoning_effort": "none"}
    with started(checkpoint, *settings) as server:
        with httpx.stream("POST", server.url + path, json=body, timeout=60) as answer:
            lines = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: "))
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            *said, last = lines
        assert "hello" not in server.log()
    (id,) = last["error"]["response_ids"]
    begun = "".join(event["choices"][0]["delta"].get("content", "") for event in said)
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert 0 < len(record["said"]) < 200
    with started(checkpoint, *settings) as server:
        while (found := httpx.get(f"{server.url}/v1/responses/{id}").json())["status"] == "in_progress":
            time.sleep(0.1)
        due = httpx.post(server.url + path, json={**body, "stream": False}, timeout=60).json()
        with pytest.raises(UsageError, match="goes with one server"):
            main([str(checkpoint), f"keep={tmp_path}", "replicas=2"])
        with pytest.raises(KeptError, match="another server"):
            main([str(checkpoint), f"keep={tmp_path}", "port=0"])
    text = due["choices"][0]["message"]["content"]
    assert found["output"][0]["content"][0]["text"] == text
    assert text.startswith(begun)
    assert found["usage"]["output_tokens"] == due["usage"]["completion_tokens"]


def test_what_a_killed_server_has_read_the_next_one_has_at_once(checkpoint: Path, tmp_path: Path) -> None:
    """But not one of another model, nor one whose cache was damaged."""
    question = "the quick brown fox " * 80
    store = tmp_path / "cache" / "data.mdb"
    settings = (f"disk_cache={store.parent}", "disk_cache_gib=0.1", "context=2K", "batch_invariant=yes")
    other = write_checkpoint(tmp_path / "other", 1)
    answers: list[dict[str, Any]] = []
    cached: list[int] = []
    for folder, end in ((checkpoint, "kill"), (checkpoint, "stop"), (other, "stop"), (checkpoint, "stop")):
        with started(folder, *settings) as server:
            answers.append(server.ask(question))
            cached.append(answers[-1]["usage"]["prompt_tokens_details"]["cached_tokens"])
            server.ask("short")
            time.sleep(0.6)  # the figures are looked at twice a second
            server.ask("short")
            assert server.figure("external_prefix_cache_hits_total") == cached[-1]
            assert server.figure("disk_cache_bytes") > 0
            server.process.send_signal(signal.SIGKILL if end == "kill" else signal.SIGTERM)
            assert ("begins anew" in server.log()) is (len(answers) == 4)
        if len(answers) == 3:
            store.write_bytes(store.read_bytes()[: store.stat().st_size // 2])
    assert cached == [0, (answers[0]["usage"]["prompt_tokens"] - 1) // 128 * 128, 0, 0]
    assert [answers[n]["choices"] == answers[0]["choices"] for n in (1, 2, 3)] == [True, False, True]


def test_a_checkpoint_becomes_a_service(checkpoint: Path) -> None:
    service = build(checkpoint, Options(context=600, slots=2, aliases=("gpt",), window_policy="zero"), Keys([]))
    assert (service.policy.name, service.context_tokens, service.slots) == ("model", 600, 2)
    service.require_model("gpt")
    assert service.worker.engine.memory.policy.kind == "zero"
    pool = service.worker.engine.memory.pool
    assert pool.num_pages == 2 * 5  # 600 tokens and one more, for both
    assert capacity(service).startswith("context 600 tokens, 2 answers at once and 64 waiting, cache ")


def test_the_first_line_says_who_guesses(checkpoint: Path, staged_checkpoint: Path) -> None:
    for folder, words in (
        (checkpoint, ", MTP guesses 1 at a time"),
        (staged_checkpoint, ", DSpark guesses 5 at a time"),
    ):
        assert capacity(build(folder, Options(slots=1, speculate=True), Keys([]))).endswith(words)


def test_replicas_need_what_not_everybody_has(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")  # so that they are as before afterwards
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "leadline.recipes.replicas", raising=False)
    with pytest.raises(UsageError, match=re.escape("replicas=2: needs ray; pip install 'leadline[ray]'")):
        main([str(checkpoint), "replicas=2"])
    assert (os.environ["RAY_AUTH_MODE"], len(os.environ["RAY_AUTH_TOKEN"])) == ("token", 64)
    with pytest.raises(UsageError, match="replicas=0: expected 1 or more"):
        main([str(checkpoint), "replicas=0"])


def test_a_taken_port_is_said_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="choose another"):
        bound("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("host", False)]
)
def test_who_can_reach_an_address(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_bad_command_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="one checkpoint folder, found 0"):
        main([])
    with pytest.raises(UsageError, match="did you mean 'port'"):
        main(["folder", "prt=1"])
    with pytest.raises(KeyFileError, match="cannot be read"):
        main([str(tmp_path), f"api_key_file={tmp_path / 'none'}"])
    assert main(["context=128K", "--show"]) == 0
    assert "context = 131072" in capsys.readouterr().out
