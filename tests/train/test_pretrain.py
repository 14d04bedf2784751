"""A whole run: what it leaves behind, and that stopping it anywhere changes nothing."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import leadline.train.pretrain as pretrain_module
from leadline.train.checkpoint import ResumeError
from leadline.train.metrics import read_metrics
from leadline.train.pretrain import Run, RunError, pretrain
from leadline.weights.load import load_checkpoint


def quiet() -> Console:
    return Console(file=io.StringIO())


def final_state(run: Run) -> dict[str, Any]:
    return torch.load(run.out / "resume.pt", weights_only=True)


def same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def test_a_run_leaves_a_model_that_loads_and_a_number_for_it(run):
    trained = pretrain(run, quiet())
    assert trained.finished
    assert trained.steps_done == run.steps
    rows = list(read_metrics(run.out / "metrics.jsonl"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert ["heldout_bpb" in row for row in rows] == [False, False, True, False, False, True]
    assert [row["dense"] for row in rows] == [True, True, False, False, False, False]
    assert rows[-1]["loss"] < rows[0]["loss"]
    summary = json.loads((run.out / "summary.json").read_text())
    assert summary["heldout_bpb"] > 0
    loaded = load_checkpoint(run.out / "checkpoint")
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_interrupted_and_continued_is_bitwise_the_same(run, tmp_path, monkeypatch, stop_after):
    whole = dataclasses.replace(run, out=tmp_path / "whole")
    pretrain(whole, quiet())

    step = pretrain_module.train_step
    calls = []

    def interrupting(*arguments, **named):
        calls.append(1)
        if len(calls) == stop_after:
            os.kill(os.getpid(), signal.SIGINT)  # what Ctrl-C sends
        return step(*arguments, **named)

    monkeypatch.setattr(pretrain_module, "train_step", interrupting)
    stopped = pretrain(run, quiet())
    assert not stopped.finished
    assert stopped.steps_done == stop_after
    assert pretrain(run, quiet()).finished

    left, right = final_state(whole), final_state(run)
    assert same(left["model"], right["model"])
    assert same(left["optimizers"], right["optimizers"])
    assert same(left["progress"]["loader"], right["progress"]["loader"])
    assert without_times(list(read_metrics(whole.out / "metrics.jsonl"))) == without_times(
        list(read_metrics(run.out / "metrics.jsonl"))
    )


KILLED_RUN = """
import dataclasses, pickle, sys, io
from rich.console import Console
from leadline.train.pretrain import pretrain
run = pickle.loads(sys.stdin.buffer.read())
pretrain(run, Console(file=io.StringIO()))
"""


def test_killed_at_any_moment_it_continues_to_the_same_model(run, tmp_path):
    import pickle

    whole = dataclasses.replace(run, out=tmp_path / "whole")
    pretrain(whole, quiet())
    saving = dataclasses.replace(run, save_every_seconds=1e-9)  # after every step
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", KILLED_RUN], stdin=subprocess.PIPE, env=environment)
        assert process.stdin is not None
        process.stdin.write(pickle.dumps(saving))
        process.stdin.close()
        metrics = run.out / "metrics.jsonl"
        rows = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and len(metrics.read_bytes().splitlines()) > rows + 1:
                process.kill()
            time.sleep(0.005)
        process.wait()
    pretrain(saving, quiet())
    assert same(final_state(whole)["model"], final_state(run)["model"])


def test_a_finished_run_is_not_trained_again(run, monkeypatch):
    pretrain(run, quiet())
    monkeypatch.setattr(pretrain_module, "train_step", lambda *_, **__: pytest.fail("trained again"))
    assert pretrain(run, quiet()).finished


def test_other_settings_do_not_continue_a_run(run):
    pretrain(run, quiet())
    with pytest.raises(ResumeError, match=r"resume\.pt: was made with peak_lr = 0\.0\d+, this run has 0\.5"):
        pretrain(dataclasses.replace(run, peak_lr=0.5), quiet())


def test_a_damaged_checkpoint_is_refused_in_one_line(run):
    pretrain(run, quiet())
    path = run.out / "resume.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ResumeError, match=r"resume\.pt: cannot be read \([^\n]*\); delete it") as caught:
        pretrain(run, quiet())
    assert "\n" not in str(caught.value)


def test_minutes_become_steps_once(run):
    by_time = dataclasses.replace(run, steps=None, minutes=0.05)
    trained = pretrain(by_time, quiet())
    assert trained.finished
    assert trained.total_steps == trained.steps_done
    assert final_state(by_time)["progress"]["clock"]["total_steps"] == trained.steps_done


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens_per_step": 300}, "tokens_per_step = 300: must be a multiple of tokens_per_segment"),
        ({"steps": 0}, "steps = 0: must be at least 1"),
        ({"minutes": 0.0}, "minutes = 0.0: must be positive"),
        ({"dense_share": 1.5}, "dense_share = 1.5: must lie between 0 and 1"),
        ({"heldout_percent": 0.0}, "heldout_percent = 0.0: must lie between 0 and 100"),
    ],
)
def test_contradictory_settings_are_refused(run, change, message):
    with pytest.raises(RunError, match=message.replace("(", r"\(")):
        dataclasses.replace(run, **change)


def test_text_without_a_held_out_side_is_refused(run, tmp_path: Path):
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    (lonely / "one.txt").write_text("only one text")
    with pytest.raises(RunError, match=r"training and \d held-out documents; both are needed"):
        pretrain(dataclasses.replace(run, data=lonely), quiet())
