"""`leadline verify`: what it compares, what it notices, and how it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from leadline import __main__ as entry
from leadline.recipes import verify

GOLDEN = Path(__file__).parents[1] / "golden" / "exact"
SERVED = GOLDEN.parent / "served"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to be damaged, compared in one piece and in chunks of 100 only."""
    monkeypatch.setattr(verify, "CHUNK_SIZES", (100,))
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object], metadata: dict[str, str] | None = None) -> None:
    """Load a file, change its tensors, save it with the metadata it had, or another."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() if metadata is None else metadata
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def scaled(name: str, factor: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)

    return change


def report_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], set[int]]:
    """Names and positions of the rows above tolerance; checks that exit status, verdict and rows agree."""
    status = verify.main([str(folder), "--json"])
    report = json.loads(capsys.readouterr().out)
    failed = [row for row in report["rows"] if not row["passed"]]
    assert status == bool(failed)
    assert report["passed"] == (not failed)
    return [row["name"] for row in failed], {row["position"] for row in failed}


def test_the_golden_folder_passes_every_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "CHUNK_SIZES", (127, 128, 129, 300, 1000))
    assert entry.main(["verify", str(GOLDEN), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in report["rows"]] == [
        "prefill, one piece",
        *(f"streams after layer {layer}" for layer in range(5)),
        *(f"prefill, chunks of {size}" for size in (127, 128, 129)),
        "decode, token by token",
        "MTP, one piece",
        "MTP, chunks of 64",
    ]
    assert all(0 < row["difference"] <= 5e-5 for row in report["rows"])
    assert report["tolerance"] == 5e-5


def test_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(folder)]) == 0
    printed = capsys.readouterr()
    assert "all 10 rows are within 5e-05" in printed.out
    assert "decode, token by token" in printed.out
    assert printed.err == "", "the progress bar belongs to terminals"


def test_a_corrupted_weight_is_traced_to_its_layer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(folder / "model.safetensors", scaled("layers.3.attn.kv_norm.weight", 1.02))
    assert verify.main([str(folder)]) == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert " of 10 rows exceed 5e-05: prefill, one piece, streams after layer 3, streams after layer 4" in verdict


@pytest.mark.parametrize(
    ("weight", "rows"),
    [
        ("head.weight", {"prefill", "decode", "MTP"}),
        ("norm.weight", {"prefill", "decode"}),
        ("mtp.0.attn.attn_sink", {"MTP"}),
        ("layers.4.ffn.shared_experts.w2.weight", {"prefill", "decode", "MTP", "streams"}),
    ],
)
def test_every_part_is_watched(folder: Path, capsys: pytest.CaptureFixture[str], weight: str, rows: set[str]) -> None:
    rewrite(folder / "model.safetensors", scaled(weight, 1.05))
    names, _ = report_of(folder, capsys)
    assert {name.replace(",", " ").split()[0] for name in names} == rows


def test_wrong_numbers_are_found_where_they_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["logits_decode"][0, 20, 5] += 1e-3
        tensors["mtp_logits"][0, 30, 5] -= 1e-3
        tensors["streams_after_layer_2"][5, 3, 7] += 1e-3

    rewrite(folder / "io.safetensors", change)
    names, positions = report_of(folder, capsys)
    assert names == ["streams after layer 2", "decode, token by token", "MTP, one piece", "MTP, chunks of 64"]
    assert positions == {35, 320, 30}


def test_a_stored_nan_never_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["logits_prefill"][0, 3, 7] = float("nan")

    rewrite(folder / "io.safetensors", change)
    assert verify.main([str(folder), "tolerance=1e30", "--json"]) == 1
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"] if not row["passed"]}
    assert list(rows) == ["prefill, one piece", "prefill, chunks of 100"]
    assert rows["prefill, one piece"] == {
        "name": "prefill, one piece", "difference": None, "position": 3, "excused": 0, "passed": False
    }  # fmt: skip


def test_the_tolerance_decides(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(folder), "tolerance=1e-9"]) == 1
    assert "10 of 10 rows exceed 1e-09" in capsys.readouterr().out


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "no numbers": (lambda folder: (folder / "io.safetensors").unlink(), "io.safetensors"),
    "cut short": (truncate, "cut short"),
    "not safetensors": (lambda folder: (folder / "io.safetensors").write_bytes(b"no"), "io.safetensors"),
    "weight missing": (
        lambda folder: rewrite(folder / "model.safetensors", lambda tensors: tensors.__delitem__("norm.weight")),
        "norm.weight",
    ),
    "weight not finite": (
        lambda folder: rewrite(folder / "model.safetensors", scaled("norm.weight", float("nan"))),
        "norm.weight",
    ),
    "tensor missing": (
        lambda folder: rewrite(folder / "io.safetensors", lambda tensors: tensors.__delitem__("mtp_logits")),
        "mtp_logits",
    ),
    "wrong shape": (
        lambda folder: rewrite(
            folder / "io.safetensors", lambda tensors: tensors.update(logits_decode=torch.zeros(1, 39, 256))
        ),
        "logits_decode",
    ),
    "uneven streams": (
        lambda folder: rewrite(
            folder / "io.safetensors", lambda tensors: tensors.update(streams_after_layer_0=torch.zeros(44, 4, 128))
        ),
        "44",
    ),
    "no prompt length": (
        lambda folder: rewrite(folder / "io.safetensors", lambda tensors: None, {"mode": "exact"}),
        "prefill",
    ),
    "unknown mode": (
        lambda folder: rewrite(folder / "io.safetensors", lambda tensors: None, {"prefill": "300", "mode": "fast"}),
        "'fast'",
    ),
    "prompt longer than the tokens": (
        lambda folder: rewrite(folder / "io.safetensors", lambda tensors: None, {"prefill": "340"}),
        "340",
    ),
    "foreign tokens": (
        lambda folder: rewrite(folder / "io.safetensors", lambda tensors: tensors["tokens"].add_(100)),
        "vocabulary",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_unusable_folders(folder: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    break_it, named = DAMAGES[damage]
    break_it(folder)
    assert entry.main(["verify", str(folder)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, "one line"
    assert printed.err.startswith("leadline verify: ")
    assert named in printed.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "expected one folder, got none"),
        (["a", "b"], "expected one folder, got a b"),
        (["nowhere"], "nowhere: no such folder"),
        ([str(GOLDEN), "tolerence=1"], "did you mean 'tolerance'"),
        ([str(GOLDEN), "tolerance=small"], "tolerance=small"),
        ([str(GOLDEN), "tolerance=-1"], "not negative"),
        ([str(GOLDEN), "tolerance=nan"], "not negative"),
        ([str(GOLDEN), "--quiet"], "--quiet"),
    ],
)
def test_unusable_requests(capsys: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
    assert verify.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert named in printed.err


# -- served --


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(SERVED, tmp_path / "golden"))


def test_the_served_golden_folder_passes_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    """Far below the tolerance of 2e-2: nearly all tokens are equal in every bit."""
    assert entry.main(["verify", str(SERVED), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["mode"], report["tolerance"]) == ("served", 2e-2)
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [*(f"layer {n}" for n in range(5)), "logits of the last streams", "MTP block"]
    assert all(row["excused"] <= 2 for row in rows.values())
    assert all(rows[f"layer {n}"]["difference"] < 1e-2 for n in range(5))
    assert rows["logits of the last streams"]["difference"] < 1e-6


def test_served_rows_say_how_many_tokens_are_excused(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(SERVED)]) == 0
    printed = capsys.readouterr().out
    assert "excused" in printed
    assert "all 7 rows are within 0.02" in printed


@pytest.mark.parametrize(
    ("weight", "rows"),
    [
        ("layers.2.attn.kv_norm.weight", ["layer 2"]),
        ("layers.4.ffn_norm.weight", ["layer 4"]),
        ("head.weight", ["logits of the last streams", "MTP block"]),
        ("mtp.0.enorm.weight", ["MTP block"]),
    ],
)
def test_a_served_layer_is_watched_by_itself(
    served: Path, capsys: pytest.CaptureFixture[str], weight: str, rows: list[str]
) -> None:
    rewrite(served / "model.safetensors", scaled(weight, 1.2))
    assert report_of(served, capsys)[0] == rows


def test_three_wrong_tokens_in_two_hundred_are_too_many(served: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, failed in ((2, []), (3, ["layer 3"])):

        def change(tensors: dict[str, Tensor], wrong: int = wrong) -> None:
            tensors["streams_after_layer_3"][50 : 50 + wrong] *= 1.5

        shutil.copyfile(SERVED / "io.safetensors", served / "io.safetensors")
        rewrite(served / "io.safetensors", change)
        # The tokens are inputs of layer 4 as well; there they do not count.
        names = [name for name in report_of(served, capsys)[0] if name != "layer 4"]
        assert names == failed


def test_a_stored_nan_in_a_served_row_never_passes(served: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["streams_after_layer_4"][7, 0, 3] = float("nan")

    rewrite(served / "io.safetensors", change)
    assert verify.main([str(served), "tolerance=1e30", "--json"]) == 1
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"] if not row["passed"]}
    assert (rows["layer 4"]["difference"], rows["layer 4"]["position"]) == (None, 7)


def test_help_names_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["verify", "--help"]) == 0
    assert "exit status" in capsys.readouterr().out
