"""The Jinja template: transformers renders with it what `render` gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from leadline.text.chat import Mode, Release, render, with_tools
from leadline.text.messages import ChatError
from leadline.text.template import chat_template, with_chat_template
from leadline.text.tokenizer import Tokenizer

Message = dict[str, Any]
USER: Message = {"role": "user", "content": "Hi"}
TOOL: Message = {"type": "function", "function": {"name": "f", "description": "é", "parameters": {}}}


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer.train(["What is 2 + 2? It is 4."], vocab_size=300)


@pytest.fixture(scope="module")
def theirs(small: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """transformers' tokenizer of a folder that a checkpoint may have."""
    folder = tmp_path_factory.mktemp("tokenizer")
    small.save(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def rendered(
    theirs: PreTrainedTokenizerFast, messages: list[Message], made_for: Release = "preview", **kwargs: Any
) -> str:
    options = {"add_generation_prompt": True, **kwargs}
    text = theirs.apply_chat_template(messages, chat_template=chat_template(made_for), tokenize=False, **options)
    assert isinstance(text, str)
    return text


def can_be_expressed(messages: list[Message]) -> bool:
    return not any(
        message["role"] == "developer" or message.get("task") or message.get("wo_eos") for message in messages
    )


def test_random_conversations(theirs: PreTrainedTokenizerFast, conversations: Callable[..., Any]) -> None:
    modes: dict[Mode, Message] = {
        "non-think": {"thinking": False},
        "low": {"reasoning_effort": "low"},
        "high": {"reasoning_effort": "high"},
        "max": {"enable_thinking": True, "reasoning_effort": "max"},
    }
    compared = 0
    for seed in range(1000):
        messages = conversations(seed, objects=True).conversation()
        if not can_be_expressed(messages):
            continue
        compared += 1
        mode = list(modes)[seed % len(modes)]
        release: Release = "0731" if mode == "low" or seed % 3 == 0 else "preview"
        drop_thinking = seed % 5 != 0
        text = rendered(theirs, messages, release, drop_thinking=drop_thinking, **modes[mode])
        assert text == render(messages, mode, release, drop_thinking).text
    assert compared > 400


def test_tools_beside_the_messages(theirs: PreTrainedTokenizerFast) -> None:
    for messages in ([USER], [{"role": "system", "content": "S"}, USER]):
        assert rendered(theirs, messages, tools=[TOOL]) == render(with_tools(messages, [TOOL])).text


def test_any_json(theirs: PreTrainedTokenizerFast) -> None:
    system = {"role": "system", "content": "S", "response_format": {"type": "json_object"}}
    assert rendered(theirs, [system, USER]) == render([system, USER]).text


@pytest.mark.parametrize(
    ("kwargs", "mode"),
    [
        ({}, "high"),
        ({"thinking": True}, "high"),
        ({"thinking": False}, "non-think"),
        ({"enable_thinking": False}, "non-think"),
        ({"enable_thinking": False, "reasoning_effort": "max"}, "non-think"),
        ({"reasoning_effort": "none"}, "non-think"),
        ({"reasoning_effort": None}, "high"),
        ({"reasoning_effort": "max"}, "max"),
    ],
)
def test_modes_by_variables(theirs: PreTrainedTokenizerFast, kwargs: Message, mode: Mode) -> None:
    assert rendered(theirs, [USER], **kwargs) == render([USER], mode).text


def test_release_by_variable(theirs: PreTrainedTokenizerFast) -> None:
    assert rendered(theirs, [USER], reasoning_effort="max", release="0731") == render([USER], "max", "0731").text


def test_without_generation_prompt(theirs: PreTrainedTokenizerFast) -> None:
    assert rendered(theirs, [USER], add_generation_prompt=False) == "<｜begin▁of▁sentence｜><｜User｜>Hi"


def test_continue_final_message(theirs: PreTrainedTokenizerFast) -> None:
    answer = {"role": "assistant", "content": "It is", "reasoning_content": "Sum."}
    text = rendered(theirs, [USER, answer], add_generation_prompt=False, continue_final_message=True)
    assert text == render([USER, {**answer, "prefix": True}]).text


@pytest.mark.parametrize(
    ("messages", "kwargs", "message"),
    [
        ([USER], {"reasoning_effort": "low"}, "reasoning_effort low is unknown; use one of none, high, max"),
        ([{"role": "developer", "content": "x"}], {}, "role developer is unknown"),
        ([{**USER, "task": "query"}], {}, "task and wo_eos need the Python encoder"),
        ([{"role": "user", "content": [{"type": "image"}]}], {}, "a content part has type image"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
            {},
            "arguments of a tool call must be an object",
        ),
    ],
)
def test_what_it_cannot_do_is_said(
    theirs: PreTrainedTokenizerFast, messages: list[Message], kwargs: Message, message: str
) -> None:
    with pytest.raises(TemplateError, match=message):
        rendered(theirs, messages, **kwargs)


def test_a_checkpoint_carries_the_template(small: Tokenizer, tmp_path: Path) -> None:
    """From the folder alone transformers makes the token ids that `Prompt.ids` makes."""
    small.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = with_chat_template(json.loads(path.read_text(encoding="utf8")), "0731")
    path.write_text(json.dumps(config), encoding="utf8")
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "What is 2 + 2?"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, reasoning_effort="low")
    assert ids == render(messages, "low", "0731").ids(small)


def test_unknown_release() -> None:
    with pytest.raises(ChatError, match="release 'v4' is unknown"):
        chat_template("v4")  # pyright: ignore[reportArgumentType]


def test_the_template_replaces_another() -> None:
    config = with_chat_template({"bos_token": "x", "chat_template": "old"})
    assert config == {"bos_token": "x", "chat_template": chat_template("preview")}
