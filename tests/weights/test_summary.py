"""What `inspect` says of a folder: the tree adds up, and every disagreement with config.json is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from leadline.model import accounting
from leadline.model.config import PRESETS
from leadline.weights.files import CheckpointReader
from leadline.weights.summary import MAX_PROBLEMS, Node, Summary, summarise
from leadline.weights.synthetic import few_layers, make_checkpoint

WIDE = PRESETS["tiny"].replace(moe_intermediate_size=128)


def leaves(node: Node) -> list[Node]:
    return [leaf for child in node.children for leaf in leaves(child)] if node.children else [node]


@pytest.mark.parametrize("naming", ["official", "transformers"])
@pytest.mark.parametrize("format", ["bf16", "fp8", "fp4"])
def test_the_tree_adds_up(tmp_path: Path, format: str, naming: str) -> None:
    make_checkpoint(tmp_path / "model", WIDE, format, naming=naming)
    summary = summarise(tmp_path / "model")
    reader = CheckpointReader(tmp_path / "model")
    assert summary.total.tensors == len(reader.tensors) == sum(leaf.tensors for leaf in leaves(summary.total))
    size = sum(info.end - info.begin for info in reader.tensors.values())
    assert summary.total.num_bytes == size == sum(leaf.num_bytes for leaf in leaves(summary.total))
    make_checkpoint(tmp_path / "plain", WIDE, "bf16")
    values = sum(math.prod(info.shape) for info in CheckpointReader(tmp_path / "plain").tensors.values())
    assert summary.total.parameters == values
    assert summary.problems == ()
    assert summary.naming == naming


def test_layers_of_one_kind_are_one_line(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", few_layers(PRESETS["flash"], 12, 2), "fp4", values="zero")
    assert [child.label for child in summarise(tmp_path / "model").total.children] == [
        "embedding",
        "layers 0, 1: window, hash",
        "layer 2: CSA, hash",
        "layers 3, 5 .. 11: HCA, score",
        "layers 4, 6 .. 10: CSA, score",
        "head",
        "mtp 0",
    ]


def test_a_whole_flash_has_its_published_size(tmp_path: Path) -> None:
    """284B parameters and one MTP block of 6.6B, in about 160 GB."""
    flash = PRESETS["flash"]
    make_checkpoint(tmp_path / "model", flash, "fp4", values="zero")
    summary = summarise(tmp_path / "model")
    tables = 3 * flash.vocab_size * flash.num_experts_per_tok  # the hash layers' tables are no parameters
    counted = accounting.parameters_total(flash) + accounting.parameters_mtp_block(flash)
    assert summary.total.parameters - tables == counted
    assert 159e9 < summary.total.num_bytes < 161e9
    assert summary.variant == "DeepSeek-V4-Flash: FP4 experts, FP8 linear maps, F8_E8M0 scales"


# -- problems --


def problems_after(folder: Path, change: Callable[[dict[str, Tensor]], object] = len, **fields: Any) -> Summary:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    values |= fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return summarise(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "model", WIDE, "fp4")
    return tmp_path / "model"


def drop_expert(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".experts.7." in name]:
        del tensors[name]


def one_plain_expert(tensors: dict[str, Tensor]) -> None:
    name = "layers.2.ffn.experts.0.w1"
    del tensors[f"{name}.scale"]
    tensors[f"{name}.weight"] = torch.ones(128, 64)


@pytest.mark.parametrize(
    ("change", "fields", "problem"),
    [
        (lambda t: t.pop("norm.weight"), {}, "norm.weight [64] is missing"),
        (
            lambda t: t.update({"layers.3.ffn.gate.tid2eid": torch.ones(2, 2)}),
            {},
            "layers.3.ffn.gate.tid2eid [2, 2] is not in",
        ),
        (lambda t: t.update({"norm.weight": torch.ones(65)}), {}, "norm.weight is [65], config.json asks for [64]"),
        (drop_expert, {}, "layers.0.ffn.experts.w1 is [7, 128, 64], config.json asks for [8, 128, 64]"),
        (one_plain_expert, {}, "experts have several formats: "),
        (len, {"expert_dtype": "fp8"}, "config.json announces fp8 experts, layers.0.ffn.experts.0.w1.weight is fp4"),
        (
            len,
            {"quantization_config": None},
            "config.json announces plain experts, layers.0.ffn.experts.0.w1.weight is fp4",
        ),
        (
            len,
            {"quantization_config": None},
            "config.json announces plain linear maps, layers.0.attn.wq_a.weight is fp8",
        ),
        (len, {"dspark_block_size": 5}, "config field 'dspark_target_layer_ids' = None: must be a list of layers"),
        (len, {"num_hash_layers": 2}, "layers.1.ffn.gate.tid2eid [256, 2] is missing"),
    ],
    ids=["missing", "surplus", "shape", "experts", "mixed", "expert dtype", "plain", "plain maps", "dspark", "hash"],
)
def test_problems(
    folder: Path, change: Callable[[dict[str, Tensor]], object], fields: dict[str, Any], problem: str
) -> None:
    found = problems_after(folder, change, **fields).problems
    assert any(problem in line for line in found), found


def test_a_config_without_expert_dtype_says_nothing_wrong(folder: Path) -> None:
    """Some repackaged folders leave it out."""
    assert problems_after(folder, expert_dtype=None).problems == ()


def test_many_problems_are_counted(folder: Path) -> None:
    def drop_layers(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(("layers.2.", "layers.3."))]:
            del tensors[name]

    found = problems_after(folder, drop_layers).problems
    assert len(found) == MAX_PROBLEMS + 1
    assert found[-1].startswith("and ")


@pytest.mark.parametrize(
    ("format", "variant"),
    [
        ("bf16", "DeepSeek-V4 of widths never released: not quantised"),
        ("fp8", "DeepSeek-V4 of widths never released: FP8 experts and linear maps, F32 scales"),
    ],
)
def test_other_widths(tmp_path: Path, format: str, variant: str) -> None:
    make_checkpoint(tmp_path / "model", WIDE, format)
    assert summarise(tmp_path / "model").variant == variant
