from __future__ import annotations

import pytest
import torch

from leadline.engine.generate import Sampling, generate, sample
from leadline.model.cache_format import PACKED, SERVED
from leadline.model.config import TINY
from leadline.model.segment import Segment
from leadline.model.transformer import Transformer


@pytest.fixture
def model() -> Transformer:
    model = Transformer(TINY)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.normal_(0, 0.3) if "norm" not in name else tensor.fill_(1.0)
            else:
                tensor.random_(0, TINY.n_routed_experts)
    return model


@torch.no_grad()
def naive(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation that computes everything anew for each token."""
    ids = list(prompt)
    for _ in range(count):
        streams_TSD = model(Segment.of(ids)).streams_TSD
        ids.append(int(model.logits(model.hidden(streams_TSD[-1:]))[0].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("prompt_tokens", [1, 3, 4, 5, 127, 128, 129])
def test_the_cached_path_continues_like_the_naive_loop(model, prompt_tokens):
    prompt = torch.randint(0, TINY.vocab_size, (prompt_tokens,)).tolist()
    greedy = Sampling(temperature=0)
    expected = naive(model, prompt, 10)
    for chunk in (1, 50, 512):
        if chunk < prompt_tokens or chunk == 512:
            assert list(generate(model, prompt, max_tokens=10, sampling=greedy, chunk_tokens=chunk)) == expected


def test_the_packed_cache_continues_like_the_served_one(model):
    prompt, greedy, texts = torch.randint(0, TINY.vocab_size, (140,)).tolist(), Sampling(temperature=0), []
    for model.cache_format in (SERVED, PACKED):
        texts.append(list(generate(model, prompt, max_tokens=10, sampling=greedy, chunk_tokens=50)))
    assert texts[0] == texts[1]


def test_a_stop_id_ends_the_text(model):
    prompt = [3, 1, 4]
    whole = list(generate(model, prompt, max_tokens=20, sampling=Sampling(temperature=0)))
    stop = whole[4]
    shortened = list(
        generate(model, prompt, max_tokens=20, sampling=Sampling(temperature=0), stop_ids=frozenset({stop}))
    )
    assert shortened == whole[: whole.index(stop) + 1]


def test_a_seed_repeats_and_another_differs(model):
    def text(seed: int) -> list[int]:
        return list(generate(model, [5, 6], max_tokens=30, sampling=Sampling(temperature=2.0, seed=seed)))

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_top_p_keeps_the_smallest_sufficient_set():
    logits_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    drawn = {sample(logits_V, Sampling(top_p=0.79), torch.Generator().manual_seed(seed)) for seed in range(200)}
    assert drawn == {0, 1}
    drawn = {sample(logits_V, Sampling(top_p=0.81), torch.Generator().manual_seed(seed)) for seed in range(400)}
    assert drawn == {0, 1, 2}


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="the prompt is empty"):
        next(generate(model, [], max_tokens=1))
