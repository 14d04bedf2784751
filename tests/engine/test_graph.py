"""Captured steps: on a card the engine says what the model says without a state."""

from __future__ import annotations

import random

import pytest
import torch

from leadline.engine.engine import Engine, Settings
from leadline.engine.graph import power_of
from leadline.engine.request import Request, Sampling
from leadline.model.config import TINY
from leadline.model.segment import Segment
from leadline.model.transformer import Transformer
from leadline.weights.synthetic import few_layers

from .conftest import Run, random_weights

CARD = TINY.replace(head_dim=64, qk_rope_head_dim=32, index_head_dim=128)


@pytest.mark.gpu
@pytest.mark.parametrize(("speculate", "stages"), [(False, False), (True, False), (True, True)])
def test_captured_steps_say_what_the_model_says_without_a_state(speculate: bool, stages: bool) -> None:
    config = few_layers(CARD, CARD.num_hidden_layers, draft_stages=True) if stages else CARD
    model = random_weights(Transformer(config), 7).cuda()
    prompts = [random.Random(n).choices(range(CARD.vocab_size), k=length) for n, length in enumerate((120, 5, 300))]
    engine, run = Engine(model, Settings(slots=3, pages=16, speculate=speculate)), Run()
    numbers = [engine.submit(Request(tuple(prompt), 20, Sampling(temperature=0.0))) for prompt in prompts]
    while engine.busy:
        run.add(engine.step())
    assert all((engine.usage(number).num_drafted > 0) == speculate for number in numbers)
    for number, prompt in zip(numbers, prompts, strict=True):
        answer = run.ids(number)
        with torch.no_grad():
            streams_TSD = model(Segment.of([*prompt, *answer], device="cuda")).streams_TSD
            best_T = model.logits(model.hidden(streams_TSD)).argmax(-1)
        assert best_T[len(prompt) - 1 : -1].tolist() == answer


@pytest.mark.parametrize(("base", "number", "power"), [(2, 1, 1), (2, 2, 2), (2, 3, 4), (4, 5, 16), (4, 65, 256)])
def test_shapes_are_padded_to_powers(base: int, number: int, power: int) -> None:
    assert power_of(base, number) == power
