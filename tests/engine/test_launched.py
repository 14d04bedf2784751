"""With steps launched ahead, every answer and everything that is kept is what it is without, to the last bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.engine.engine import Engine, Settings
from leadline.engine.launched import Launched
from leadline.engine.prefix import Node, WindowPolicy
from leadline.engine.request import Request, Sampling, ThinkingBudget
from leadline.engine.runner import Runner
from leadline.engine.sequence import Finish, Token
from leadline.model.config import TINY
from leadline.model.transformer import Transformer

from .conftest import Run, random_weights

GREEDY = Sampling(temperature=0.0)
POLICIES = [WindowPolicy("full"), WindowPolicy("periodic", 256), WindowPolicy("zero")]
AHEAD = Settings(slots=3, pages=16, step_tokens=128, overlap=True)


def ids(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(TINY.vocab_size), k=count))


@pytest.fixture(scope="module")
def exact() -> Transformer:
    """Weights in float32, for batch-invariant engines."""
    return random_weights(Transformer(TINY), 7)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences of each step that is launched ahead, from now on."""
    found: list[int] = []
    decode = Runner.decode

    def counted(runner: Runner, tokens_N: Tensor, past: list[int], slots: list[int]) -> Tensor:
        found.append(len(past))
        return decode(runner, tokens_N, past, slots)

    monkeypatch.setattr(Runner, "decode", counted)
    return found


@pytest.fixture(scope="module")
def plain(exact: Transformer) -> Callable[[Request], list[Token]]:
    """plain(request): its tokens with logprobs when it is served alone and nothing is launched ahead. Remembered."""
    known: dict[tuple[object, ...], list[Token]] = {}

    def solo(request: Request) -> list[Token]:
        key = request.prompt, request.max_tokens, request.sampling, request.stop_ids, request.thinking
        if key not in known:
            engine, run = Engine(exact, Settings(slots=1, pages=16, batch_invariant=True)), Run()
            number = engine.submit(request)
            while engine.busy:
                run.add(engine.step())
            known[key] = run.tokens[number]
        return known[key]

    return solo


def kept(engine: Engine) -> dict[bytes, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Of each page of the prefix cache, by its name: what it holds, and the fixed block at its end if there is one."""
    nodes: list[Node] = [engine.memory.prefix.root("")]
    for node in nodes:
        nodes += node.children.values()
    tensors = engine.memory.state.page_tensors().items()
    return {
        node.link: ({name: tensor[node.page] for name, tensor in tensors}, node.block.tensors if node.block else {})
        for node in nodes[1:]
    }


def assert_kept_is_what_a_prompt_leaves(engine: Engine, texts: list[tuple[int, ...]]) -> None:
    """The prefix cache equals, bit for bit, that of an engine which reads the texts as prompts, one page at a time."""
    chosen = Settings(slots=1, pages=64, policy=POLICIES[0], batch_invariant=True)
    cold = Engine(engine.runner.model, chosen)
    for text in texts:
        cold.submit(Request((*text, 0), 1, GREEDY))
    while cold.busy:
        cold.step()
    expected = kept(cold)
    for link, parts in kept(engine).items():
        for part, wanted in zip(parts, expected[link], strict=True):
            for name, tensor in part.items():
                assert torch.equal(tensor, wanted[name]), name


@st.composite
def requests(draw: st.DrawFn) -> Request:
    # Few beginnings, so that prompts share prefixes; ends of pages are near.
    beginning = ids(draw(st.sampled_from([0, 120, 250])), draw(st.integers(0, 1)))
    end = ids(draw(st.integers(1, 12)), 10 + draw(st.integers(0, 2)))
    sampling = draw(
        st.sampled_from(
            [
                GREEDY,
                Sampling(seed=1, logprobs=2),
                Sampling(seed=2, top_p=0.9, logit_bias={3: 2.0}),
                Sampling(seed=3, min_p=0.01, logprobs=0),
                Sampling(seed=4, presence_penalty=0.5),
            ]
        )
    )
    stops = frozenset(draw(st.sampled_from([(), range(40), range(120)])))
    thinking = draw(st.sampled_from([None, None, ThinkingBudget(3, 7)]))
    return Request(beginning + end, draw(st.integers(1, 14)), sampling, stops, draw(st.integers(0, 1)), thinking)


@settings(max_examples=15)
@given(
    st.lists(st.tuples(requests(), st.integers(0, 8), st.integers(0, 5)), min_size=1, max_size=6),
    st.integers(4, 12),
    st.integers(1, 3),
    st.sampled_from(POLICIES),
)
def test_any_crowd_gets_the_same_bits_and_leaves_the_same_behind(
    exact: Transformer,
    plain: Callable[[Request], list[Token]],
    arrivals: list[tuple[Request, int, int]],
    pages: int,
    slots: int,
    policy: WindowPolicy,
) -> None:
    """Requests arrive while others run, some are cancelled on the way, some stop early, memory is short."""
    chosen = replace(AHEAD, slots=slots, pages=pages, policy=policy, batch_invariant=True)
    engine, run = Engine(exact, chosen), Run()
    numbers: list[tuple[int, Request, bool]] = []
    for request, pause, cancels in arrivals:
        numbers.append((engine.submit(request), request, cancels == 0))
        for _ in range(pause):
            run.add(engine.step())
        if cancels == 0:
            engine.cancel(numbers[-1][0])
    while engine.busy:
        run.add(engine.step())
    texts: list[tuple[int, ...]] = []
    for number, request, cancelled in numbers:
        answer = run.tokens[number]
        expected = plain(request)
        assert answer == (expected[: len(answer)] if run.finish[number] is Finish.CANCELLED else expected)
        assert cancelled or run.finish[number] is not Finish.CANCELLED
        assert engine.usage(number).output_tokens == len(answer)
        texts.append((*request.prompt, *run.ids(number)))
    assert_kept_is_what_a_prompt_leaves(engine, texts)
    memory = engine.memory
    assert memory.num_free_slots == slots
    assert memory.pool.num_free + memory.prefix.num_pages == pages


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
@pytest.mark.parametrize("length", [125, 126, 127, 128])
def test_a_page_that_fills_while_the_step_behind_runs_is_kept_as_it_was(
    exact: Transformer, plain: Callable[[Request], list[Token]], ahead: list[int], policy: WindowPolicy, length: int
) -> None:
    """The end of the page falls before, on and behind the last tokens of an answer that ends by itself; another one
    crosses it."""
    engine, run = Engine(exact, replace(AHEAD, step_tokens=512, policy=policy, batch_invariant=True)), Run()
    ends = Request(ids(length), 8, Sampling(seed=5))
    ends = replace(ends, stop_ids=frozenset({plain(ends)[2].id}))
    both = [ends, Request(ids(length + 1, 1), 8, Sampling(seed=1, logprobs=1))]
    numbers = [engine.submit(request) for request in both]
    while engine.busy:
        run.add(engine.step())
    assert [run.tokens[number] for number in numbers] == [plain(request) for request in both]
    assert 2 in ahead
    texts = [(*request.prompt, *run.ids(number)) for request, number in zip(both, numbers, strict=True)]
    assert_kept_is_what_a_prompt_leaves(engine, texts)
    following = Request((*texts[1], 5), 3, Sampling(seed=1, logprobs=1))
    number = engine.submit(following)
    while engine.busy:
        run.add(engine.step())
    assert run.tokens[number] == plain(following)
    assert engine.usage(number).cached_tokens == (0 if policy.kind == "zero" else 128)


def test_a_step_is_launched_ahead_of_every_token_but_the_first(
    model: Transformer, drain: Callable[[Engine], Run], alone: Callable[[Request], list[int]], ahead: list[int]
) -> None:
    """The first token comes with the prompt, the second with a step of its own; a stop id costs one row."""
    request = Request(ids(9), 20, GREEDY)
    engine = Engine(model, AHEAD)
    number = engine.submit(request)
    assert drain(engine).ids(number) == alone(request)
    assert ahead == [1] * 18
    ahead.clear()
    whole = alone(request)
    engine.submit(replace(request, stop_ids=frozenset({whole[4]})))
    run = drain(engine)
    assert run.finish == {1: Finish.STOP}
    assert run.ids(1) == whole[: whole.index(whole[4]) + 1]
    assert len(ahead) == len(run.ids(1)) - 1


def test_between_two_steps_nothing_is_told_of_the_one_that_is_launched(model: Transformer, ahead: list[int]) -> None:
    engine = Engine(model, AHEAD)
    number = engine.submit(Request(ids(9), 20, GREEDY))
    said: list[int] = []
    for step in range(1, 6):
        said += [token.id for event in engine.step() for token in event.tokens]
        assert engine.output(number) == said
        assert engine.usage(number).output_tokens == len(said) == step
        assert engine.seen(number) == 9 + step - 1
    assert len(ahead) == 4
    engine.cancel(number)
    assert engine.memory.num_free_slots == AHEAD.slots
    (event,) = engine.step()
    assert event.finish is Finish.CANCELLED
    assert engine.usage(number).output_tokens == 5
    assert not engine.busy


@pytest.mark.parametrize(
    ("request_", "launched"),
    [
        (Request(ids(9), 8, replace(GREEDY, repetition_penalty=1.1)), 0),
        (Request(ids(9), 8, replace(GREEDY, logit_bias={3: 1.0}, logprobs=3)), 6),
        # The step that may have to force the end of thinking waits, and so does the one behind it.
        (Request(ids(9), 8, GREEDY, thinking=ThinkingBudget(3, 7)), 4),
    ],
)
def test_a_step_waits_where_more_must_be_known_of_a_token(
    model: Transformer,
    drain: Callable[[Engine], Run],
    alone: Callable[[Request], list[int]],
    ahead: list[int],
    request_: Request,
    launched: int,
) -> None:
    engine = Engine(model, AHEAD)
    number = engine.submit(request_)
    assert drain(engine).ids(number) == alone(request_)
    assert len(ahead) == launched


def test_a_grammar_makes_the_step_wait(model: Transformer, drain: Callable[[Engine], Run], ahead: list[int]) -> None:
    class Anything:
        def allowed(self) -> Tensor | None:
            return None

        def accept(self, token: int) -> None:
            del token

    engine = Engine(model, AHEAD)
    engine.submit(Request(ids(9), 8, GREEDY, mask=Anything()))
    engine.submit(Request(ids(9, 1), 12, GREEDY))
    assert len(drain(engine).ids(1)) == 12
    assert ahead == [1] * 4  # when the grammar's answer has ended


def test_who_waits_without_a_chance_does_not_hold_the_others_up(
    model: Transformer, drain: Callable[[Engine], Run], alone: Callable[[Request], list[int]], ahead: list[int]
) -> None:
    """Neither for a slot nor for pages; and he comes in as soon as somebody has ended."""
    for chosen in (replace(AHEAD, slots=1), replace(AHEAD, pages=4)):
        engine = Engine(model, chosen)
        both = [Request(ids(200), 12, GREEDY), Request(ids(210, 1), 12, GREEDY)]
        numbers = [engine.submit(request) for request in both]
        run = Run()
        while engine.busy:
            run.add(engine.step())
            assert len(engine.running) <= 1
        assert [run.ids(number) for number in numbers] == [alone(request) for request in both]
        assert len(ahead) >= 18
        ahead.clear()


@pytest.mark.parametrize("at", [1, 3, 8, 12])
def test_running_out_of_memory_in_a_step_launched_ahead_loses_no_token(
    model: Transformer,
    drain: Callable[[Engine], Run],
    alone: Callable[[Request], list[int]],
    ahead: list[int],
    at: int,
) -> None:
    """The step breaks off half way through the layers, when some have taken the tokens in and others have not."""
    both = [Request(ids(100 + 20 * n, n), 14, Sampling(seed=n)) for n in range(2)]
    engine = Engine(model, replace(AHEAD, step_tokens=512))
    failed = 0

    def fail(*_: object) -> None:
        nonlocal failed
        if len(ahead) == at and not failed:
            failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore words")

    hook = model.layers[2].register_forward_pre_hook(fail)
    numbers = [engine.submit(request) for request in both]
    run = drain(engine)
    hook.remove()
    assert failed == 1
    assert engine.num_preempted >= 1
    assert [run.ids(number) for number in numbers] == [alone(request) for request in both]
    assert engine.memory.num_free_slots == AHEAD.slots


def test_an_error_in_a_step_launched_ahead_loses_no_token(
    model: Transformer, drain: Callable[[Engine], Run], alone: Callable[[Request], list[int]], ahead: list[int]
) -> None:
    request = Request(ids(120), 14, Sampling(seed=1))
    engine, run = Engine(model, AHEAD), Run()

    def fail(*_: object) -> None:
        if len(ahead) == 4:
            raise RuntimeError("the machine is ill")

    hook = model.layers[2].register_forward_pre_hook(fail)
    number = engine.submit(request)
    for _ in range(4):
        run.add(engine.step())
    with pytest.raises(RuntimeError, match="the machine is ill"):
        engine.step()
    hook.remove()
    assert engine.output(number) == alone(request)[:5]
    assert run.ids(number) == alone(request)[:4]
    while engine.busy:
        run.add(engine.step())
    assert run.ids(number) == alone(request)


def test_damaged_logits_of_a_step_launched_ahead_end_their_own_sequence_only(
    model: Transformer,
    monkeypatch: pytest.MonkeyPatch,
    drain: Callable[[Engine], Run],
    alone: Callable[[Request], list[int]],
) -> None:
    good, bad = Request(ids(120), 12, GREEDY), Request(ids(124, 1), 12, GREEDY)
    engine = Engine(model, AHEAD)
    numbers = engine.submit(good), engine.submit(bad)
    decode = engine.runner.decode

    def damage(tokens_N: Tensor, past: list[int], slots: list[int]) -> Tensor:
        logits_NV = decode(tokens_N, past, slots)
        if len(past) == 2 and past[1] == 127:
            logits_NV[1] = torch.nan
        return logits_NV

    monkeypatch.setattr(engine.runner, "decode", damage)
    run = drain(engine)
    assert run.ids(numbers[0]) == alone(good)
    assert run.finish[numbers[1]] is Finish.ERROR
    assert run.ids(numbers[1]) == alone(bad)[:4]
    # The page that was full then is nobody's.
    assert engine.memory.prefix.num_pages == 1


def test_not_together_with_drafts(model: Transformer) -> None:
    with pytest.raises(ValueError, match="overlap and speculate exclude each other"):
        Engine(model, replace(AHEAD, speculate=True))


def test_on_the_cpu_nothing_is_launched_ahead_by_itself(
    model: Transformer, drain: Callable[[Engine], Run], ahead: list[int]
) -> None:
    engine = Engine(model, replace(AHEAD, overlap=None))
    engine.submit(Request(ids(9), 5, GREEDY))
    drain(engine)
    assert not ahead


CARD = TINY.replace(head_dim=64, qk_rope_head_dim=32, index_head_dim=128)
KINDS = [
    replace(GREEDY, logprobs=2),
    Sampling(seed=1, top_p=0.9, temperature=0.7),
    Sampling(seed=2, logit_bias={3: 1.0}),
]


def on_a_card(
    monkeypatch: pytest.MonkeyPatch, overlap: bool | None, stops: frozenset[int], watched: bool = False
) -> tuple[Run, int]:
    """Three answers through captured steps, over ends of pages; and how many steps were launched ahead. watched: torch
    raises an error when the host waits for the card while one is launched."""
    model = random_weights(Transformer(CARD), 7).cuda()
    engine, run, launched = Engine(model, Settings(3, 16, step_tokens=1024, overlap=overlap)), Run(), 0
    launch = engine._launch_behind  # pyright: ignore[reportPrivateUsage]

    def watch(before: Launched) -> Launched | None:
        nonlocal launched
        # The first ones are captured, for which torch waits.
        torch.cuda.set_sync_debug_mode("error" if watched and launched > 2 else "default")
        try:
            behind = launch(before)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        launched += behind is not None
        return behind

    monkeypatch.setattr(engine, "_launch_behind", watch)
    for number, (length, sampling) in enumerate(zip((250, 130, 300), KINDS, strict=True)):
        engine.submit(Request(ids(length, number), 24, sampling, stops))
    while engine.busy:
        run.add(engine.step())
    return run, launched


@pytest.mark.gpu
def test_on_a_card_steps_are_launched_ahead_and_the_host_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, launched = on_a_card(monkeypatch, False, frozenset())
    assert launched == 0
    found, launched = on_a_card(monkeypatch, None, frozenset(), watched=True)
    assert launched > 20
    assert found.tokens == expected.tokens


@pytest.mark.gpu
def test_on_a_card_a_row_too_many_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stops = frozenset(range(30))
    expected, _ = on_a_card(monkeypatch, False, stops)
    found, launched = on_a_card(monkeypatch, None, stops)
    assert launched > 2
    assert Finish.STOP in found.finish.values()
    assert found.finish == expected.finish
    assert [found.ids(number) for number in range(3)] == [expected.ids(number) for number in range(3)]
