"""Compiled steps say what plain ones say, whatever comes up between two of them, and errors say what is missing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from leadline.engine.compiled import Compiled, CompileError
from leadline.engine.engine import Engine, Settings
from leadline.engine.prefix import WindowPolicy
from leadline.engine.request import Request, Sampling
from leadline.model.config import TINY
from leadline.model.linear import Linear
from leadline.model.transformer import Transformer
from leadline.ops.quantized_linear import quantize

from .conftest import Run, random_weights

# A block of each kind, two of one, and few rounds of Sinkhorn, which make most of the C++ code.
SMALL = TINY.replace(hc_sinkhorn_iters=2)
STEPS = 14
SETTINGS = Settings(slots=4, pages=16, max_tokens=512, policy=WindowPolicy("zero"))

# torch traces a custom autograd function through an object of it, and warns of that itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(scope="module")
def small() -> Transformer:
    return random_weights(Transformer(SMALL), 7)


@pytest.fixture(autouse=True)
def _forget_compiled() -> Iterator[None]:
    """What was compiled is of no use to other tests."""
    yield
    torch.compiler.reset()


def start(model: Transformer, settings: Settings, lengths: tuple[int, ...]) -> tuple[Engine, Run]:
    """An engine that has read prompts of some lengths."""
    engine, run = Engine(model, settings), Run()
    for number, length in enumerate(lengths):
        prompt = tuple(random.Random(number).choices(range(SMALL.vocab_size), k=length))
        engine.submit(Request(prompt, 100, Sampling(temperature=0.0, logprobs=3)))
    while not engine.running or any(sequence.pending > 1 for sequence in engine.running):
        run.add(engine.step())
    return engine, run


@pytest.mark.parametrize("kinds", ["all, and drafts", "one"])
def test_compiled_steps_say_what_plain_ones_say(small: Transformer, kinds: str) -> None:
    """Three sequences of four: one makes its first entries, one needs another page, one has a long past; and a shape
    once compiled stays compiled."""
    speculate = kinds != "one"
    if not speculate:
        small = random_weights(Transformer(SMALL.replace(num_hidden_layers=1, compress_ratios=(4, 0))), 7)
    settings = replace(SETTINGS, speculate=speculate)
    lengths = 3, 120, 300
    plain, expected = start(small, settings, lengths)
    engine, found = start(small, replace(settings, compile_steps=True), lengths)
    assert engine.compile_seconds == 0.0
    for _ in range(STEPS):
        expected.add(plain.step())
    found.add(engine.step())
    seconds, graphs = engine.compile_seconds, counters["stats"]["unique_graphs"]
    assert seconds > 0.0
    for _ in range(STEPS - 1):
        found.add(engine.step())
    assert engine.compile_seconds == seconds
    assert counters["stats"]["unique_graphs"] == graphs
    for number in range(len(lengths)):
        assert found.ids(number) == expected.ids(number)
        assert len(found.ids(number)) > STEPS
        for ours, theirs in zip(found.tokens[number], expected.tokens[number], strict=True):
            assert ours.top is not None
            assert theirs.top is not None
            assert [id_ for id_, _ in ours.top] == [id_ for id_, _ in theirs.top]
            values = [torch.tensor([value for _, value in token.top or ()]) for token in (ours, theirs)]
            assert torch.allclose(values[0], values[1], atol=1e-4)
    if speculate:
        assert engine.usage(0).num_drafted > 0


def test_a_function_that_cannot_be_compiled_is_an_error() -> None:
    def branches(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if bool((x > 0).all()) else x

    with pytest.raises(CompileError, match=r"^branches was not compiled: .*serve without compile_steps$"):
        Compiled(branches)(torch.ones(2))


def test_without_a_compiler(small: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompileError, match="needs a C\\+\\+ compiler, and no-such-compiler is not there"):
        Engine(small, replace(SETTINGS, compile_steps=True))


def test_not_together_with_batch_invariance(small: Transformer) -> None:
    with pytest.raises(ValueError, match="compile_steps and batch_invariant exclude each other"):
        Engine(small, replace(SETTINGS, compile_steps=True, batch_invariant=True))


def test_not_with_quantised_weights() -> None:
    model = random_weights(Transformer(SMALL), 7)
    linear = model.get_submodule("layers.1.attn.wkv")
    assert isinstance(linear, Linear)
    linear.hold(quantize(linear.weight.detach(), "fp8"))
    with pytest.raises(CompileError, match=r"layers\.1\.attn\.wkv.* is in eight or four bits"):
        Engine(model, replace(SETTINGS, compile_steps=True))
