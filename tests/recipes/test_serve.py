from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from leadline.cli import UsageError
from leadline.model.config import TINY
from leadline.model.init import initialize
from leadline.model.transformer import Transformer
from leadline.recipes.serve import Options, bound, build, capacity, is_loopback, main
from leadline.serve.limits import KeyFileError, Keys
from leadline.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from leadline.weights.save import save_checkpoint

BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 200, "stream": True, "seed": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    tokenizer = Tokenizer.train(["the quick brown fox"], 256 + len(SPECIAL_TOKENS))
    tokenizer.save(folder / "tokenizer")
    config = TINY.replace(vocab_size=tokenizer.vocab_size)
    model = Transformer(config)
    initialize(model, 0)
    files = sorted((folder / "tokenizer").iterdir())
    save_checkpoint(model, config, folder / "model", tokenizer_files=files)
    return folder / "model"


def test_sigterm_lets_a_running_answer_finish(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "leadline", "serve", str(checkpoint), "port=0", "context=512", "slots=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            match = re.fullmatch(r"serving model at (http://127\.0\.0\.1:\d+)/v1\n", line)
            assert match, line
            with httpx.stream("POST", f"{match[1]}/v1/chat/completions", json=BODY, timeout=60) as answer:
                lines = answer.iter_lines()
                assert next(lines).startswith("data: ")
                process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
            log = process.stderr.read()
        finally:
            process.kill()
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"' in rest[-2]
    assert "hello" not in log


def test_a_checkpoint_becomes_a_service(checkpoint: Path) -> None:
    service = build(checkpoint, Options(context=600, slots=2, aliases=("gpt",)), Keys([]))
    assert (service.policy.name, service.context_tokens, service.slots) == ("model", 600, 2)
    service.require_model("gpt")
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
