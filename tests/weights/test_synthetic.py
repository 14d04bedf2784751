"""Folders of made-up values: complete, of the released shapes, small on disk where they are empty, and able to run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from leadline.model.config import PRESETS, ModelConfig
from leadline.model.segment import Segment
from leadline.weights.files import CheckpointReader
from leadline.weights.load import load_checkpoint
from leadline.weights.summary import summarise
from leadline.weights.synthetic import few_layers, make_checkpoint

TINY = PRESETS["tiny"]


@pytest.mark.parametrize(
    ("preset", "format", "variant"),
    [
        ("flash", "fp4", "DeepSeek-V4-Flash: FP4 experts, FP8 linear maps, F8_E8M0 scales"),
        ("flash", "fp8", "DeepSeek-V4-Flash-Base: FP8 experts and linear maps, F32 scales"),
        ("pro", "fp4", "DeepSeek-V4-Pro: FP4 experts, FP8 linear maps, F8_E8M0 scales"),
        ("pro", "fp8", "DeepSeek-V4-Pro-Base: FP8 experts and linear maps, F32 scales"),
    ],
)
def test_the_four_checkpoints_in_full_width_take_no_room(
    tmp_path: Path, preset: str, format: str, variant: str
) -> None:
    config = few_layers(PRESETS[preset], 3, 4)
    make_checkpoint(tmp_path / "model", config, format, values="zero")
    summary = summarise(tmp_path / "model")
    assert summary.variant.startswith(variant)
    assert "; 3 of its " in summary.variant
    assert summary.problems == ()
    assert summary.total.num_bytes > 2e9
    assert sum(file.stat().st_blocks * 512 for file in (tmp_path / "model").iterdir()) < 1e6


def test_draft_stages(tmp_path: Path) -> None:
    config = few_layers(PRESETS["flash"], 4, 2, draft_stages=True)
    make_checkpoint(tmp_path / "model", config, "fp4", values="zero")
    summary = summarise(tmp_path / "model")
    assert summary.variant.startswith("DeepSeek-V4-Flash-DSpark: FP4 experts")
    assert summary.problems == ()
    read = ModelConfig.from_file(tmp_path / "model")
    assert read.has_draft_stages
    assert read.num_nextn_predict_layers == 1
    assert read.mtp_ratios == (0, 0, 0)
    assert read.extra["dspark_target_layer_ids"] == [1, 2, 3]
    assert read.extra["dspark_markov_rank"] == 256


@pytest.mark.parametrize("naming", ["official", "transformers"])
def test_draft_stages_under_every_naming(tmp_path: Path, naming: str) -> None:
    config = few_layers(TINY, 4, draft_stages=True)
    make_checkpoint(tmp_path / "model", config, "bf16", naming=naming)
    assert summarise(tmp_path / "model").problems == ()
    assert ModelConfig.from_file(tmp_path / "model").compress_ratios == config.compress_ratios


def test_the_seed_and_the_name_decide(tmp_path: Path) -> None:
    def tensors(folder: str, seed: int, **changes: int) -> dict[str, torch.Tensor]:
        make_checkpoint(tmp_path / folder, TINY.replace(**changes), "bf16", seed=seed, max_shard_bytes=50_000)
        return dict(CheckpointReader(tmp_path / folder).items())

    first, again, other = tensors("a", 0), tensors("b", 0), tensors("c", 1)
    fewer = tensors("d", 0, n_routed_experts=4)
    name = "layers.1.ffn.experts.2.w1.weight"
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace("2", "3")])
    assert torch.equal(first[name], fewer[name])


def test_a_model_of_made_up_values_runs(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", TINY, "fp4")
    model = load_checkpoint(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        output = model(Segment.of(torch.arange(40)))
        logits = model.logits(model.hidden(output.streams_TSD))
    assert logits.isfinite().all()
    assert logits.std() > 0.1


def test_unknown_values(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="values 'ones' is not one of random, zero"):
        make_checkpoint(tmp_path / "model", TINY, "bf16", values="ones")
    with pytest.raises(ValueError, match="format 'int4' is not one of bf16, fp8, fp4"):
        make_checkpoint(tmp_path / "model", TINY, "int4")
    assert list(tmp_path.iterdir()) == []
