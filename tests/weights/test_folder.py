"""A folder appears whole or not at all, and nothing foreign is ever deleted."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from leadline.weights import folder as folder_module
from leadline.weights.folder import new_folder


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def checkpoint(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_text(text)
    return folder


def test_new_folder_appears_with_missing_parents(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with new_folder(target) as temporary:
        (temporary / "config.json").write_text("new")
        assert not target.exists()
    assert contents(target) == {"config.json": "new"}
    assert [entry.name for entry in target.parent.iterdir()] == ["b"]


def test_new_folder_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    with new_folder(tmp_path / "new"):
        pass
    assert stat.S_IMODE(os.stat(tmp_path / "new").st_mode) == stat.S_IMODE(os.stat(tmp_path / "ordinary").st_mode)


def test_old_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    target = checkpoint(tmp_path / "model", "old")
    with new_folder(target) as temporary:
        (temporary / "config.json").write_text("new")
        assert contents(target)["config.json"] == "old"
    assert contents(target) == {"config.json": "new"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_leaves_the_old_one_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    target = checkpoint(tmp_path / "model", "old")

    def fill_and_fail() -> None:
        with new_folder(target) as temporary:
            (temporary / "config.json").write_text("new")
            raise error

    with pytest.raises(error):
        fill_and_fail()
    assert contents(target) == {"config.json": "old", "model.safetensors": "old"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_failed_swap_brings_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = checkpoint(tmp_path / "model", "old")
    rename = Path.rename

    def failing(self: Path, other: Path) -> Path:
        if ".new-" in self.name:
            raise OSError("disk on fire")
        return rename(self, other)

    monkeypatch.setattr(folder_module.Path, "rename", failing)
    with pytest.raises(OSError, match="disk on fire"), new_folder(target) as temporary:
        (temporary / "config.json").write_text("new")
    assert contents(target)["config.json"] == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["thesis.tex", ".git", "optimizer.pt"])
def test_foreign_files_are_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    target = checkpoint(tmp_path / "model", "old")
    (target / name).write_text("precious")
    with pytest.raises(FileExistsError, match=name.replace(".", r"\.")), new_folder(target):
        pytest.fail("the block must not run")
    assert contents(target)[name] == "precious"


def test_foreign_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = checkpoint(tmp_path / "model", "old")
    with pytest.raises(FileExistsError), new_folder(target):
        (target / "notes.txt").write_text("precious")
    assert contents(target)["notes.txt"] == "precious"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_subfolders_are_foreign(tmp_path: Path) -> None:
    target = checkpoint(tmp_path / "model", "old")
    (target / "tokenizer.json").mkdir()
    with pytest.raises(FileExistsError, match=r"tokenizer\.json"), new_folder(target):
        pytest.fail("the block must not run")


def test_own_patterns(tmp_path: Path) -> None:
    target = tmp_path / "run"
    for text in ("one", "two"):
        with new_folder(target, replaceable=["state-*.pt"]) as temporary:
            (temporary / "state-1.pt").write_text(text)
    assert contents(target) == {"state-1.pt": "two"}


def test_target_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(FileExistsError, match="is a file"), new_folder(tmp_path / "model"):
        pytest.fail("the block must not run")


def test_link_to_a_folder_keeps_pointing_at_it(tmp_path: Path) -> None:
    real = checkpoint(tmp_path / "disk" / "model", "old")
    link = tmp_path / "latest"
    link.symlink_to(real)
    with new_folder(link) as temporary:
        (temporary / "config.json").write_text("new")
    assert link.is_symlink()
    assert contents(real) == {"config.json": "new"}
