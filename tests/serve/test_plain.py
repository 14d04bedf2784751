from __future__ import annotations

from typing import Any

from openai import OpenAI

from leadline.text.tokenizer import Tokenizer


def test_the_model_says_what_it_can(openai_client: OpenAI, guarded: Any, keys: tuple[str, ...]) -> None:
    (model,) = openai_client.models.list().data
    assert model.id == "tiny"
    assert openai_client.models.retrieve("tiny").model_dump()["modes"] == ["non-think", "high", "max"]
    card = guarded.get("/v1/models/tiny", **{"x-api-key": keys[1]}).json()
    assert (card["modes"], card["max_model_len"]) == (["non-think", "high"], 2048)
    assert guarded.get("/v1/models/none", **{"x-api-key": keys[1]}).status_code == 404


def test_text_and_tokens(server: Any, tokenizer: Tokenizer) -> None:
    text = "the <think> quick é"
    found = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == [tokenizer.bos_id, *tokenizer.encode(text)]
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    back = server.post("/detokenize", {"tokens": found["tokens"][1:]}).json()
    assert back == {"prompt": text}


def test_a_conversation_is_tokenized_as_it_is_asked(server: Any) -> None:
    messages = [{"role": "user", "content": "hello"}]
    count = server.post("/tokenize", {"messages": messages}).json()["count"]
    answer = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1}).json()
    assert count == answer["usage"]["prompt_tokens"]


def test_what_is_wrong_is_said(server: Any) -> None:
    for path, body, words in (
        ("/tokenize", {}, "either a prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": [{}]}, "either a prompt or messages"),
        ("/detokenize", {"tokens": [-1]}, "-1 is no token"),
        ("/detokenize", {"tokens": [server.service.vocab_size - 1]}, "outside the vocabulary"),
        ("/detokenize", {"tokens": []}, "empty"),
    ):
        answer = server.post(path, body)
        assert (answer.status_code, words in answer.json()["error"]["message"]) == (400, True)
