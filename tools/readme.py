"""Generated parts of README.md: the file map, and the tables of measured results.

usage: python tools/readme.py           rewrite the generated parts
       python tools/readme.py --check   exit 1 when README.md differs from what would be written

The file map has one line per source file: the first sentence of the file's docstring. The result tables come from
`benchmarks/results/<machine>/*.jsonl`, one JSON object per table row:

  benchmark  name of the benchmark; rows with the same name form one table
  title      heading of the table
  command    command that measures it again
  machine    processor or card, in words
  time       start of the run in ISO 8601, the same for all rows of one run; per machine the latest run is shown, or,
             for benchmarks in CASES, the latest row of each case
  commit     revision that was measured
  versions   {"torch": "2.13.0", ...}
  row        {"column heading": value, ...}, values as they shall be printed

Each part lies between `<!-- generated: NAME -->` and `<!-- end: NAME -->`; everything else is written by hand.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = ("leadline", "benchmarks", "tools")
# Benchmarks that can be run in part: the columns that tell their cases apart.
CASES = {
    "ops": ("op", "shape", "direction"),
    "engine": ("what", "context"),
    "engine_cpu": ("what",),
    "engine_peer": ("work", "context"),
    "layer_h100": ("layer", "work", "tokens"),
    "v32_model": ("attention of", "sequences", "context"),
}
# Stored, but too many rows for a page; another table sums them up.
STORED_ONLY = {"v32_layer"}
LONGEST_TABLE = 20  # rows; a longer one is folded away behind its title
RESULT_KEYS = {"benchmark", "title", "command", "machine", "time", "commit", "versions", "row"}


class ReadmeError(ValueError):
    """A source file or a result row that the README cannot be made from."""


def first_sentence(path: Path) -> str:
    """The first sentence of a source file's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf8")))
    if not docstring:
        raise ReadmeError(f"{path}: has no docstring; its first sentence is the file's line in the README")
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0]


def file_map(root: Path) -> str:
    """A nested list: every folder with the docstring of its `__init__.py`, every other source file with its own."""
    lines: list[str] = []
    for folder in SOURCE_FOLDERS:
        if (root / folder).is_dir():
            lines += _folder_lines(root, root / folder, depth=0)
    return "\n".join(lines)


def _folder_lines(root: Path, folder: Path, depth: int) -> Iterator[str]:
    sources = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    package = folder / "__init__.py"
    subfolders = sorted(path.parent for path in folder.glob("*/__init__.py"))
    sentence = f" {first_sentence(package)}" if package.exists() else ""
    yield f"{'  ' * depth}- **[`{folder.name}/`]({folder.relative_to(root)})**{sentence}"
    for path in sources:
        yield f"{'  ' * (depth + 1)}- [`{path.name}`]({path.relative_to(root)}) {first_sentence(path)}"
    for subfolder in subfolders:
        yield from _folder_lines(root, subfolder, depth + 1)


def result_tables(root: Path) -> str:
    """One table per benchmark and machine, from the latest run stored, or from the latest row of each case."""
    tables: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted((root / "benchmarks" / "results").glob("**/*.jsonl")):
        for row in _rows(path):
            if row["benchmark"] in STORED_ONLY:
                continue
            tables.setdefault((row["benchmark"], row["machine"]), []).append(row)
    if not tables:
        return "No measurement is stored."
    return "\n\n".join(_table(_shown(rows)) for _, rows in sorted(tables.items()))


def _shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    columns = CASES.get(rows[0]["benchmark"])
    if columns is None:
        latest = max(row["time"] for row in rows)
        return [row for row in rows if row["time"] == latest]
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["time"]):
        cases[tuple(row["row"][column] for column in columns)] = row
    return sorted(cases.values(), key=lambda row: row["row"][columns[0]])


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ReadmeError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(row, dict) or not row.keys() >= RESULT_KEYS:
            raise ReadmeError(f"{path}:{number}: a result row needs the keys {', '.join(sorted(RESULT_KEYS))}")
        yield row


def _table(rows: list[dict[str, Any]]) -> str:
    run, columns = rows[0], list(rows[0]["row"])
    body = [[str(row["row"].get(column, "")) for column in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *body]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    dates, commits = (sorted({row[key][:length] for row in rows}) for key, length in (("time", 10), ("commit", 9)))
    what = f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    caption = f"`{run['command']}` on {run['machine']}, {' and '.join(dates)}, {what}; {versions}."
    table = ["", *(f"| {' | '.join(cells)} |" for cells in lines), "", caption]
    if len(body) <= LONGEST_TABLE:
        return "\n".join([f"**{run['title']}**", *table])
    summary = f"<summary><b>{run['title']}</b> ({len(body)} rows)</summary>"
    return "\n".join(["<details>", summary, *table, "", "</details>"])


def generated(readme: str, root: Path) -> str:
    """README text with every generated part replaced."""
    for name, text in (("files", file_map(root)), ("results", result_tables(root))):
        begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        if readme.count(begin) != 1 or readme.count(end) != 1:
            raise ReadmeError(f"README.md needs exactly one '{begin}' and one '{end}'")
        before, rest = readme.split(begin)
        _, after = rest.split(end)
        readme = f"{before}{begin}\n{text}\n{end}{after}"
    return readme


def main(arguments: list[str]) -> int:
    """Write or check README.md; returns the exit code."""
    path = ROOT / "README.md"
    found = path.read_text(encoding="utf8")
    wanted = generated(found, ROOT)
    if "--check" not in arguments:
        path.write_text(wanted, encoding="utf8")
        return 0
    if found == wanted:
        return 0
    missing = [line for line in wanted.splitlines() if line not in found.splitlines()]
    stale = [line for line in found.splitlines() if line not in wanted.splitlines()]
    print("README.md is out of date; run: python tools/readme.py", file=sys.stderr)
    print(
        "\n".join([*(f"  missing: {line}" for line in missing), *(f"  stale:   {line}" for line in stale)]),
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
