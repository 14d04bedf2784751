"""The comparison of attention layers: both sides compute the same, and the result file has the promised form."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def layer_h100(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark as a module, of a layer that a CPU computes in no time; scripts lie outside of the package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("layer_h100")
    small = module.LAYERS.replace(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=32,
        qk_rope_head_dim=16,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=16,
        index_topk=128,  # all: with few heads, scores of 0 tie
        index_n_heads=4,
        index_head_dim=16,
        torch_dtype="float32",
        expert_dtype=None,
        quantization_config=None,
    )
    monkeypatch.setattr(module, "LAYERS", small)
    return module


def test_both_sides_agree(layer_h100: ModuleType) -> None:
    assert layer_h100.gate(layer_h100.LAYERS, 300, CPU) <= 1e-5


def test_both_sides_agree_in_bfloat16(layer_h100: ModuleType) -> None:
    config = layer_h100.LAYERS.replace(torch_dtype="bfloat16", hidden_size=256, q_lora_rank=64)
    assert layer_h100.gate(config, 700, CPU) <= layer_h100.GATE_TOLERANCE * 2 / 3


def test_the_gate_sees_a_wrong_weight(layer_h100: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = layer_h100.in_transformers_names

    def wrong(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: x + 0.5 * (name == "sinks") for name, x in right(ours).items()}

    monkeypatch.setattr(layer_h100, "in_transformers_names", wrong)
    assert layer_h100.gate(layer_h100.LAYERS, 150, CPU) > layer_h100.GATE_TOLERANCE


@pytest.mark.parametrize("work", ["forward", "forward + backward", "training step"])
def test_what_is_timed_leaves_the_gradients_it_promises(layer_h100: ModuleType, work: str) -> None:
    measurement = layer_h100.Measurement("CSA", work, 150, False)
    side = layer_h100.sides(measurement, layer_h100.LAYERS, CPU)["leadline"]()
    layer_h100.work_of(side, measurement, layer_h100.LAYERS, CPU)()
    indexer = {name: x.grad is not None for name, x in side.module.named_parameters() if ".indexer." in name}
    others = {name: x.grad is not None for name, x in side.module.named_parameters() if ".indexer." not in name}
    assert set(others.values()) == {work != "forward"}
    assert set(indexer.values()) == {work == "training step"}


def test_a_line_has_the_promised_form(layer_h100: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    readme = importlib.import_module("readme")
    shared = {"machine": "a card", "time": "2026-11-24T12:00:00+00:00", "commit": "abc", "versions": {"torch": "2"}}
    measurement = layer_h100.Measurement("HCA", "forward", 8192, True)
    results = {"leadline": layer_h100.Result(2.0, 2**30), "transformers": layer_h100.Result()}
    line = layer_h100.record(measurement, results, shared)
    assert set(line) >= readme.RESULT_KEYS
    assert line["row"]["leadline ms"] == "2.00"
    assert line["row"]["transformers memory"] == "does not fit"
    assert line["row"]["faster"] == line["row"]["less memory"] == ""
    results["transformers"] = layer_h100.Result(60.0, 12 * 2**30)
    row = layer_h100.record(measurement, results, shared)["row"]
    assert (row["faster"], row["less memory"]) == ("30.0x", "12.0x")


def test_without_a_gpu_it_says_so(
    layer_h100: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert layer_h100.main([]) == 1
    assert capsys.readouterr().err == "layer_h100: no CUDA device found: this benchmark compares on a GPU\n"
