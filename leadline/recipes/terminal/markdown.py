"""Markdown that is printed while it is written.

A terminal cannot take back what has scrolled away. So of the text so far only the last block (a paragraph, a list, a
block of code) is drawn anew with each piece; when the next block begins, it is complete and stays.

A model may write any character, and some of them command the terminal. Such characters are shown as pictures.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

SECONDS_PER_FRAME = 0.08
_CONTROL_PICTURES = 0x2400
_COMMANDS: dict[int, str | None] = {n: chr(_CONTROL_PICTURES + n) for n in range(0x20) if chr(n) not in "\t\n"}
_COMMANDS |= {0x7F: "\N{SYMBOL FOR DELETE}", **dict.fromkeys(range(0x80, 0xA0), "\N{REPLACEMENT CHARACTER}")}
_COMMANDS[ord("\r")] = None  # of a line break in two characters, the other is enough


def harmless(text: str) -> str:
    """The text with a picture in place of every character that would command a terminal."""
    return text.translate(_COMMANDS)


def blocks_of(text: str) -> list[str]:
    """The text cut where its blocks begin; the last may still grow, those before it are complete."""
    tokens = MarkdownIt().enable("table").parse(text)
    starts = [token.map[0] for token in tokens if token.level == 0 and token.map]
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    return ["".join(lines[start:end]) for start, end in pairwise([0, *starts[1:], len(lines)])]


@dataclass(frozen=True)
class Lines:
    """The lines of something without the empty ones around it. most: the last so many of them, None for all."""

    content: RenderableType
    most: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self.content, options.update(height=None), pad=False)
        filled = [n for n, line in enumerate(lines) if any(segment.text.strip() for segment in line)]
        for line in lines[filled[0] : filled[-1] + 1][-self.most if self.most else 0 :] if filled else ():
            yield from line
            yield Segment.line()


class Frames:
    """Something at the bottom of the terminal that is drawn again and again, and goes when it is closed."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="visible")
        self._drawn = 0.0
        self._live.start()

    @property
    def is_due(self) -> bool:
        """Whether the last frame is long enough ago."""
        return time.monotonic() - self._drawn >= SECONDS_PER_FRAME

    def draw(self, content: RenderableType) -> None:
        """Show the end of something in place of what was there."""
        self._live.update(Lines(content, max(self._live.console.height - 2, 1)), refresh=True)
        self._drawn = time.monotonic()

    def close(self) -> None:
        """Clear it away."""
        self._live.stop()


class MarkdownStream:
    """Prints Markdown as it comes, piece by piece."""

    def __init__(self, console: Console) -> None:
        self._console, self._frames, self._pending = console, Frames(console), ""
        self._is_first = True

    def feed(self, text: str) -> None:
        """Add a piece."""
        self._pending += harmless(text)
        if self._frames.is_due:
            *complete, self._pending = blocks_of(self._pending)
            self._print(complete)  # above the frame
            self._frames.draw(_rendered(self._pending))

    def close(self) -> None:
        """The text is complete."""
        self._frames.close()
        self._print(blocks_of(self._pending))

    def _print(self, blocks: Iterable[str]) -> None:
        for block in blocks:
            if block.strip():
                if not self._is_first:
                    self._console.print()
                self._console.print(Lines(_rendered(block)), end="")
                self._is_first = False


def _rendered(text: str) -> Markdown:
    # An address under other words could lead anywhere; so addresses are shown.
    return Markdown(text, hyperlinks=False)
