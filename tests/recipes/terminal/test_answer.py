"""One answer: split into thinking and text, on both screens, and stopped between two steps."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from leadline.engine.request import Request
from leadline.engine.sequence import Finish
from leadline.recipes.terminal.answer import Interrupt, answer, read_ahead
from leadline.recipes.terminal.screen import Pipe, Terminal
from leadline.text.tokenizer import Tokenizer

REQUEST = Request(tuple([5] * 250), 100)


def test_a_pipe_gets_the_answer_alone(reply: Any, tokenizer: Tokenizer, capsys) -> None:
    found = answer(reply, REQUEST, "reasoning", tokenizer, Pipe(), Interrupt())
    assert (found.reasoning, found.content) == ("Adding\nup.", "# Sum\n\nIt is **4**.\n\n- one\n- two")
    assert found.finish is Finish.STOP
    assert found.usage.output_tokens == len(reply.tokens)
    assert capsys.readouterr() == (f"{found.content}\n", "")


def test_a_terminal_folds_the_thinking_and_shows_markdown(reply: Any, tokenizer: Tokenizer) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=20, color_system=None)
    answer(reply, REQUEST, "reasoning", tokenizer, Terminal(console), Interrupt())
    page = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    thinking_tokens = len(tokenizer.encode("Adding\nup."))
    assert f"thought for {thinking_tokens:,} tokens, /think shows it" in page
    assert page.index("reading 250 tokens") < page.index("thought for") < page.index(" • one")
    assert "It is 4." in page
    assert "**4**" not in page


def test_an_interrupt_ends_the_answer_and_keeps_what_was_said(reply: Any, tokenizer: Tokenizer) -> None:
    interrupt = Interrupt()
    said = len(tokenizer.encode("Adding\nup.")) + 5

    def press(tokens: int) -> None:
        if tokens == said:
            os.kill(os.getpid(), signal.SIGINT)

    reply.on_step = press
    before = signal.getsignal(signal.SIGINT)
    with interrupt.listening():
        found = answer(reply, REQUEST, "reasoning", tokenizer, Pipe(), interrupt)
    assert found.finish is Finish.CANCELLED
    assert found.reasoning == "Adding\nup."
    assert "# Sum\n\nIt is **4**.".startswith(found.content)
    assert found.content
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_raises() -> None:
    interrupt = Interrupt()
    with interrupt.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.pressed
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_reading_ahead_says_nothing(scripted: Callable[..., Any], capsys) -> None:
    engine = scripted("x")
    read_ahead(engine, REQUEST.prompt, Pipe(), Interrupt())
    assert capsys.readouterr() == ("", "")
    assert engine.requests[0].max_tokens == 1
