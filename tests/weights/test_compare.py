"""Comparison: over formats and names, and everything in which two folders can differ."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from leadline.model.config import PRESETS
from leadline.weights.compare import Difference, compare
from leadline.weights.contents import Contents
from leadline.weights.synthetic import make_checkpoint

TINY = PRESETS["tiny"]
WIDE = TINY.replace(moe_intermediate_size=128)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "reference", TINY, "bf16")
    return tmp_path / "reference"


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> dict[str, Difference]:
    """Rows that are not equal after a change of a copy."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    other = folder.with_name("other")
    other.mkdir()
    save_file(tensors, other / "model.safetensors")
    rows = list(compare(Contents(other), Contents(folder)))
    assert len(rows) == len({row.name for row in rows}) >= len(Contents(folder).shapes)
    return {row.name: row for row in rows if not row.equal}


def test_one_value_in_one_expert_is_found(folder: Path) -> None:
    name = "layers.2.ffn.experts.5.w2.weight"
    reference = load_file(folder / "model.safetensors")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][3, 7] += 1.0

    rows = changed(folder, change)
    assert set(rows) == {"layers.2.ffn.experts.w2"}
    row = rows["layers.2.ffn.experts.w2"]
    moved = float((reference[name][3, 7] + 1.0).double() - reference[name][3, 7].double())
    norm = math.sqrt(
        sum(
            float(t.double().square().sum())
            for n, t in reference.items()
            if "layers.2.ffn.experts" in n and ".w2." in n
        )
    )
    assert row.largest == pytest.approx(abs(moved))
    assert row.relative == pytest.approx(abs(moved) / norm)
    assert not row.within(0.0)
    assert row.within(1.0)


@pytest.mark.parametrize(
    ("change", "name", "note"),
    [
        (lambda t: t.pop("norm.weight"), "norm.weight", "other lacks what .*reference has"),
        (
            lambda t: t.update({"layers.0.ffn.gate.bias": torch.ones(8)}),
            "layers.0.ffn.gate.bias",
            "reference lacks what",
        ),
        (lambda t: t.update({"norm.weight": torch.ones(3)}), "norm.weight", r"shapes \(3,\) and \(64,\)"),
    ],
    ids=["missing", "surplus", "shape"],
)
def test_what_cannot_be_compared_never_passes(
    folder: Path, change: Callable[[dict[str, Tensor]], object], name: str, note: str
) -> None:
    rows = changed(folder, change)
    assert set(rows) == {name}
    assert re.search(note, rows[name].note)
    assert not rows[name].within(1e30)


def test_nan_on_one_side_never_passes_and_on_both_is_equal(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["norm.weight"][5] = float("nan")

    rows = changed(folder, change)
    assert set(rows) == {"norm.weight"}
    assert math.isnan(rows["norm.weight"].largest)
    assert not rows["norm.weight"].within(1e30)
    other = folder.with_name("other")
    assert all(row.equal for row in compare(Contents(other), Contents(other)))


def test_infinity_against_itself_is_equal_and_against_a_number_is_not(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["norm.weight"][5] = float("inf")

    row = changed(folder, change)["norm.weight"]
    assert row.largest == math.inf
    assert not row.within(1e30)


def test_the_same_values_in_other_bytes_are_equal(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.double() if tensor.is_floating_point() else tensor.int()
        tensors["norm.weight"] = torch.where(tensors["norm.weight"] == 0, -0.0, tensors["norm.weight"])

    assert changed(folder, change) == {}


@pytest.mark.parametrize(("format", "low", "high"), [("fp8", 0.01, 0.04), ("fp4", 0.05, 0.15)])
def test_rounding_to_a_format_has_the_size_that_it_should(tmp_path: Path, format: str, low: float, high: float) -> None:
    make_checkpoint(tmp_path / "plain", WIDE, "bf16")
    make_checkpoint(tmp_path / "rounded", WIDE, format, naming="transformers")
    rows = {row.name: row for row in compare(Contents(tmp_path / "rounded"), Contents(tmp_path / "plain"))}
    assert low < rows["layers.1.ffn.experts.w1"].relative < high
    assert 0.01 < rows["layers.1.attn.wq_b.weight"].relative < 0.04
    assert rows["layers.1.attn.compressor.wkv.weight"].equal
    assert rows["layers.0.ffn.gate.tid2eid"].equal


def test_integers_are_compared(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["layers.0.ffn.gate.tid2eid"][7, 1] += 1

    assert changed(folder, change)["layers.0.ffn.gate.tid2eid"].largest == 1.0


def test_progress_counts_every_value(folder: Path) -> None:
    contents = Contents(folder)
    seen: list[int] = []
    assert all(row.equal for row in compare(contents, contents, seen.append))
    assert sum(seen) == sum(math.prod(shape) for shape in contents.shapes.values())
