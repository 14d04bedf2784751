"""Numbers of a run: a file that keeps every one of them, and a line on the screen.

`metrics.jsonl` has one JSON object per line, in order; nothing is averaged away. A resumed run drops the lines after
the checkpoint it starts from, so the file reads as if the run had never stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from leadline.train.atomic import write_text


class MetricsFile:
    """Append-only JSON lines; each line has a "step"."""

    def __init__(self, path: Path, *, keep_to_step: int = 0):
        """Continue the file after `keep_to_step` (0: start anew)."""
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= keep_to_step] if path.exists() else []
        write_text(path, "".join(_line(row) for row in kept))
        self._file = open(path, "a", encoding="utf8")  # noqa: SIM115 - closed by close()

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file; a last line that was cut off by a crash is left out."""
    with open(path, encoding="utf8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


class _NumbersColumn(ProgressColumn):
    """The latest numbers of the run, in one fixed order."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("numbers", ""), style="cyan")


class RunDisplay:
    """Progress bars with ETA on a terminal; plain lines, a few a minute, anywhere else."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, console: Console):
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=18),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            _NumbersColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._last_line = float("-inf")

    def __enter__(self) -> RunDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def task(self, name: str, total: int | None) -> TaskID:
        return self._progress.add_task(name, total=total)

    def update(self, task: TaskID, done: int, total: int | None = None, numbers: str = "") -> None:
        """Move a bar; on a plain stream print the numbers now and then."""
        self._progress.update(task, completed=done, total=total, numbers=numbers)
        if not self.console.is_terminal and numbers:
            now = self._progress.get_time()
            last = total is not None and done >= total
            if last or now - self._last_line >= self.SECONDS_BETWEEN_LINES:
                self._last_line = now
                of = "?" if total is None else total
                self.console.print(f"{done}/{of}  {numbers}", highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line that stays on the screen."""
        self.console.print(text, highlight=False, soft_wrap=True)
