"""A small random model in float64, where no two logits are too close to call, and what each prompt says alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from leadline.engine.engine import Engine, Settings
from leadline.engine.request import Request
from leadline.engine.sequence import Event, Finish, Token
from leadline.model.config import TINY
from leadline.model.segment import Segment
from leadline.model.transformer import Transformer


@pytest.fixture(scope="session")
def model() -> Transformer:
    return random_weights(Transformer(TINY).double(), 7)


def random_weights(model: Transformer, seed: int) -> Transformer:
    """Fill a model in place; no norm is 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                tensor.random_(0, TINY.n_routed_experts, generator=generator)
            elif "norm" in name:
                tensor.uniform_(0.8, 1.2, generator=generator)
            else:
                tensor.normal_(0, 0.3, generator=generator)
    return model


class Run:
    """What an engine said, sequence by sequence."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[Token]] = {}
        self.finish: dict[int, Finish] = {}
        self.errors: dict[int, str | None] = {}

    def add(self, events: list[Event]) -> None:
        for event in events:
            assert event.sequence not in self.finish, "an ended sequence spoke"
            self.tokens.setdefault(event.sequence, []).extend(event.tokens)
            if event.finish is not None:
                self.finish[event.sequence] = event.finish
                self.errors[event.sequence] = event.error

    def ids(self, number: int) -> list[int]:
        return [token.id for token in self.tokens[number]]


@pytest.fixture
def drain() -> Callable[[Engine], Run]:
    """drain(engine): run it until nothing is left to do."""

    def run(engine: Engine) -> Run:
        found = Run()
        for _ in range(10_000):
            if not engine.busy:
                return found
            found.add(engine.step())
        raise AssertionError("the engine does not come to an end")

    return run


@pytest.fixture(scope="session")
def alone(model: Transformer) -> Callable[[Request], list[int]]:
    """alone(request): its tokens when an engine serves nothing else, with a cold cache. Remembered."""
    known: dict[Request, list[int]] = {}

    def solo(request: Request) -> list[int]:
        if request not in known:
            engine, found = Engine(model, Settings(slots=1, pages=16)), Run()
            number = engine.submit(request)
            while engine.busy:
                found.add(engine.step())
            known[request] = found.ids(number)
        return known[request]

    return solo


@pytest.fixture(scope="session")
def naive(model: Transformer) -> Callable[[list[int], int], list[int]]:
    """naive(prompt, count): greedy continuation that computes everything anew for each token, without a state."""

    @torch.no_grad()
    def run(prompt: list[int], count: int) -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            streams_TSD = model(Segment.of(ids)).streams_TSD
            ids.append(int(model.logits(model.hidden(streams_TSD[-1:]))[0].argmax()))
        return ids[len(prompt) :]

    return run
