"""The convergence benchmark: the same start and tokens for both sides, a verdict that can fail, rows for the README."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from leadline.model.config import TINY

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def convergence(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("convergence_gpu")
    monkeypatch.setattr(module, "LENGTHS", (40, 9))
    return module


def test_a_run_learns_and_can_be_repeated(convergence: ModuleType) -> None:
    config, device = TINY.replace(vocab_size=64), torch.device("cpu")
    told: list[str] = []
    first, again, other = (
        convergence.train("reference", torch.bfloat16, 12, device, config, seed, told.append) for seed in (0, 0, 1)
    )
    assert first.losses == again.losses
    assert first.losses != other.losses
    assert first.loss < first.losses[0] - 0.1
    assert [line.split(",")[1] for line in told] == [" bfloat16: step 10", " bfloat16: step 12"] * 3
    assert first.loss == pytest.approx(sum(first.losses[-3:]) / 3)


def test_the_second_half_of_a_text_repeats_the_first(convergence: ModuleType) -> None:
    table = convergence.grammar(32)
    assert torch.equal(table, convergence.grammar(32))
    tokens = convergence.sequence(table, 21, torch.Generator().manual_seed(3))
    assert torch.equal(tokens[11:], tokens[:10])
    ((segment, targets),) = convergence.batches(TINY.replace(vocab_size=32), 1, 0, torch.device("cpu"))
    assert segment.lengths == (40, 9)
    assert torch.equal(targets[:39], segment.tokens_T[1:40])


@pytest.mark.parametrize(
    ("losses", "passes"),
    [
        ((2.0, 2.2, 2.019), True),
        ((2.0, 2.0, 1.981), True),
        ((2.0, 2.0, 2.021), False),
        ((2.0, 2.0, 1.979), False),
        ((2.0, 2.0, float("nan")), False),
        ((float("nan"), 2.0, 2.0), False),
    ],
)
def test_verdict(convergence: ModuleType, losses: tuple[float, ...], passes: bool) -> None:
    results = [
        convergence.Result(name, dtype, [9.0, loss], 1.0)
        for (name, dtype), loss in zip(convergence.PLAN, losses, strict=True)
    ]
    assert convergence.passes(results) is passes


def test_rows_fit_the_readme(convergence: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    readme = importlib.import_module("readme")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    results = [
        convergence.Result("reference", torch.float32, [3.0, 2.0], 1.5),
        convergence.Result("kernel", torch.bfloat16, [3.0, 2.25], 0.5),
    ]
    lines = convergence.records(results, "abc", torch.device("cpu"))
    assert all(set(line) >= readme.RESULT_KEYS for line in lines)
    assert [line["row"]["difference"] for line in lines] == ["+0.0000", "+0.2500"]
    assert [line["row"]["allowed"] for line in lines] == ["", "0.02"]
    assert len({line["time"] for line in lines}) == 1


@pytest.mark.gpu
def test_kernels_learn_as_references_do(convergence: ModuleType) -> None:
    assert convergence.passes(convergence.compare(40, torch.device("cuda")))
