"""The conversation: its layout for the cache, and files that nobody has to trust."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leadline.recipes.terminal.conversation import Conversation, ConversationError


def talk() -> Conversation:
    found = Conversation(files="## a\n\n```\nx\n```\n\n", system="Be brief.")
    found.ask("one")
    found.answer("1", "because")
    found.ask("two")
    found.answer("2", "")
    return found


def test_files_come_first_and_each_prompt_goes_on_from_the_question_before() -> None:
    conversation = Conversation(files="FILES\n\n", system="SYSTEM")
    conversation.ask("one")
    first = conversation.prompt().text
    assert first.startswith(f"{conversation.opening().text}")
    assert conversation.opening().text.endswith("FILES\n\nSYSTEM")
    conversation.answer("1", "long thoughts")
    conversation.ask("two")
    second = conversation.prompt().text
    assert second.startswith(first.removesuffix("<think>"))
    assert "long thoughts" not in second


def test_a_question_without_an_answer_makes_way() -> None:
    conversation = talk()
    conversation.ask("three")
    conversation.answer("", "")
    conversation.ask("four")
    assert [turn["content"] for turn in conversation.turns] == ["one", "1", "two", "2", "four"]


def test_an_answer_that_was_cut_in_its_thoughts_counts() -> None:
    conversation = Conversation()
    conversation.ask("one")
    conversation.answer("", "half a thought")
    assert conversation.reasoning == "half a thought"
    conversation.ask("two")
    conversation.prompt()


def test_attached_files_stand_in_front_of_one_question() -> None:
    conversation = Conversation(attached="FILE")
    conversation.ask("one")
    conversation.answer("1", "")
    conversation.ask("two")
    assert [turn["content"] for turn in conversation.turns] == ["FILE\n\none", "1", "two"]


def test_reopening() -> None:
    conversation = talk()
    conversation.reopen()
    assert conversation.is_open
    conversation.reopen()
    assert [turn["content"] for turn in conversation.turns] == ["one", "1", "two"]
    with pytest.raises(ConversationError, match="no question yet"):
        Conversation().reopen()


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    for conversation in (Conversation(), talk(), Conversation(mode="max", budget=5, attached="\ud7ff\u2028é")):
        conversation.save(tmp_path / "c.json")
        assert Conversation.load(tmp_path / "c.json") == conversation
    assert os.listdir(tmp_path) == ["c.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: [], "expected a file that /save wrote"),
        (lambda values: {"turns": []}, "expected a file that /save wrote"),
        (lambda values: {**values, "more": 1}, "expected a file that /save wrote"),
        (lambda values: {**values, "system": 3}, "system is no text"),
        (lambda values: {**values, "mode": "medium"}, "medium"),
        (lambda values: {**values, "release": "later"}, "later"),
        (lambda values: {**values, "budget": -1}, "budget is -1"),
        (lambda values: {**values, "budget": True}, "budget is True"),
        (lambda values: {**values, "turns": {}}, "turns are not"),
        (lambda values: {**values, "turns": values["turns"][1:]}, "turns are not"),
        (lambda values: {**values, "turns": [{"role": "user", "content": None}]}, "turns are not"),
        (lambda values: {**values, "turns": [{**values["turns"][0], "task": "title"}]}, "turns are not"),
    ],
)
def test_other_files_are_refused_in_one_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = tmp_path / "c.json"
    talk().save(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ConversationError, match=message) as caught:
        Conversation.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_json_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    for content in (b"", b"{", b"\xff", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ConversationError, match="no JSON"):
            Conversation.load(path)
    with pytest.raises(ConversationError, match="No such file"):
        Conversation.load(tmp_path / "none")
    with pytest.raises(ConversationError, match="cannot be written"):
        Conversation().save(tmp_path / "none" / "c.json")
