"""Screens: how an answer appears while it is made, on a terminal and in a pipe."""

from __future__ import annotations

import sys
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from leadline.recipes.terminal.markdown import Frames, MarkdownStream, harmless


class Screen(Protocol):
    """Called in this order: read, think, say, end; any of the first three may be left out."""

    def read(self, seen: int, total: int) -> None:
        """So many tokens of the prompt have been taken in; all of them end the reading."""
        ...

    def think(self, text: str, tokens: int) -> None:
        """More of the reasoning. tokens: of all of it so far."""
        ...

    def say(self, text: str) -> None:
        """More of the answer."""
        ...

    def end(self) -> None:
        """The answer is over, complete or not."""
        ...

    def note(self, text: str) -> None:
        """A remark of the program."""
        ...

    def show(self, text: str) -> None:
        """Something the user asked to see."""
        ...


class Pipe:
    """For scripts: nothing but the answers on standard output, remarks on standard error."""

    def read(self, seen: int, total: int) -> None:
        pass

    def think(self, text: str, tokens: int) -> None:
        pass

    def say(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def end(self) -> None:
        self.say("\n")

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def show(self, text: str) -> None:
        print(text, flush=True)


class Terminal:
    """For people: a bar while the prompt is read, thinking dimmed and folded at its end, the answer as Markdown."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._thinking: Frames | None = None
        self._thought, self._thought_tokens = "", 0
        self._answer: MarkdownStream | None = None

    def read(self, seen: int, total: int) -> None:
        if seen == total:
            self._end_reading()
            return
        if self._progress is None:
            columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            text = TextColumn("reading {task.total:,} tokens")
            self._progress = Progress(text, *columns, console=self.console, transient=True)
            # The time that is left follows from what was read, and a prefix from the cache was not.
            self._progress.add_task("", total=total, completed=seen)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=seen)

    def think(self, text: str, tokens: int) -> None:
        self._end_reading()
        self._thought, self._thought_tokens = self._thought + harmless(text), tokens
        if self._thinking is None:
            self._thinking = Frames(self.console)
        if self._thinking.is_due:
            self._thinking.draw(Text(f"{self._thought}\n(thinking, {tokens:,} tokens)", "dim"))

    def say(self, text: str) -> None:
        self._end_reading()
        self._end_thinking()
        if self._answer is None:
            self._answer = MarkdownStream(self.console)
        self._answer.feed(text)

    def end(self) -> None:
        self._end_reading()
        self._end_thinking()
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def note(self, text: str) -> None:
        self.console.print(Text(harmless(text), "dim"), soft_wrap=True)

    def show(self, text: str) -> None:
        self.console.print(Text(harmless(text)))

    def _end_reading(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _end_thinking(self) -> None:
        if self._thinking is not None:
            self._thinking.close()
            self.note(f"thought for {self._thought_tokens:,} tokens, /think shows it")
            self._thinking, self._thought = None, ""
