"""The load test of `benchmarks/serve_load.py`, small, and that it would notice."""

from __future__ import annotations

import asyncio
import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def serve_load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark as a module; scripts lie outside of the package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("serve_load")


def test_sixteen_clients_get_right_answers_and_leave_nothing_behind(serve_load: ModuleType, tmp_path: Path) -> None:
    load = serve_load.Load(clients=16, seconds=3.0, questions=10, slots=4, queue=6)
    folder = serve_load.write_checkpoint(tmp_path)
    questions = serve_load.ask_alone(folder, load.questions, load.seed)
    wrong = [replace(each, answer=replace(each.answer, logprobs=(0.5, 0.5))) for each in questions]
    with serve_load.running_server(folder, tmp_path, load) as server:
        result = asyncio.run(serve_load.run_clients(server, questions, load))
        deceived = asyncio.run(serve_load.run_clients(server, wrong, replace(load, clients=1, seconds=0.1)))
    assert result.failures(load) == []
    assert result.tally.answers > 5
    assert result.tally.refused[429] > 0
    assert len(deceived.tally.wrong) >= 1
    row = serve_load.record(result, load)
    assert (row["row"]["wrong"], row["row"]["leaked"]) == ("0", "0")
    assert json.loads(json.dumps(row)) == row


def test_what_must_not_be_is_a_failure(serve_load: ModuleType) -> None:
    load = serve_load.Load(clients=4, slots=4, queue=0)
    good = serve_load.Result(1.0, serve_load.Tally(), leaked=0, resident_bytes=(10**8, 10**8), preemptions=0)
    bad = replace(good, tally=serve_load.Tally(wrong=["500 for a question"]), leaked=2, resident_bytes=(0, 10**9))
    assert good.failures(load) == []
    assert [line.split()[0] for line in bad.failures(load)] == ["wrong:", "2", "the"]
    (line,) = good.failures(replace(load, clients=5))
    assert "nobody was told to come again" in line


@pytest.mark.parametrize(
    ("seen", "fits"),
    [
        ({}, True),
        ({"content": "a", "logprobs": [-1.0]}, True),
        ({"content": "ab", "logprobs": [-1.0, -2.0], "finish": "stop"}, True),
        ({"content": "a", "logprobs": [-1.0], "finish": "stop"}, False),
        ({"content": "ab", "logprobs": [-1.0, -2.0], "finish": "length"}, False),
        ({"content": "b"}, False),
        ({"reasoning": "a"}, False),
        ({"logprobs": [-1.0000000001]}, False),
        ({"content": "abc"}, False),
    ],
)
def test_an_answer_or_its_beginning_fits(serve_load: ModuleType, seen: dict[str, Any], fits: bool) -> None:
    assert serve_load.Seen(**seen).fits(serve_load.Answer("", "ab", (-1.0, -2.0), "stop")) is fits
