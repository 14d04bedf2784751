"""Gathering: git's rules, a stable order, and nothing outside of what was named."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from leadline.data.gather import GatherError, gather, identity


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """tree(name=content, ...): a folder with these files."""

    def make(files: dict[str, str]) -> Path:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path

    return make


def names(*paths: Path, exclude: tuple[str, ...] = ()) -> list[str]:
    return [each.name for each in gather(paths, exclude) if each.left_out is None]


def test_order_is_that_of_the_paths_whatever_the_order_of_creation(tmp_path: Path) -> None:
    wanted = ["A", "a/b", "a/c/d", "a.b", "a0", "b", "é"]
    for name in random.sample(wanted, len(wanted)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert names(tmp_path) == wanted


def test_ignore_files_hold_below_their_folder_and_the_deepest_decides(tree: Callable[..., Path]) -> None:
    root = tree(
        {
            ".gitignore": "*.log\n/only_here\nbuild/\n# a comment\n\n!\n",
            "a.log": "",
            "only_here": "",
            "sub/only_here": "",
            "build/out": "",
            "sub/build/out": "",
            "sub/.gitignore": "!kept.log\r\n*.tmp\r\n",
            "sub/kept.log": "",
            "sub/b.log": "",
            "sub/x.tmp": "",
            "x.tmp": "",
            "deep/.gitignore": "*\n!*/\n!*.py\n",
            "deep/er/a.py": "",
            "deep/er/a.txt": "",
        }
    )
    kept = [name for name in names(root) if not name.endswith(".gitignore")]
    assert kept == ["deep/er/a.py", "sub/kept.log", "sub/only_here", "x.tmp"]


def test_rules_of_the_repository_around_a_folder_hold_in_it(tree: Callable[..., Path]) -> None:
    root = tree(
        {".gitignore": "*.log\n", "repo/.gitignore": "*.tmp\nout/\n", "repo/sub/a.tmp": "", "repo/sub/b.log": ""}
    )
    tree({"repo/sub/c": "", "repo/out/d": "", "repo/.git/config": ""})
    assert names(root / "repo" / "sub") == ["b.log", "c"]  # the rules outside of the repository are not its rules
    assert names(root / "repo" / "out") == ["d"]  # named outright
    assert names(root / "repo" / "sub" / "a.tmp") == ["a.tmp"]


def test_repository_data_and_excluded_names_stay_out(tree: Callable[..., Path]) -> None:
    root = tree(
        {".git/HEAD": "", "sub/.git": "gitdir: elsewhere", "a.lock": "", "sub/a.lock": "", "sub/a.py": "", ".x": ""}
    )
    assert names(root, exclude=("*.lock",)) == [".x", "sub/a.py"]
    assert names(root, exclude=("/sub", "!sub")) == [".x", "a.lock", "sub/a.lock", "sub/a.py"]
    with pytest.raises(GatherError, match=r"exclude: .*'!'"):
        gather([root], ["!"])


def test_links_are_listed_and_not_followed(tree: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tree({"a/file": "", "secret": ""})
    outside = tmp_path_factory.mktemp("outside")
    (outside / "private").touch()
    for link, target in {
        "a/loop": root,
        "a/out": outside,
        "a/private": outside / "private",
        "a/gone": root / "no",
    }.items():
        (root / link).symlink_to(target)
    found = {each.name: each.left_out for each in gather([root])}
    assert found == {
        "a/file": None,
        "a/gone": "link, not followed",
        "a/loop": "link, not followed",
        "a/out": "link, not followed",
        "a/private": "link, not followed",
        "secret": None,
    }
    assert names(root / "a" / "out") == ["private"]  # named outright


def test_a_link_in_place_of_an_ignore_file_rules_nothing(tree: Callable[..., Path]) -> None:
    root = tree({"rules": "*\n", "sub/a": ""})
    (root / "sub" / ".gitignore").symlink_to(root / "rules")
    assert names(root / "sub") == ["a"]


def test_what_is_no_file_is_listed_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "socket"))
        found = {each.name: each.left_out for each in gather([tmp_path])}
    assert found == {"pipe": "not a regular file", "socket": "not a regular file"}


def test_a_folder_that_cannot_be_read_is_listed(tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree({"a/x": "", "b/x": ""})
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [(each.name, each.left_out) for each in gather([root])] == [
        ("a", "cannot be read: Permission denied"),
        ("b/x", None),
    ]


def test_several_paths_share_their_common_folder_and_each_file_comes_once(tree: Callable[..., Path]) -> None:
    root = tree({"p/a/x": "", "p/b/x": "", "p/b/y": "", ".gitignore": "y\n"})
    assert names(root / "p" / "b", root / "p" / "a") == ["a/x", "b/x", "b/y"]
    assert names(root / "p", root / "p" / "b" / "x", root / "p" / "a") == ["a/x", "b/x", "b/y"]
    assert names(root / "p" / "b" / "x") == ["x"]
    assert gather([]) == []


def test_the_file_in_writing_is_left_out(tree: Callable[..., Path]) -> None:
    root = tree({"a": "", "out": ""})
    out = identity(root / "out")
    assert out is not None
    assert [each.name for each in gather([root], not_these=frozenset({out}))] == ["a"]
    assert identity(root / "none") is None


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(GatherError, match="none: no such file or folder"):
        gather([tmp_path, tmp_path / "none"])
