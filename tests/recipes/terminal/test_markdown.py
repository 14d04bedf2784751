"""Markdown while it is written: whole at the end however it comes, and harmless whatever it says."""

from __future__ import annotations

import io
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from leadline.recipes.terminal import markdown
from leadline.recipes.terminal.markdown import Lines, MarkdownStream, blocks_of, harmless

ANSWER = """\
# Title

A paragraph with **bold** and `code`.

1. one
2. two

   still two

```python
def f():

    return "a fence with blank lines"
```

| a | b |
|---|---|
| 1 | 2 |

The end."""


BLOCKS = ("# Title", "A paragraph", "1. one", "```python", "| a | b |", "The end")


def test_a_text_is_cut_where_its_blocks_begin() -> None:
    starts = [ANSWER.index(block) for block in BLOCKS]
    assert blocks_of(ANSWER) == [ANSWER[start:end] for start, end in itertools.pairwise([*starts, len(ANSWER)])]


def test_complete_blocks_stay_what_they_are_while_more_is_written() -> None:
    whole = blocks_of(ANSWER)
    for end in range(len(ANSWER) + 1):
        *complete, _ = blocks_of(ANSWER[:end])
        assert complete == whole[: len(complete)]


@settings(max_examples=200)
@given(text=st.text(st.sampled_from("ab*`#->|_[]()1. \n\t")))
def test_no_text_gets_lost_between_blocks(text: str) -> None:
    assert "".join(blocks_of(text)) == text


def shown(pieces: list[str], width: int = 60) -> str:
    """What stands on a terminal after a stream, without colours; frames that were cleared away left out."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=20, color_system=None)
    stream = MarkdownStream(console)
    for piece in pieces:
        stream.feed(piece)
    stream.close()
    found = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    return found


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_every_word_is_printed_for_good(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "SECONDS_PER_FRAME", 0.0)
    monkeypatch.setattr(markdown.Frames, "draw", lambda self, content: None)
    found = shown([ANSWER[at : at + step] for at in range(0, len(ANSWER), step)])
    words = ("Title", "bold", "1 one", "2 two", "still two", "def f():", 'return "a fence', "The end.")
    assert [word for word in words if found.count(word) != 1] == []
    assert "**" not in found


@settings(max_examples=200)
@given(text=st.text())
def test_no_character_commands_the_terminal(text: str) -> None:
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", harmless(text))
    assert harmless(harmless(text)) == harmless(text)


def test_a_sequence_of_the_model_is_shown_and_not_obeyed() -> None:
    found = shown(["title \x1b]0;pwned\x07 and [here](https://example.org/x)\r\n"])
    assert "␛]0;pwned␇" in found
    assert "\x1b]" not in found
    assert "https://example.org/x" in found


def test_a_frame_holds_the_last_lines_that_fit() -> None:
    console = Console(file=io.StringIO(), width=20, height=6)
    console.print(Lines(Text("\n" + "\n".join(f"line {n}" for n in range(50)) + "\n\n"), most=4), end="")
    lines = console.file.getvalue().split()  # pyright: ignore[reportAttributeAccessIssue]
    assert lines == ["line", "46", "line", "47", "line", "48", "line", "49"]
