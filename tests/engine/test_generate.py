"""One prompt, continued."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from leadline.engine.generate import GenerationError, generate
from leadline.engine.request import RequestError, Sampling
from leadline.model.config import TINY
from leadline.model.transformer import Transformer

GREEDY = Sampling(temperature=0.0)


@pytest.mark.parametrize("step_tokens", [128, 512])
def test_any_step_gives_the_continuation_of_the_naive_loop(
    model: Transformer, naive: Callable[[list[int], int], list[int]], step_tokens: int
) -> None:
    prompt = torch.randint(0, TINY.vocab_size, (200,)).tolist()
    found = generate(model, prompt, max_tokens=10, sampling=GREEDY, step_tokens=step_tokens)
    assert list(found) == naive(prompt, 10)


def test_a_stop_id_ends_the_text(model: Transformer) -> None:
    whole = list(generate(model, [3, 1, 4], max_tokens=20, sampling=GREEDY))
    stop = whole[4]
    shortened = list(generate(model, [3, 1, 4], max_tokens=20, sampling=GREEDY, stop_ids=frozenset({stop})))
    assert shortened == whole[: whole.index(stop) + 1]


def test_a_seed_repeats_and_another_differs(model: Transformer) -> None:
    def text(seed: int) -> list[int]:
        return list(generate(model, [5, 6], max_tokens=30, sampling=Sampling(temperature=2.0, seed=seed)))

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_what_cannot_be_continued_is_said(model: Transformer) -> None:
    with pytest.raises(RequestError, match="the prompt is empty"):
        next(generate(model, [], max_tokens=1))
    norm = model.norm.weight
    kept = norm.detach().clone()
    with torch.no_grad():
        norm.fill_(torch.nan)
    try:
        with pytest.raises(GenerationError, match="NaN"):
            next(generate(model, [1], max_tokens=1))
    finally:
        with torch.no_grad():
            norm.copy_(kept)
