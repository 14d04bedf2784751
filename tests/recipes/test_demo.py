"""The main job, in its one-minute setting, as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from leadline.cli import UsageError
from leadline.recipes import demo, train
from leadline.train.metrics import read_metrics
from leadline.weights.load import load_checkpoint

ROOT = Path(__file__).parents[2]


def test_one_minute_of_demo_learns_and_reports(tmp_path: Path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "leadline", "demo", "minutes=1", f"out={out}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560, check=False)
    assert result.returncode == 0, result.stderr
    rows = list(read_metrics(out / "metrics.jsonl"))
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == len(rows)
    assert 0 < summary["heldout_bpb"] < 8
    assert sum(parameter.numel() for parameter in load_checkpoint(out / "checkpoint").parameters()) > 1e6
    page = (out / "report.html").read_text(encoding="utf8")
    assert f"{summary['heldout_bpb']:.3f}" in page
    assert "continued by the model" in result.stdout

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert len(list(read_metrics(out / "metrics.jsonl"))) == len(rows), "a finished run was trained again"


def test_show_prints_the_run_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert demo.main([f"out={tmp_path / 'none'}", "model.hidden_size=64", "--show"]) == 0
    assert "model.hidden_size = 64" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_train_shows_a_recipe_with_its_size(capsys: pytest.CaptureFixture[str]):
    assert train.main(["nano", "steps=3", "--show"]) == 0
    printed = capsys.readouterr().out
    assert "steps = 3" in printed
    assert "active per token" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a recipe: one of nano"),
        (["nanno"], "unknown recipe 'nanno': did you mean 'nano'?"),
        (["nano", "peak_lrr=1"], "unknown key 'peak_lrr': did you mean 'peak_lr'?"),
        (["nano", "model.hidden_sise=8"], "did you mean 'hidden_size'?"),
    ],
)
def test_a_typo_stops_with_the_nearest_name(arguments: list[str], message: str):
    with pytest.raises(UsageError) as caught:
        train.main(arguments)
    assert message in str(caught.value)
