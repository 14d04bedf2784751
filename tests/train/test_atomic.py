from __future__ import annotations

from pathlib import Path

import pytest

from leadline.train.atomic import replacing, write_text


def test_a_text_replaces_the_one_before(tmp_path: Path):
    path = tmp_path / "file"
    write_text(path, "old")
    write_text(path, "néw")
    assert path.read_bytes() == "néw".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "file"
    write_text(path, "old")

    def write_half() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
