"""`leadline chat`, through a pipe and on a terminal, with a small random model."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from leadline.__main__ import main
from leadline.recipes.chat import history, split
from leadline.recipes.terminal.screen import Pipe

ROOT = Path(__file__).parents[2]
GREEDY = ("temperature=0", "max_tokens=12", "mode=non-think")


@pytest.fixture
def piped(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """piped(lines, arguments...): exit code, standard output and standard error of a run."""

    def run(lines: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        status = main(["chat", str(checkpoint), *map(str, arguments)])
        out, error = capsys.readouterr()
        return status, out, error

    return run


def cached(notes: str) -> list[int]:
    """Tokens that each answer took from the cache."""
    lines = [line for line in notes.splitlines() if "first after" in line]
    matches = [re.search(r"([\d,]+) from the cache", line) for line in lines]
    return [int(match[1].replace(",", "")) if match else 0 for match in matches]


def test_questions_over_files_begin_where_the_cache_ends(
    piped: Callable[..., tuple[int, str, str]], project: Path
) -> None:
    status, out, notes = piped("one\ntwo\n", *GREEDY, "--with", project)
    assert status == 0
    assert "2 files, 1 left out" in notes
    first, second = cached(notes)
    assert first >= 256
    assert second >= first
    alone = piped("one\n", *GREEDY, "--with", project)[1]
    assert out.startswith(alone)
    assert len(out) > len(alone) > 1


def test_the_cache_changes_no_answer(piped: Callable[..., tuple[int, str, str]], project: Path) -> None:
    _, once, _ = piped("/system s\none\n", *GREEDY, "--with", project)
    _, again, notes = piped("/system s\none\n/retry\n", *GREEDY, "--with", project)
    assert again == once + once
    assert cached(notes)[1] > cached(notes)[0] - 128


def read_ahead(notes: str) -> tuple[int, int]:
    """Tokens of the files, and how many of them the cache knew before the first question."""
    found = re.search(r"([\d,]+) tokens, ([\d,]+) of them from the cache", notes)
    assert found
    return int(found[1].replace(",", "")), int(found[2].replace(",", ""))


def test_a_second_start_reads_from_the_disk(
    piped: Callable[..., tuple[int, str, str]], project: Path, tmp_path: Path
) -> None:
    disk = f"disk_cache={tmp_path / 'disk'}"
    _, cold_answer, notes = piped("one\n", *GREEDY, disk, "--with", project)
    tokens, known = read_ahead(notes)
    assert known == 0
    assert cold_answer == piped("one\n", *GREEDY, "--with", project)[1]

    _, answer, notes = piped("another\n", *GREEDY, disk, "--with", project)
    assert read_ahead(notes) == (tokens, (tokens - 1) // 128 * 128)
    assert answer == piped("another\n", *GREEDY, "--with", project)[1]

    other_formats = piped("one\n", *GREEDY, disk, "cache=served", "--with", project)[2]
    assert read_ahead(other_formats) == (tokens, 0)


def test_without_files_and_with_thinking(piped: Callable[..., tuple[int, str, str]]) -> None:
    status, out, notes = piped("one\n/think\n/stats\n", "temperature=0", "max_tokens=12", "budget=5")
    assert status == 0
    thought = out.splitlines()[1]
    assert thought
    assert thought != "Nothing was thought."
    assert "KV cache of these in served formats" in out
    assert "+ 12 tokens" in notes


def test_a_line_that_cannot_be_acted_on_fails_the_run_and_not_the_next(
    piped: Callable[..., tuple[int, str, str]],
) -> None:
    status, out, notes = piped("/nope\n" + "long " * 3000 + "\n\none\n/quit\ntwo\n", *GREEDY)
    assert status == 1
    assert "unknown command 'nope'" in notes
    assert "the prompt has" in notes
    assert len(cached(notes)) == 1
    assert out == piped("one\n", *GREEDY)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a checkpoint folder to talk with, found none"),
        (["{checkpoint}", "--with"], "--with: expected a folder or files behind it"),
        (["{checkpoint}", "more"], "expected one checkpoint folder, found more as well"),
        (["{checkpoint}", "temprature=1"], "unknown key 'temprature': did you mean 'temperature'?"),
        (["{checkpoint}", "--with", "nowhere"], "nowhere: no such file or folder"),
        (["{checkpoint}", "context=64", "--with", "{project}"], "the context 64: raise context="),
        (["{checkpoint}", "--with", "{large}"], "the model has no longer one"),
        (["{project}"], "tokenizer.json: no such file"),
        (["{checkpoint}", "disk_cache={large}"], "cannot be opened as a disk cache"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], message: str, checkpoint: Path, project: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "large").write_text("word " * 6000)
    places = {"checkpoint": checkpoint, "project": project, "large": tmp_path / "large"}
    assert main(["chat", *(word.format(**places) for word in arguments)]) == 1
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert len(error) <= 2


def test_a_history_that_cannot_be_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert history(Pipe()) is None
    assert "No history: " in capsys.readouterr().err


def test_words_of_the_command_line() -> None:
    found = split(["model", "seed=1", "--with", "a", "b", "top_k=3", "c", "--show"])
    assert found == (Path("model"), ["a", "b", "c"], ["seed=1", "top_k=3", "--show"])


# -- on a terminal --------------------------------------------------------------------------------------------------


class Keyboard:
    """A run of the program on a terminal of its own. screen: all that was printed, without colours and movements."""

    def __init__(self, arguments: list[str], home: Path) -> None:
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(home), "TERM": "xterm"}
        command = [sys.executable, "-m", "leadline", "chat", *arguments]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        self._raw = b""

    @property
    def screen(self) -> str:
        text = self._raw.decode(errors="replace")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r", "", text)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait(self, pattern: str, after: int = 0, seconds: float = 60.0) -> re.Match[str]:
        """Until something is on the screen."""
        end = time.monotonic() + seconds
        while not (found := re.compile(pattern).search(self.screen, after)):
            if time.monotonic() > end or not self._receive(end - time.monotonic()):
                raise AssertionError(f"no {pattern!r} on the screen:\n{self.screen}")
        return found

    def end(self) -> int:
        """The exit code, once the program has ended by itself."""
        while self._receive(60):
            pass
        return self.process.wait(60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)

    def _receive(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._ours], [], [], seconds)
        try:
            data = os.read(self._ours, 65536) if ready else b""
        except OSError:  # the other side is closed
            data = b""
        self._raw += data
        return bool(data)


@pytest.fixture
def keyboard(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[..., Keyboard]]:
    opened: list[Keyboard] = []

    def start(*arguments: object) -> Keyboard:
        opened.append(Keyboard([str(checkpoint), *map(str, arguments)], tmp_path / "state"))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_a_talk_on_a_terminal(keyboard: Callable[..., Keyboard], project: Path, tmp_path: Path) -> None:
    run = keyboard("temperature=0", "max_tokens=3000", "budget=20", "--with", project)
    run.wait("> ")
    run.type("a question\n")
    folded = run.wait("thought for 20 tokens, /think shows it")
    # The random model would go on for long; it is stopped in the middle of its answer.
    time.sleep(0.3)
    os.kill(run.process.pid, signal.SIGINT)
    stopped = run.wait(r"Stopped\.\n.*from the cache, first after", after=folded.end())
    run.type("/save talk.json\n".replace("talk", str(tmp_path / "talk")))
    run.wait("saved: ", after=stopped.end())
    run.type("\x03/stats\n")  # Ctrl-C on an empty line changes nothing
    run.wait("KV cache of these", after=stopped.end())
    run.type("\x04")
    assert run.end() == 0
    assert '"reasoning_content": ' in (tmp_path / "talk.json").read_text()
    kept = tmp_path / "state" / "leadline" / "history"
    assert kept.stat().st_mode & 0o777 == 0o600
    lines = kept.read_text().splitlines()
    assert [line for line in lines if not line.startswith("_")] == [
        "a question",
        f"/save {tmp_path / 'talk.json'}",
        "/stats",
    ]

    again = keyboard("temperature=0", "max_tokens=5")
    again.wait("> ")
    again.type("\x1b[A\x1b[A\x1b[A\n")  # three lines back
    again.wait("a question")
    again.wait("first after")
    again.type("/quit\n")
    assert again.end() == 0
