"""The bundle: nothing breaks out of a section, and what did not change stays where it was."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leadline.data.bundle import Bundle, BundleError, File, Limits, bundle, lay_out, spelled

NAMES = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=8)
TEXTS = st.text(st.sampled_from("ab`~ \n#\r\\\u2028"), max_size=60)


def sections_of(text: str) -> list[tuple[str, str]]:
    """Read a bundle as its reader would, line by line: (header, content) behind each fence."""
    found: list[tuple[str, str]] = []
    header, fence, content = "", "", ""
    for line in re.findall(r"[^\n]*\n", text):
        if not fence:
            opens = re.fullmatch(r"(`{3,})\n", line)
            fence, content = (opens[1], "") if opens else ("", "")
            header = line[3:-1] if line.startswith("## ") else header
        elif re.fullmatch(rf" {{0,3}}`{{{len(fence)},}}\s*", line):
            found.append((header, content))
            fence = ""
        else:
            content += line
    assert not fence
    return found


@settings(max_examples=150)
@given(files=st.lists(st.tuples(NAMES, TEXTS), min_size=1, max_size=4))
def test_no_file_breaks_out_of_its_section(files: list[tuple[str, str]]) -> None:
    found = sections_of(lay_out([File(name, text) for name, text in files]).text)
    assert len(found) == 1 + len(files)
    for (header, content), (name, text) in zip(found[1:], files, strict=True):
        assert header == spelled(name)
        assert content == text or content == f"{text}\n"


@given(name=NAMES)
def test_a_spelled_name_is_one_line_and_names_no_other_file(name: str) -> None:
    line = spelled(name)
    assert line.isprintable()
    assert (line == name) != line.startswith('"')
    line.encode()


def test_the_layout() -> None:
    found = lay_out(
        [
            File("README.md", "# Title\n"),
            File("img/logo.png", None, "binary"),
            File("img/icons/a.svg", "<svg/>"),
            File("src/a\nb.py", "```\nx\n```\n", "1 faults of encoding replaced by ?"),
            File("z", ""),
        ]
    )
    assert found.text == (
        "The files below are given, each under its path.\n\n"
        "```\nREADME.md\nimg/\n  logo.png (left out: binary)\n  icons/\n    a.svg\nsrc/\n"
        '  "a\\nb.py"\nz\n```\n\n'
        "## README.md\n\n```\n# Title\n```\n\n"
        "## img/icons/a.svg\n\n```\n<svg/>\n```\n\n"
        '## "src/a\\nb.py"\n\n(1 faults of encoding replaced by ?)\n\n````\n```\nx\n```\n````\n\n'
        "## z\n\n```\n```\n\n"
    )
    assert found.left_out == [("img/logo.png", "binary")]


def test_a_folder_that_is_left_out_takes_one_line() -> None:
    names = ("a/cache/x", "a/cache/y/z", "a/mixed/x", "a/mixed/y", "a/text", "b/only/x")
    reasons = ("binary", "binary", "binary", "too large", None, "binary")
    found = lay_out([File(n, None if r else "text", r) for n, r in zip(names, reasons, strict=True)])
    assert sections_of(found.tree)[0][1].splitlines() == [
        "a/",
        "  cache/ (left out: binary)",
        "  mixed/",
        "    x (left out: binary)",
        "    y (left out: too large)",
        "  text",
        "b/ (left out: binary)",
    ]
    assert [name for name, _ in found.left_out] == ["a/cache/x", "a/cache/y/z", "a/mixed/x", "a/mixed/y", "b/only/x"]


def hostile(folder: Path) -> Path:
    for name, content in {
        "a.txt": b"alpha\n",
        "b\nc": b"beta",
        "data.bin": b"\0\1",
        "empty": b"",
        "latin.txt": "long enough a text for one fault: é".encode("latin-1"),
        "sub/.gitignore": b"*.log\n",
        "sub/run.log": b"noise",
        "sub/z.py": b"print('z')\n",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / os.fsdecode(b"bad\xffname")).write_bytes(b"gamma")
    (folder / "large").write_bytes(b"x" * 5000)
    (folder / "sub" / "loop").symlink_to(folder)
    return folder


def small(folder: Path) -> Bundle:
    return bundle([folder], limits=Limits(file_bytes=1000))


def test_a_hostile_folder(tmp_path: Path) -> None:
    found = small(hostile(tmp_path))
    assert [section.name for section in found.sections] == [
        *("a.txt", "b\nc", os.fsdecode(b"bad\xffname"), "empty", "latin.txt", "sub/.gitignore", "sub/z.py"),
    ]
    assert found.left_out == [("data.bin", "binary"), ("large", "too large"), ("sub/loop", "link, not followed")]
    assert '"bad\\udcffname"' in found.text
    found.text.encode()


def test_equal_files_give_an_equal_text_wherever_they_lie(tmp_path: Path) -> None:
    one, other = (hostile(tmp_path / name) for name in ("one", "other"))
    os.utime(other / "a.txt", (1, 1))
    assert small(one) == small(other)


def test_a_change_leaves_everything_before_it_as_it_was(tmp_path: Path) -> None:
    folder = hostile(tmp_path)
    before = small(folder)
    (folder / "sub" / "z.py").write_text("changed and longer\n" * 9)
    after = small(folder)
    assert after.pieces[:-1] == before.pieces[:-1]
    assert after.pieces[-1] != before.pieces[-1]


def test_too_much_text_names_the_largest(tmp_path: Path) -> None:
    for name, size in (("a", 10), ("b", 500), ("c", 495)):
        (tmp_path / name).write_text("x" * size)
    assert len(bundle([tmp_path], limits=Limits(total_bytes=1005)).sections) == 3
    with pytest.raises(
        BundleError, match=r"more than 1,004 bytes of text, the largest so far are b \(500\), c \(495\)"
    ):
        bundle([tmp_path], limits=Limits(total_bytes=1004))


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nothing to read \(no files\)"):
        bundle([tmp_path])
    (tmp_path / "a").write_bytes(b"\0")
    with pytest.raises(BundleError, match=r"nothing to read \(binary\)"):
        bundle([tmp_path])


def test_progress_counts_every_file(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    bundle([hostile(tmp_path)], progress=lambda done, total: calls.append((done, total)))
    assert calls == [(number, 10) for number in range(1, 11)]
