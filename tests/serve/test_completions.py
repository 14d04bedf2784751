from __future__ import annotations

import json
from typing import Any

import pytest
from openai import OpenAI

from leadline.text.tokenizer import Tokenizer
from leadline.text.tools import DSML

ASK: Any = {"model": "tiny", "prompt": "the quick", "max_tokens": 8, "seed": 1}


def test_streaming_equals_not_streaming(openai_client: OpenAI) -> None:
    whole = openai_client.completions.create(**ASK, n=2, echo=True)
    texts = ["", ""]
    for chunk in openai_client.completions.create(**ASK, n=2, echo=True, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert all(text.startswith("the quick") for text in texts)


def test_each_chunk_tells_the_tokens_so_far(openai_client: OpenAI) -> None:
    options: Any = {"continuous_usage_stats": True, "include_usage": True}
    for chunks in (
        list(openai_client.completions.create(**ASK, n=2, stream=True, stream_options=options)),
        list(
            openai_client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "hello"}],
                max_tokens=8,
                n=2,
                stream=True,
                stream_options=options,
            )
        ),
    ):
        usages: list[Any] = [chunk.usage for chunk in chunks]
        counts = [usage.completion_tokens for usage in usages]
        assert counts == sorted(counts)
        assert counts[-2] == counts[-1] > counts[0]
        assert {usage.prompt_tokens for usage in usages} == {usages[-1].prompt_tokens}
        assert all(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens for usage in usages)
        thinking = [usage.completion_tokens_details.reasoning_tokens for usage in usages]
        assert thinking[-2] == thinking[-1]


def test_text_and_its_ids_are_the_same_prompt(openai_client: OpenAI, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("the quick")]
    both = openai_client.completions.create(**{**ASK, "prompt": [ids, ids]})
    text = openai_client.completions.create(**ASK)
    assert [choice.text for choice in both.choices] == [text.choices[0].text] * 2


def test_a_suffix_is_told_to_the_model(openai_client: OpenAI, tokenizer: Tokenizer) -> None:
    usages = [openai_client.completions.create(**ASK, suffix=suffix).usage for suffix in (None, "fox")]
    counts = [usage.prompt_tokens for usage in usages if usage is not None]
    assert counts[1] == counts[0] + 3 + len(tokenizer.encode("fox"))  # and three control tokens


def test_logprobs_stand_beside_their_tokens(openai_client: OpenAI) -> None:
    logprobs = openai_client.completions.create(**ASK, logprobs=2).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens
    assert logprobs.token_logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) <= 8
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs)


def test_logprobs_go_on_behind_a_token_that_would_begin_calls(server: Any, tokenizer: Tokenizer) -> None:
    first = {"logit_bias": {str(tokenizer.token_id(DSML)): 100}, "presence_penalty": 100, "logprobs": 0}
    answer = server.post("/v1/completions", {**ASK, **first}).json()
    (choice,) = answer["choices"]
    assert choice["text"]
    assert 0 < len(choice["logprobs"]["tokens"]) < answer["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "the prompt is empty"),
        ({"prompt": [1, 10**6]}, "1000000 is no token"),
        ({"prompt": [1] * 2048}, "context is 2,048"),
        ({"prompt": ["a"] * 9}, "9 answers"),
        ({"prompt": [1, 2], "suffix": "x"}, "suffix"),
        ({"prompt": ["a", "b"], "echo": True}, "echo"),
        ({"prompt": "\ud800"}, "unicode"),
    ],
)
def test_what_is_wrong_is_said(server: Any, change: Any, words: str) -> None:
    answer = server.raw("/v1/completions", json.dumps({**ASK, **change}).encode())
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
