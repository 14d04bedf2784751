"""Files of kept answers: what was written is found, nobody else's is, and no way of dying leaves half of anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from leadline.engine.request import Sampling
from leadline.serve.kept import Kept, KeptError, Unfinished
from leadline.serve.wanted import Wanted

WANTED = Wanted((1, 2, 3), 9, Sampling(temperature=0.5, logit_bias={7: -1.5}, seed=2**61), "high", "reasoning", 5)


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def opened(tmp_path: Path, lines: list[str]) -> Iterator[Callable[..., Kept]]:
    """opened(model): the folder, as a new process finds it."""
    with ExitStack() as at_end:

        def open_it(model: str = "model") -> Kept:
            kept = Kept(tmp_path / "kept", model, 60.0, lines.append)
            at_end.callback(kept.close)
            return kept

        yield open_it


def answer(number: int, said: tuple[int, ...] = (), namespace: str = "mine") -> Unfinished:
    id = f"resp-{number:024x}"
    return Unfinished(id, namespace, {"id": id, "created_at": 5}, WANTED.as_json(), said)


def test_what_is_wanted_survives_being_written_down() -> None:
    form = {"type": "regex", "pattern": "é\ud800"}
    for wanted in (WANTED, Wanted((5,), 1, Sampling(logprobs=3), form=form, stop=("a", "b"), one_call=True)):
        found = Wanted.from_json(json.loads(json.dumps(wanted.as_json())))
        assert found.sampling.logprobs is None
        assert (found.prompt, found.stop, found.form) == (wanted.prompt, wanted.stop, wanted.form)
        assert found.sampling.logit_bias == wanted.sampling.logit_bias
    assert Wanted.from_json(WANTED.as_json()) == WANTED


def test_answers_outlive_the_process(opened: Callable[..., Kept], lines: list[str], tmp_path: Path) -> None:
    kept = opened()
    kept.keep(answer(1))
    kept.keep(answer(1, (4, 5)))
    kept.keep(answer(2))
    kept.finish(answer(2).id, {"output": ["é"]})
    for path in (kept.folder, *kept.folder.glob("*.json")):
        assert path.stat().st_mode & 0o077 == 0
    kept.close()
    again = opened()
    (found,) = again.unfinished
    assert (found.id, found.said, found.frame) == (answer(1).id, [4, 5], answer(1).frame)
    assert Wanted.from_json(found.wanted) == WANTED
    assert again.response(answer(1).id, "mine") == (answer(1).frame, False)
    assert again.response(answer(2).id, "mine") == ({"output": ["é"]}, True)
    assert again.response(answer(2).id, "mine") == ({"output": ["é"]}, True), "fetching does not take it away"
    assert again.response(answer(2).id, "other") is None
    assert again.response("../../etc/passwd", "mine") is None
    assert not again.delete(answer(2).id, "other")
    assert again.delete(answer(2).id, "mine")
    again.finish(answer(2).id, {})
    assert again.response(answer(2).id, "mine") is None
    assert [path.name for path in again.folder.glob("*.json")] == [f"{answer(1).id}.json"]
    assert lines == []


def test_time_is_up(opened: Callable[..., Kept]) -> None:
    kept = opened()
    for number in (1, 2, 3):
        kept.keep(answer(number))
    kept.finish(answer(1).id, {})
    kept.finish(answer(2).id, {})
    for number in (1, 2, 3):
        path = kept.folder / f"{answer(number).id}.json"
        os.utime(path, (0, time.time() - 100))
    assert kept.response(answer(1).id, "mine") is None
    kept.keep(answer(4))
    assert len(list(kept.folder.glob("*.json"))) == 2, "one that is being said stays as long as it takes"
    kept.close()
    assert [found.id for found in opened().unfinished] == [answer(4).id]


def test_another_model_does_not_go_on(opened: Callable[..., Kept], lines: list[str]) -> None:
    kept = opened()
    kept.keep(answer(1))
    kept.close()
    other = opened("other")
    assert other.unfinished == []
    assert other.response(answer(1).id, "mine") is None
    assert "another model" in lines[0]
    other.close()
    assert len(opened().unfinished) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"model": "model"}', b"{}"])
def test_damage_is_said_and_left_alone(opened: Callable[..., Kept], lines: list[str], content: bytes) -> None:
    kept = opened()
    kept.keep(answer(1))
    kept.keep(answer(2))
    (kept.folder / f"{answer(1).id}.json").write_bytes(content)
    kept.close()
    assert [found.id for found in opened().unfinished] == [answer(2).id]
    assert len(lines) == 1
    assert "is damaged" in lines[0]


def test_a_folder_is_of_one_server(opened: Callable[..., Kept], tmp_path: Path) -> None:
    kept = opened()
    with pytest.raises(KeptError, match="another server"):
        opened()
    kept.close()
    opened().close()
    (tmp_path / "file").write_text("")
    with pytest.raises(KeptError, match="no answers can be kept there"):
        Kept(tmp_path / "file", "model", 1.0, print)


def test_a_full_disk_leaves_what_was_there(opened: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = opened()
    kept.keep(answer(1, (1,)))

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            kept.keep(answer(1, (1, 2)))
    assert not list(kept.folder.glob("*.new"))
    kept.close()
    assert opened().unfinished[0].said == [1]


WRITER = """
import sys
from pathlib import Path
from leadline.serve.kept import Kept, Unfinished
kept = Kept(Path(sys.argv[1]), "model", 60.0, print)
print("ready", flush=True)
count = 0
while True:
    count += 1
    for number in range(3):
        id = f"resp-{number:024x}"
        kept.keep(Unfinished(id, "", {"id": id}, {"prompt": [count] * 20_000}, [count] * 1000))
"""


@pytest.mark.parametrize("pause", [0.0, 0.02, 0.1])
def test_a_process_killed_while_writing_leaves_whole_files(tmp_path: Path, lines: list[str], pause: float) -> None:
    folder = tmp_path / "kept"
    before = Kept(folder, "model", 60.0, lines.append)
    before.keep(answer(9, (1, 2, 3)))
    before.close()
    with subprocess.Popen([sys.executable, "-c", WRITER, folder], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
    kept = Kept(folder, "model", 60.0, lines.append)
    assert lines == []
    *others, nine = kept.unfinished
    assert nine.said == [1, 2, 3]
    for found in others:
        assert len(found.said) == 1000
        assert len(set(found.said) | set(found.wanted["prompt"])) == 1
    kept.close()
    assert not list(folder.glob("*.new"))
