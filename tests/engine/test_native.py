"""Native steps say what the model says, whatever comes up between two of them, and errors say what is missing."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from leadline.engine.engine import Engine, Settings
from leadline.engine.native import BuildError, NativeSteps
from leadline.engine.prefix import WindowPolicy
from leadline.engine.request import Request, Sampling
from leadline.model.cache_format import PACKED, SERVED, CacheFormat
from leadline.model.config import TINY, ModelConfig
from leadline.model.linear import Linear
from leadline.model.page_table import num_pages
from leadline.model.segment import Segment
from leadline.model.state import State
from leadline.model.transformer import Transformer
from leadline.ops.quantized_linear import quantize
from leadline.ops.select_topk import NonFiniteScoresError

from .conftest import Run, random_weights

STEPS = 14
SETTINGS = Settings(slots=4, pages=16, max_tokens=512, policy=WindowPolicy("zero"))
# Widths that are no multiples of what is computed at a time, where they need not be, and other numbers of everything.
UNEVEN = TINY.replace(
    vocab_size=251, hidden_size=48, num_attention_heads=12, head_dim=64, q_lora_rank=21, o_groups=3, o_lora_rank=5,
    index_topk=5, index_n_heads=3, index_head_dim=16, qk_rope_head_dim=6, sliding_window=7, n_routed_experts=5,
    num_experts_per_tok=3, moe_intermediate_size=16, hc_mult=3, hc_sinkhorn_iters=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def small() -> Transformer:
    return random_weights(Transformer(TINY), 7)


def prompt_of(length: int) -> tuple[int, ...]:
    return tuple(random.Random(length).choices(range(TINY.vocab_size), k=length))


def start(model: Transformer, settings: Settings, lengths: tuple[int, ...]) -> tuple[Engine, Run]:
    """An engine that has read prompts of some lengths."""
    engine, run = Engine(model, settings), Run()
    for length in lengths:
        engine.submit(Request(prompt_of(length), 100, Sampling(temperature=0.0, logprobs=3)))
    while not engine.running or any(sequence.pending > 1 for sequence in engine.running):
        run.add(engine.step())
    return engine, run


@pytest.mark.parametrize("speculate", [False, True])
def test_an_engine_says_the_same(small: Transformer, speculate: bool) -> None:
    """One sequence makes its first entries, one needs another page, one has a long past."""
    settings = replace(SETTINGS, speculate=speculate)
    lengths = 3, 120, 300
    plain, expected = start(small, settings, lengths)
    engine, found = start(small, replace(settings, compile_steps=True), lengths)
    assert engine.compile_seconds > 0.0
    for _ in range(STEPS):
        expected.add(plain.step())
        found.add(engine.step())
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


def state_of(model: Transformer, lengths: list[int], spare: int) -> State:
    """The state of prompts of some lengths, with pages out of order and room for more tokens."""
    pages = [num_pages(length + 16) for length in lengths]
    state = State(model.config, len(lengths), pages=sum(pages), max_tokens=512, spare_tokens=spare)
    numbers = list(range(sum(pages)))
    random.Random(0).shuffle(numbers)
    for slot, count in enumerate(pages):
        state.assign(slot, [numbers.pop() for _ in range(count)])
    for slot, length in enumerate(lengths):
        if length:
            tokens = [token % model.config.vocab_size for token in prompt_of(length)]
            model(Segment.of(tokens, slots=[slot]), state)
    return state


def tensors(state: State) -> dict[str, Tensor]:
    return state.fixed_tensors() | state.page_tensors()


@pytest.mark.parametrize("config", [TINY, UNEVEN], ids=["tiny", "uneven"])
@pytest.mark.parametrize(
    ("lengths", "new"),
    [
        ([0], 1),
        ([3], 1),
        ([4, 127], 1),
        ([5, 128, 255], 2),  # drafts, an entry of each ratio with them
        ([127, 255, 126], 3),
        (list(range(118, 135)), 1),  # one more than lane vectors have
        ([2 * n for n in range(33)], 1),
    ],
)
@torch.no_grad()
def test_logits_and_state_are_those_of_the_model(config: ModelConfig, lengths: list[int], new: int) -> None:
    model = random_weights(Transformer(config, with_mtp=False), 3)
    for name, tensor in model.named_buffers():
        if name.endswith("tid2eid"):
            tensor.remainder_(config.n_routed_experts)
    plain, native = (state_of(model, lengths, new - 1) for _ in range(2))
    steps = NativeSteps(model, native, drafts=False)
    for step in range(3):
        tokens = [
            [(17 * slot + 5 * step + place) % config.vocab_size for place in range(new)] for slot in range(len(lengths))
        ]
        past = [length + step * new for length in lengths]
        slots = list(range(len(lengths)))
        streams_TSD = model(Segment.of(*tokens, past=past, slots=slots), plain).streams_TSD
        output, logits_TV = steps.run(torch.tensor(tokens).flatten(), past, slots)
        assert output is None
        torch.testing.assert_close(logits_TV, model.logits(model.hidden(streams_TSD)), rtol=1e-4, atol=1e-4)
    for name, tensor in tensors(native).items():
        torch.testing.assert_close(tensor, tensors(plain)[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("count", [1, 16, 17])
@torch.no_grad()
def test_the_mtp_block_goes_on_from_a_step(small: Transformer, count: int) -> None:
    lengths, slots = list(range(20, 20 + count)), list(range(count))
    plain, native = (state_of(small, lengths, 1) for _ in range(2))
    tokens, next_T = [[slot, slot + 1] for slot in slots], torch.arange(2 * count)
    expected = small(Segment.of(*tokens, past=lengths, slots=slots), plain)
    steps = NativeSteps(small, native, drafts=True)
    output, _ = steps.run(torch.tensor(tokens).flatten(), lengths, slots)
    assert output is not None
    torch.testing.assert_close(output.streams_TSD, expected.streams_TSD, rtol=1e-4, atol=1e-3)  # numbers up to 50
    step = steps.step_of(output)
    assert step is not None
    hidden_TD = small.predict_second(expected, next_T, plain)[0]
    torch.testing.assert_close(step.predict_second(output, next_T), hidden_TD, rtol=1e-4, atol=1e-3)
    for name, tensor in tensors(native).items():
        torch.testing.assert_close(tensor, tensors(plain)[name], rtol=1e-4, atol=1e-4, msg=name)
    assert steps.step_of(expected) is None


@torch.no_grad()
def test_scores_that_are_not_numbers(small: Transformer) -> None:
    state = state_of(small, [100], 0)
    steps = NativeSteps(small, state, drafts=False)
    for name, tensor in state.page_tensors().items():
        if ".index." in name:
            tensor.fill_(torch.nan)
    with pytest.raises(NonFiniteScoresError, match="a NaN reached the top-k selection"):
        steps.run(torch.tensor([1]), [100], [0])


@torch.no_grad()
def test_what_is_no_number_stays_with_its_sequence(small: Transformer) -> None:
    """Padding lanes, neighbours in a lane vector and neighbours at an expert stay clean."""
    clean, damaged = (state_of(small, [20, 30, 40], 0) for _ in range(2))
    damaged.fixed_tensors()["layers.0.window.rows"][0] = torch.nan
    runs = [
        NativeSteps(small, state, drafts=False).run(torch.tensor([1, 2, 3]), [20, 30, 40], [0, 1, 2])
        for state in (clean, damaged)
    ]
    (_, expected_TV), (_, found_TV) = runs
    assert found_TV[0].isnan().all()
    assert torch.equal(found_TV[1:], expected_TV[1:])


def test_without_a_compiler(small: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="needs a C\\+\\+ compiler, and no-such-compiler is not there"):
        Engine(small, replace(SETTINGS, compile_steps=True))


def test_a_compiler_that_refuses(small: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BuildError, match=r"false could not compile steps: .*; serve without compile_steps$"):
        Engine(small, replace(SETTINGS, compile_steps=True))


def test_not_together_with_batch_invariance(small: Transformer) -> None:
    with pytest.raises(ValueError, match="compile_steps and batch_invariant exclude each other"):
        Engine(small, replace(SETTINGS, compile_steps=True, batch_invariant=True))


@pytest.mark.parametrize("cache_format", [SERVED, PACKED], ids=lambda cache_format: cache_format.name)
def test_not_with_a_cache_in_fewer_bits(cache_format: CacheFormat) -> None:
    model = random_weights(Transformer(TINY, cache_format=cache_format), 7)
    with pytest.raises(BuildError, match=f"needs cache=exact, and the model's cache is {cache_format.name}"):
        Engine(model, replace(SETTINGS, compile_steps=True))


def test_not_with_quantised_weights() -> None:
    model = random_weights(Transformer(TINY), 7)
    linear = model.get_submodule("layers.1.attn.wkv")
    assert isinstance(linear, Linear)
    linear.hold(quantize(linear.weight.detach(), "fp8"))
    with pytest.raises(BuildError, match=r"weights in float32, and layers\.1\.attn\.wkv.* is not"):
        Engine(model, replace(SETTINGS, compile_steps=True))


def test_not_with_other_dtypes(model: Transformer) -> None:
    with pytest.raises(BuildError, match=r"weights in float32, and .* is not: load with dtype=float32"):
        Engine(model, replace(SETTINGS, compile_steps=True))


def test_widths_that_lane_vectors_do_not_divide() -> None:
    model = random_weights(Transformer(TINY.replace(moe_intermediate_size=24)), 7)
    with pytest.raises(BuildError, match=r"in multiples of 16 .* 4: they are 64, 32, 32, 24 and 4"):
        Engine(model, replace(SETTINGS, compile_steps=True))
