"""`leadline pack`: the prompt on one stream, what it costs on the other."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from leadline.__main__ import main
from leadline.data.bundle import File, bundle, lay_out
from leadline.model.accounting import kv_cache_bytes
from leadline.model.config import FLASH, PRO, TINY
from leadline.recipes import pack
from leadline.recipes.plan import size
from leadline.text.tokenizer import Tokenizer

WORDS = "def add(first, second):\n    return first + second\n\n# 123 sums, and 中文\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    Tokenizer.train([WORDS], 400).save(folder)
    (folder / "config.json").write_text(TINY.to_json())
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    for name, content in {"src/a.py": WORDS, "src/b.py": WORDS * 20, "README": "Read me.", "logo.png": "\0"}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_the_prompt_goes_out_and_the_page_beside_it(project: Path, checkpoint: Path, capfd) -> None:
    assert main(["pack", str(project), f"checkpoint={checkpoint}"]) == 0
    out, page = capfd.readouterr()
    packed = bundle([project])
    assert out == packed.text
    tokens = len(Tokenizer.load(checkpoint).encode(out))
    assert f"3 files, {size(len(out.encode()))}, {tokens:,} tokens\n" in page
    assert "Left out: logo.png (binary)." in page
    for name, config in {"DeepSeek-V4-Flash": FLASH, "DeepSeek-V4-Pro": PRO, "this checkpoint": TINY}.items():
        assert re.search(rf"{name} +{re.escape(size(kv_cache_bytes(config, tokens)))} ", page)
    assert "DeepSeek-V3.2" in page
    assert max(map(len, page.splitlines())) <= 80


def test_tokens_of_the_pieces_add_up_to_those_of_the_whole(checkpoint: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    files = [
        File(f"f{n}", text) for n, text in enumerate(("", "\n\n", "x", "``` ", "#", "\r\n", " ", "123", "`\n\n\n"))
    ]
    packed = lay_out(files)
    counted = pack.count(packed, tokenizer, Console(file=io.StringIO()))
    assert sum(counted) == len(tokenizer.encode(packed.text))
    assert len(counted) == 1 + len(files)


def test_a_late_change_keeps_the_tokens_before_it(project: Path, checkpoint: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    packed = bundle([project])
    before = tokenizer.encode(packed.text)
    (project / "src" / "b.py").write_text("all new")
    after = tokenizer.encode(bundle([project]).text)
    shared = next(n for n, (old, new) in enumerate(zip(before, after, strict=False)) if old != new)
    unchanged = sum(pack.count(packed, tokenizer, Console(file=io.StringIO()))[:-1])
    assert unchanged <= shared < len(after)


def test_without_a_tokenizer_the_count_is_called_an_estimate(project: Path, capfd) -> None:
    assert main(["pack", str(project)]) == 0
    out, page = capfd.readouterr()
    tokens = int(re.search(r"about ([\d,]+) tokens", page)[1].replace(",", ""))  # pyright: ignore[reportOptionalSubscript]
    assert len(out.encode()) / 4 <= tokens <= len(out.encode()) / 4 + 4
    assert "Counted as 4 bytes each" in page


def test_the_file_in_writing_is_no_part_of_itself(project: Path, capfd) -> None:
    out = project / "prompt.txt"
    for _ in range(2):
        assert main(["pack", str(project), f"out={out}"]) == 0
        assert capfd.readouterr().out == ""
        assert "prompt.txt" not in out.read_text()
    command = [sys.executable, "-m", "leadline", "pack", str(project)]
    with (project / "stdout.txt").open("wb") as file:
        subprocess.run([*command, "exclude=prompt.txt"], stdout=file, stderr=subprocess.DEVNULL, check=True)
    assert (project / "stdout.txt").read_text() == out.read_text()


def test_a_file_may_have_an_equals_sign_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").write_text("sum")
    assert main(["pack", "a=b"]) == 0
    assert "## a=b" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a folder or files to pack, found none"),
        (["nowhere"], "nowhere: no such file or folder"),
        (["{project}", "exlude=x"], "unknown key 'exlude': did you mean 'exclude'?"),
        (["{project}", "exclude=!"], "exclude: '!' is no pattern"),
        (["{project}", "total_bytes=100"], "more than 100 bytes of text"),
        (["{project}", "file_bytes=1"], "nothing to read (binary, too large)"),
        (["{project}", "tokenizer={project}"], "tokenizer.json: no such file"),
        (["{project}", "--with"], "'--with' is not understood"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(arguments: list[str], message: str, project: Path, capfd) -> None:
    assert main(["pack", *(word.format(project=project) for word in arguments)]) == 1
    out, error = capfd.readouterr()
    assert out == ""
    assert message in error
    assert error.count("\n") == 1


def test_show(capsys) -> None:
    assert main(["pack", "exclude=a,b", "--show"]) == 0
    assert "exclude = ('a', 'b')" in capsys.readouterr().out
