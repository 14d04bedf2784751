"""Commands: each does what its line in /help says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leadline.cli import UsageError
from leadline.data.bundle import Limits
from leadline.data.gather import GatherError
from leadline.engine.request import LIKE_THE_MODEL
from leadline.recipes.terminal.commands import COMMANDS, run
from leadline.recipes.terminal.conversation import Conversation
from leadline.recipes.terminal.screen import Pipe
from leadline.recipes.terminal.session import Session
from leadline.text.tokenizer import Tokenizer


@pytest.fixture
def session(reply: Any, tokenizer: Tokenizer) -> Session:
    return Session(reply, tokenizer, Pipe(), Conversation(), LIKE_THE_MODEL, 50, False, Limits())


@pytest.fixture
def say(session: Session, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """say(line): what the line brings onto both streams."""

    def act(line: str) -> str:
        run(session, line)
        return "".join(capsys.readouterr())

    return act


def test_every_command_has_its_line_in_help(say: Callable[[str], str]) -> None:
    lines = say("/help").splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [f"/{name}" for name in COMMANDS]


def test_questions_and_quitting(session: Session) -> None:
    assert run(session, "hello")
    assert run(session, "//slash")
    assert not run(session, "/quit")
    assert [turn["content"] for turn in session.conversation.turns[::2]] == ["hello", "/slash"]


def test_mode_and_budget(session: Session, say: Callable[[str], str], tokenizer: Tokenizer, reply: Any) -> None:
    assert say("/mode") == "mode high\n"
    assert "made for a context of 393,216 tokens, here are 4,096" in say("/mode max")
    assert say("/budget") == "no limit on thinking\n"
    assert say("/budget 1K") == "at most 1,024 tokens of thinking\n"
    say("question")
    thinking = reply.requests[-1].thinking
    assert (thinking.tokens, thinking.end_token) == (1024, tokenizer.token_id("</think>"))
    say("/mode non-think")
    say("question")
    assert reply.requests[-1].thinking is None
    assert say("/budget off") == "no limit on thinking\n"
    for line in ("/budget much", "/budget -1"):
        with pytest.raises(UsageError, match="expected a number of tokens, or off"):
            run(session, line)
    with pytest.raises(UsageError, match="unknown mode 'low'"):
        run(session, "/mode low")


def test_think_shows_the_latest_reasoning(say: Callable[[str], str]) -> None:
    assert say("/think") == "Nothing was thought.\n"
    say("question")
    assert say("/think") == "Adding\nup.\n"


def test_file_system_and_new(session: Session, say: Callable[[str], str], project: Path) -> None:
    assert say(f"/file {project / 'a.py'}").startswith("1 file, ")
    assert say(f"/file {project}").startswith("2 files, ")
    say("/system Be brief.")
    say("what?")
    question = session.conversation.turns[0]["content"]
    assert question.count("## a.py") == 2
    assert question.endswith("what?")
    assert session.conversation.opening().text.endswith("Be brief.")
    say("/new")
    assert session.conversation.turns == []
    assert session.conversation.system == "Be brief."
    with pytest.raises(GatherError, match="no such file"):
        run(session, "/file nowhere")
    with pytest.raises(UsageError, match="/file: expected a path"):
        run(session, "/file")


def test_retry_asks_the_same_with_another_seed(session: Session, say: Callable[[str], str], reply: Any) -> None:
    say("question")
    say("/retry")
    first, second = reply.requests
    assert first.prompt == second.prompt
    assert first.sampling.seed != second.sampling.seed
    assert len(session.conversation.turns) == 2


def test_save_and_load(session: Session, say: Callable[[str], str], tmp_path: Path) -> None:
    say("question")
    before = session.conversation
    assert say(f"/save {tmp_path / 'a b.json'}") == f"saved: {tmp_path / 'a b.json'}\n"
    say("/new")
    assert say(f"/load {tmp_path / 'a b.json'}").endswith(", 2 turns\n")
    assert session.conversation.turns[0]["content"] == "question"
    assert session.conversation is not before


def test_an_unknown_command_names_the_nearest(session: Session) -> None:
    with pytest.raises(UsageError, match="unknown command 'hlep': did you mean 'help'"):
        run(session, "/hlep")
