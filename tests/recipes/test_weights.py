"""`leadline weights`: its four verbs, what they print, their exit statuses, and how they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from leadline import __main__ as entry
from leadline.model.config import PRESETS
from leadline.recipes import weights
from leadline.weights.synthetic import make_checkpoint

WIDE = PRESETS["tiny"].replace(moe_intermediate_size=128)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "model", WIDE, "fp4")
    return tmp_path / "model"


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_inspect_shows_the_tree(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["weights", "inspect", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "DeepSeek-V4 of widths never released: FP4 experts, FP8 linear maps, F8_E8M0 scales"
    assert any(line.split() == ["total", "427", "1.374M", "1.199", "MB"] for line in lines)
    assert any("├ attention" in line and "FP8/E8M0" in line for line in lines)
    assert any("├ routed experts" in line and "FP4/E8M0" in line for line in lines)
    assert lines[-1] == "All tensors of config.json are there, in its formats."
    assert all(len(line) <= 80 for line in lines[2:])


def test_inspect_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert weights.main(["inspect", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["naming"] == "official"
    assert report["total"]["label"] == "total"
    assert report["total"]["tensors"] == sum(child["tensors"] for child in report["total"]["children"])


def test_inspect_names_what_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder, lambda tensors: tensors.pop("norm.weight"))
    assert weights.main(["inspect", str(folder)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "problem: norm.weight [64] is missing"


def test_convert_and_verify(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "plain"
    assert (
        weights.main(["convert", str(folder), str(target), "format=bf16", "naming=transformers", "shard_bytes=100K"])
        == 0
    )
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{target}: ")
    assert "transformers names" in printed.out
    assert printed.err == "", "the progress bar belongs to terminals"
    assert len(list(target.glob("*.safetensors"))) > 5
    assert weights.main(["verify", str(target), str(folder)]) == 0
    assert "158 of 158 tensors are equal, value for value." in capsys.readouterr().out


def test_an_interrupted_conversion_says_how_to_go_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "convert", interrupt)
    assert entry.main(["weights", "convert", str(folder), str(tmp_path / "target")]) == 130
    assert capsys.readouterr().err == "leadline weights: interrupted; the same command goes on from here\n"


def test_scales_option(folder: Path, tmp_path: Path) -> None:
    assert weights.main(["convert", str(folder), str(tmp_path / "eight"), "format=fp8", "scales=e8m0"]) == 0
    tensors = load_file(tmp_path / "eight" / "model.safetensors")
    assert {t.dtype for name, t in tensors.items() if name.endswith(".scale")} == {torch.float8_e8m0fnu}


def test_verify_shows_the_worst_and_ends_in_1(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    weights.main(["convert", str(folder), str(other)])
    capsys.readouterr()

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["norm.weight"] *= 1.5
        tensors["layers.1.attn.kv_norm.weight"] *= 1.25
        del tensors["head.weight"]

    edit(other, change)
    assert weights.main(["verify", str(other), str(folder), "tolerance=0.3", "worst=2"]) == 1
    printed = capsys.readouterr().out
    assert printed.index("head.weight") < printed.index("norm.weight")
    assert "kv_norm" not in printed
    assert "155 of 158 tensors are equal" in printed
    assert "2 differ by more than 0.3." in printed
    assert weights.main(["verify", str(other), str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["passed"]
    assert {row["name"] for row in report["rows"] if not row["equal"]} == {
        "norm.weight", "layers.1.attn.kv_norm.weight", "head.weight"
    }  # fmt: skip
    edit(other, lambda tensors: tensors.update({"head.weight": load_file(folder / "model.safetensors")["head.weight"]}))
    assert weights.main(["verify", str(other), str(folder), "tolerance=0.6"]) == 0


def test_make(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["make", str(tmp_path / "pro"), "preset=pro", "layers=2", "experts=2", "format=fp8", "values=zero"]
    assert weights.main([*command, "draft_stages=true"]) == 0
    assert "DeepSeek-V4-Pro-Base-DSpark: FP8 experts" in capsys.readouterr().out
    assert weights.main(command) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "unknown verb of `leadline weights` ''"),
        (["inspct", "a"], "did you mean 'inspect'"),
        (["inspect"], "expected FOLDER, got nothing"),
        (["inspect", "nowhere"], "nowhere"),
        (["inspect", "a", "depth=3"], "'depth=3' is not understood"),
        (["convert", "a"], "expected SOURCE and TARGET, got a"),
        (["convert", "a", "b", "format=int8"], "format=int8: expected"),
        (["convert", "a", "b", "formt=fp8"], "did you mean 'format'"),
        (["convert", "a", "b", "shard_bytes=0"], "shard_bytes=0"),
        (["convert", "a", "b", "--force"], "--force"),
        (["verify", "a", "b", "tolerance=-1"], "not negative"),
        (["make", "a", "layers=44"], "flash has 43 layers and 256 experts"),
        (["make", "a", "values=ones"], "values=ones: expected one of random, zero"),
    ],
)
def test_unusable_requests(capsys: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
    assert entry.main(["weights", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, "one line"
    assert printed.err.startswith("leadline weights: ")
    assert named in printed.err


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def unknown_dtype(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"I64"', b'"dtype":"I63"', 1))


def index(folder: Path, file_name: str) -> None:
    """An index that says the norm is in another file."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = load_file(folder / "model-00001-of-00001.safetensors")
    weight_map = {name: "model-00001-of-00001.safetensors" for name in names} | {"norm.weight": file_name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def nan_scale(tensors: dict[str, Tensor]) -> None:
    tensors["layers.2.attn.wq_b.scale"].view(torch.uint8)[0, 0] = 255


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "truncated shard": (cut, "model.safetensors", "cut short inside tensor"),
    "missing scale": (
        lambda folder: edit(folder, lambda tensors: tensors.pop("layers.2.attn.wq_b.scale")),
        "model.safetensors",
        "tensor layers.2.attn.wq_b.weight is F8_E4M3 [128, 32], but the folder lacks its scales",
    ),
    "wrong block grid": (
        lambda folder: edit(folder, lambda tensors: tensors.update({"layers.2.attn.wq_b.scale": torch.ones(2, 1)})),
        "model.safetensors",
        "tensor layers.2.attn.wq_b.scale is F32 [2, 1]",
    ),
    "NaN scale": (
        lambda folder: edit(folder, nan_scale),
        "model.safetensors",
        "tensor layers.2.attn.wq_b.scale holds the scale nan at [0, 0]",
    ),
    "unknown dtype": (unknown_dtype, "model.safetensors", "has dtype 'I63'"),
    "index names a missing file": (
        lambda folder: index(folder, "model-00009-of-00009.safetensors"),
        "model.safetensors.index.json",
        "tensor norm.weight is said to be in model-00009-of-00009.safetensors, which is missing",
    ),
    "path escapes the folder": (
        lambda folder: index(folder, "../outside.safetensors"),
        "model.safetensors.index.json",
        "tensor norm.weight is said to be in '../outside.safetensors', which is no file of the folder",
    ),
    "unknown tensor": (
        lambda folder: edit(folder, lambda tensors: tensors.update({"layers.2.attn.wx": torch.ones(1)})),
        "model",
        "tensor layers.2.attn.wx is none of DeepSeek-V4 under official names",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    """One line that names file and tensor, exit status 2, and nothing half-written."""
    break_it, file_name, message = DAMAGES[damage]
    (tmp_path / "outside.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    good = tmp_path / "good"
    weights.main(["convert", str(folder), str(good)])
    break_it(folder)
    before = sorted(path.name for path in tmp_path.iterdir())
    capsys.readouterr()
    for command in (
        ["convert", str(folder), str(tmp_path / "target"), "format=bf16"],
        ["verify", str(good), str(folder)],
    ):
        assert weights.main(command) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1, "one line"
        assert f"{folder.parent / 'model' / file_name if file_name != 'model' else folder}: " in printed.err
        assert message in printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_help_names_the_formats(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["weights", "--help"]) == 0
    printed = capsys.readouterr().out
    for word in ("fp4", "fp8", "bf16", "exit status", "tolerance", "naming"):
        assert word in printed
    assert entry.main(["--help"]) == 0
    assert "weights" in capsys.readouterr().out
