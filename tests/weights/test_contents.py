"""A folder under our names: every naming and format gives the same matrices, and what does not fit is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from leadline.model.config import PRESETS
from leadline.weights.contents import Contents
from leadline.weights.header import CheckpointError
from leadline.weights.names import NAMINGS, Part
from leadline.weights.stored import Quantized, as_float
from leadline.weights.synthetic import make_checkpoint

TINY = PRESETS["tiny"]
WIDE = TINY.replace(moe_intermediate_size=128)  # whole blocks of 128 rows, which fused experts need under FP8


@pytest.fixture
def reference(tmp_path: Path) -> Contents:
    make_checkpoint(tmp_path / "reference", WIDE, "bf16")
    return Contents(tmp_path / "reference")


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("format", ["bf16", "fp8", "fp4"])
def test_every_naming_and_format_holds_the_same_tensors(
    tmp_path: Path, reference: Contents, naming: str, format: str
) -> None:
    make_checkpoint(tmp_path / "model", WIDE, format, naming=naming)
    contents = Contents(tmp_path / "model")
    assert contents.naming == naming
    assert contents.shapes == reference.shapes
    assert list(contents.shapes) == list(reference.shapes)
    for ours in reference.shapes:
        for part in reference.matrices(ours):
            found, wanted = as_float(contents.read(part)).double(), as_float(reference.read(part)).double()
            assert found.shape == wanted.shape
            assert (found - wanted).norm() <= (0.15 if format == "fp4" else 0.04) * wanted.norm(), part


def test_the_order_is_the_models(reference: Contents) -> None:
    names = list(reference.shapes)
    assert names[0] == "embed.weight"
    layers = [int(name.split(".")[1]) for name in names if name.startswith("layers.")]
    assert layers == sorted(layers)
    assert names.index("norm.weight") > names.index("layers.3.hc_ffn.fn")
    assert names[-1].startswith("mtp.0.")


def test_one_matrix_of_a_fused_stack(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", WIDE, "fp8", naming="transformers")
    contents = Contents(tmp_path / "model")
    up = contents.read(Part("layers.1.ffn.experts.w3", 5))
    assert isinstance(up, Quantized)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(up.codes.view(torch.uint8), tensors[name][5, 128:].view(torch.uint8))
    assert torch.equal(up.scale, tensors[name + "_scale_inv"][5, 1:])
    assert contents.stored("layers.1.ffn.experts.w3")[0].name == name
    assert len(contents.stored("layers.1.ffn.experts.w3")) == 1


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"layers.1.attn.wx.weight": torch.ones(2)}),
            r"attn\.wx\.weight is none of DeepSeek-V4 under",
        ),
        (lambda t: t.update({"a": torch.ones(2), "b": torch.ones(2)}), r"tensor a is none .*, nor are 1 others"),
        (lambda t: t.pop("layers.1.ffn.experts.3.w1.weight"), r"lacks expert 3 of layers\.1\.ffn\.experts\.w1, though"),
        (
            lambda t: t.update({"layers.1.ffn.experts.3.w1.weight": torch.ones(127, 64)}),
            r"experts\.3\.w1\.weight is F32 \[127, 64\], layers\.1\.ffn\.experts\.0\.w1\.weight is BF16 \[128, 64\]",
        ),
        (
            lambda t: t.update({"layers.1.ffn.experts.3.w1.weight": torch.ones(2, 3, 4)}),
            r"experts\.3\.w1\.weight is F32 \[2, 3, 4\], expected a matrix",
        ),
        (
            lambda t: t.update({"norm.weight": torch.ones(2, 3, 4)}),
            r"norm\.weight is F32 \[2, 3, 4\], expected a matrix",
        ),
    ],
    ids=["unknown", "several unknown", "missing expert", "unlike experts", "stack", "stack of norms"],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, reference: Contents, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    edit(reference.folder, change)
    with pytest.raises(CheckpointError, match=message):
        Contents(reference.folder)


@pytest.mark.parametrize(("height", "rest"), [(129, "2 matrices of equal height"), (64, "whole blocks of 128 rows")])
def test_fused_stacks_that_cannot_be_cut_are_named(tmp_path: Path, height: int, rest: str) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    codes = torch.zeros(2, height if height % 2 else 2 * height, 64).to(torch.float8_e4m3fn)
    scale = torch.ones(2, -(-codes.shape[1] // 128), 1)
    save_file({name: codes, name + "_scale_inv": scale}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor model.layers.0.mlp.experts.gate_up_proj is FP8 .*{rest}"):
        Contents(tmp_path)


def test_a_flat_stack_is_named(tmp_path: Path) -> None:
    save_file({"model.layers.0.mlp.experts.gate_up_proj": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"gate_up_proj is F32 \[4, 4\], expected a stack of matrices"):
        Contents(tmp_path)
