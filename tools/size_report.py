"""Size report: the longest files, functions and parameter lists of the library, for the reader to judge.

usage: python tools/size_report.py [FOLDER ...]

A habit to keep in view and not a gate: the exit code is always 0.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

LONGEST = 5
IMPLICIT = ("self", "cls")


@dataclass(frozen=True)
class Function:
    """One function or method: where it starts, how many lines it has, how many parameters it takes."""

    place: str
    lines: int
    parameters: int


def functions_of(path: Path, tree: ast.Module) -> Iterator[Function]:
    """All functions of one file, nested ones included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            named = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            parameters = sum(argument.arg not in IMPLICIT for argument in named)
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield Function(f"{path}:{node.lineno} {node.name}", lines, parameters)


def report(folders: list[Path]) -> str:
    """The text of the report."""
    files: dict[str, int] = {}
    functions: list[Function] = []
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        text = path.read_text(encoding="utf8")
        files[str(path)] = len(text.splitlines())
        functions += functions_of(path, ast.parse(text))
    sections = [
        ("longest files, lines", files),
        ("longest functions, lines", {f.place: f.lines for f in functions}),
        ("longest parameter lists", {f.place: f.parameters for f in functions}),
    ]
    lines = [f"{len(files)} files, {sum(files.values())} lines, {len(functions)} functions"]
    for title, sizes in sections:
        lines.append(f"{title} (median {median(sizes.values()) if sizes else 0:g}):")
        for place in sorted(sizes, key=lambda place: -sizes[place])[:LONGEST]:
            lines.append(f"{sizes[place]:6}  {place}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report([Path(folder) for folder in sys.argv[1:] or ["leadline"]]))
