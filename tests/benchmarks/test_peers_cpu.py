"""The comparison with transformers: both sides do the same work, and the result file has the promised form."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def peers_cpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark as a module; scripts lie outside of the package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("peers_cpu")


@pytest.fixture
def readme(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("readme")


def test_both_sides_agree_in_logits_and_loss(peers_cpu: ModuleType) -> None:
    assert peers_cpu.gate() <= peers_cpu.GATE_TOLERANCE


def test_the_gate_sees_a_wrong_weight(peers_cpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = peers_cpu.in_transformers_names

    def wrong(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        tensors = right(model)
        tensors["model.layers.3.self_attn.sinks"] = tensors["model.layers.3.self_attn.sinks"] + 0.5
        return tensors

    monkeypatch.setattr(peers_cpu, "in_transformers_names", wrong)
    assert peers_cpu.gate() > peers_cpu.GATE_TOLERANCE


@pytest.mark.parametrize("side", ["leadline", "transformers"])
def test_prefill_is_measured(peers_cpu: ModuleType, side: str) -> None:
    result = peers_cpu.run_case(peers_cpu.Case(peers_cpu.CHUNKED, side, tokens=256, chunk=128))
    assert result.tokens_per_second > 0
    assert result.extra_bytes >= 0
    assert 1 <= result.runs <= peers_cpu.MOST_RUNS
    assert result.indexer_tensors is None


@pytest.mark.parametrize(("side", "trained"), [("leadline", 12), ("transformers", 0)])
def test_indexer_tensors_with_a_gradient_are_counted(peers_cpu: ModuleType, side: str, trained: int) -> None:
    result = peers_cpu.run_case(peers_cpu.Case(peers_cpu.RECOMPUTE, side, tokens=256, chunk=256))
    assert (result.indexer_tensors_with_gradient, result.indexer_tensors) == (trained, 12)


def test_extra_memory_is_the_peak_and_not_what_is_left(peers_cpu: ModuleType) -> None:
    size = 200 * peers_cpu.MB

    def work() -> None:
        torch.ones(size // 4, dtype=torch.float32).sum()

    _, extra_bytes = peers_cpu.measured(work)
    assert 0.95 * size < extra_bytes < 1.5 * size


def test_a_failed_allocation_is_told_from_other_errors(peers_cpu: ModuleType) -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert peers_cpu.is_out_of_memory(refused.value)
    assert not peers_cpu.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def _run(peers_cpu: ModuleType):
    return peers_cpu.Run("A processor, 2 cores", 2, "2026-01-01T00:00:00+00:00", "abc1234", {"torch": "2.13.0"})


def test_records_become_the_readme_table(peers_cpu: ModuleType, readme: ModuleType, tmp_path: Path) -> None:
    measurement = peers_cpu.Measurement(peers_cpu.ONE_SHOT, 8192, 8192, ("leadline", "transformers"))
    results = {
        "leadline": peers_cpu.Result(2000.0, 250 * peers_cpu.MB, 3),
        "transformers": peers_cpu.Result(100.0, 8500 * peers_cpu.MB, 1),
    }
    record = peers_cpu.record(measurement, results, _run(peers_cpu))
    assert record["leadline"] == asdict(results["leadline"])
    folder = tmp_path / "benchmarks" / "results" / "cpu"
    folder.mkdir(parents=True)
    (folder / "peers_cpu.jsonl").write_text(json.dumps(record) + "\n", encoding="utf8")
    table = readme.result_tables(tmp_path)
    assert "| one-shot prefill | 8,192 | 2,000 | 100 | 20.0x | 250 MB | 8.50 GB | 34.0x |" in table
    assert "A processor, 2 cores, 2026-01-01, commit abc1234" in table


def test_a_side_without_memory_keeps_its_error(peers_cpu: ModuleType) -> None:
    measurement = peers_cpu.Measurement(peers_cpu.ONE_SHOT, 16384, 16384, ("leadline", "transformers"))
    results = {
        "leadline": peers_cpu.Result(2000.0, 250 * peers_cpu.MB, 3),
        "transformers": peers_cpu.Result(error="can't allocate memory: you tried to allocate 8589934592 bytes"),
    }
    record = peers_cpu.record(measurement, results, _run(peers_cpu))
    assert record["transformers"]["error"].startswith("can't allocate memory")
    assert record["row"]["transformers memory"] == "more than 21 GB"
    assert record["row"]["faster"] == record["row"]["less memory"] == ""


def test_targets_are_met_or_missed_by_the_measured_figures(peers_cpu: ModuleType) -> None:
    fast = peers_cpu.Result(900.0, 200 * peers_cpu.MB, 3, 12, 12)
    slow = peers_cpu.Result(300.0, 500 * peers_cpu.MB, 3, 0, 12)
    records = [
        peers_cpu.record(m, {side: {"leadline": fast, "transformers": slow}[side] for side in m.sides}, _run(peers_cpu))
        for m in peers_cpu.measurements(quick=False)
    ]
    met = {target.claim: target.met for target in peers_cpu.targets(records)}
    assert [claim for claim, holds in met.items() if not holds] == ["training on 2K tokens in a third of the memory"]
    assert len(met) == 7


def test_the_machine_folder_names_cores_and_architecture_only(peers_cpu: ModuleType) -> None:
    assert peers_cpu.machine_slug().startswith("cpu-")
    assert peers_cpu.machine_slug().count("-") == 2
