"""The README: generated parts match the tree, every path exists, and every row of the fidelity table has a test."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "readme.py"
DOCUMENTS = ("README.md", "DESIGN.md", "CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md")


@pytest.fixture
def tool():
    return runpy.run_path(str(TOOL))


def section(name: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf8")
    return text.split(f"\n## {name}\n")[1].split("\n## ")[0]


def test_generated_parts_are_up_to_date():
    done = subprocess.run([sys.executable, str(TOOL), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_exists(document):
    text = (ROOT / document).read_text(encoding="utf8")
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    quoted = re.findall(r"`((?:leadline|tests|tools|docs|benchmarks)/[\w./-]+)`", text)
    missing = [path for path in {*linked, *quoted} if not (ROOT / path).exists()]
    assert not missing


def test_every_row_of_the_fidelity_table_has_a_file_and_a_test():
    rows = [line.split("|")[1:-1] for line in section("Fidelity").splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    for _, files, tests, status in rows[1:]:
        assert re.search(r"`leadline/[\w./]+`", files)
        assert re.search(r"`tests/[\w./]+`", tests)
        assert status.strip()


def test_reading_order_is_twelve_files():
    assert len(re.findall(r"^\d+\. \[`leadline/", section("Reading order"), re.MULTILINE)) == 12


def test_agent_notes_are_short():
    assert len((ROOT / "AGENTS.md").read_text(encoding="utf8").splitlines()) <= 60


# -- the generator -----------------------------------------------------------------------------------------------


def source(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text, encoding="utf8")


def result(**changes) -> str:
    row = {
        "benchmark": "prefill",
        "title": "Prefill",
        "command": "python benchmarks/prefill.py",
        "machine": "2 cores",
        "time": "2026-01-01T00:00:00Z",
        "commit": "0123456789abcdef",
        "versions": {"torch": "2.13.0"},
        "row": {"tokens": 8192, "memory": "12 MB"},
    }
    return json.dumps(row | changes) + "\n"


def test_file_map_has_the_first_sentence_of_every_file(tool, tmp_path):
    source(tmp_path, "leadline/__init__.py", '"""The package."""\n')
    source(tmp_path, "leadline/cli.py", '"""Command\nline: words. More words.\n\nAn essay.\n"""\n')
    source(tmp_path, "leadline/ops/__init__.py", '"""Operations (report 2.3): meaning."""\n')
    source(tmp_path, "leadline/ops/rope.py", '"""Rotation"""\n')
    assert tool["file_map"](tmp_path).splitlines() == [
        "- **[`leadline/`](leadline)** The package.",
        "  - [`cli.py`](leadline/cli.py) Command line: words.",
        "  - **[`ops/`](leadline/ops)** Operations (report 2.3): meaning.",
        "    - [`rope.py`](leadline/ops/rope.py) Rotation",
    ]


def test_file_without_a_docstring_is_named(tool, tmp_path):
    source(tmp_path, "leadline/bare.py", "x = 1\n")
    with pytest.raises(ValueError, match=r"bare\.py: has no docstring"):
        tool["file_map"](tmp_path)


def test_results_show_the_latest_run_of_each_machine(tool, tmp_path):
    old, new = result(), result(time="2026-02-01T00:00:00Z", row={"tokens": 8192, "memory": "9 MB"})
    second = result(time="2026-02-01T00:00:00Z", row={"tokens": 32768, "memory": "10 MB"})
    source(tmp_path, "benchmarks/results/small/prefill.jsonl", old + new + second)
    source(tmp_path, "benchmarks/results/large/prefill.jsonl", result(machine="8 cores"))
    text = tool["result_tables"](tmp_path)
    assert "| 8192 | 9 MB |\n| 32768 | 10 MB |" in text
    assert text.count("12 MB") == 1
    assert "`python benchmarks/prefill.py` on 2 cores, 2026-02-01, commit 012345678; torch 2.13.0." in text


def test_long_tables_are_folded(tool, tmp_path):
    rows = [result(row={"tokens": 2**number}) for number in range(tool["LONGEST_TABLE"] + 1)]
    source(tmp_path, "benchmarks/results/small/prefill.jsonl", "".join(rows))
    assert "<summary><b>Prefill</b> (21 rows)</summary>\n\n| tokens |" in tool["result_tables"](tmp_path)
    source(tmp_path, "benchmarks/results/small/prefill.jsonl", "".join(rows[1:]))
    assert tool["result_tables"](tmp_path).startswith("**Prefill**\n\n| tokens |")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{broken\n", r"prefill\.jsonl:1: not valid JSON"),
        (result() + "[]\n", r"prefill\.jsonl:2: a result row needs the keys"),
        ('{"benchmark": "x"}\n', r"prefill\.jsonl:1: a result row needs the keys"),
    ],
)
def test_broken_results_are_named(tool, tmp_path, text, message):
    source(tmp_path, "benchmarks/results/small/prefill.jsonl", text)
    with pytest.raises(ValueError, match=message):
        tool["result_tables"](tmp_path)


def test_generation_is_stable_and_needs_its_markers(tool, tmp_path):
    source(tmp_path, "leadline/__init__.py", '"""The package."""\n')
    parts = [f"<!-- generated: {name} -->\nold\n<!-- end: {name} -->\n" for name in ("files", "results")]
    once = tool["generated"]("before\n" + "between\n".join(parts) + "after\n", tmp_path)
    assert "old" not in once
    assert all(word in once for word in ("before", "between", "after", "The package.", "No measurement"))
    assert tool["generated"](once, tmp_path) == once
    with pytest.raises(ValueError, match="exactly one '<!-- generated: results -->'"):
        tool["generated"](parts[0], tmp_path)
