"""Markdown while it is written: whole at the end however it comes, and harmless whatever it says."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from leadline.recipes.terminal import markdown
from leadline.recipes.terminal.markdown import MarkdownStream, Tail, harmless, last_block

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


def test_the_last_block_begins_behind_everything_complete() -> None:
    starts = {last_block(ANSWER[:end]) for end in range(len(ANSWER) + 1)}
    blocks = ("# Title", "A paragraph", "1. one", "```python", "| a | b |", "The end")
    assert starts == {ANSWER.index(block) for block in blocks}


@given(text=st.text(st.sampled_from("ab*`#->|_[]()1. \n\t")))
def test_any_text_has_a_last_block_at_the_start_of_a_line(text: str) -> None:
    cut = last_block(text)
    assert 0 <= cut <= len(text) + 1
    assert cut == 0 or text[cut - 1] == "\n"


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
    console.print(Tail(Text("\n".join(f"line {n}" for n in range(50)))))
    lines = console.file.getvalue().split()  # pyright: ignore[reportAttributeAccessIssue]
    assert lines == ["line", "46", "line", "47", "line", "48", "line", "49"]
