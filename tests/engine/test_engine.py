"""Whatever else is served, however memory runs short, each request gets the answer it would get alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.engine.disk import DiskCache, chain
from leadline.engine.engine import Engine, Settings
from leadline.engine.prefix import WindowPolicy
from leadline.engine.request import Request, RequestError, Sampling, ThinkingBudget
from leadline.engine.runner import Piece
from leadline.engine.sequence import Finish
from leadline.model.config import TINY
from leadline.model.segment import Segment
from leadline.model.transformer import Output, Transformer
from leadline.ops.dispatch import KernelError
from leadline.ops.invariance import batch_invariant

from .conftest import Run, random_weights

GREEDY = Sampling(temperature=0.0)
POLICIES = [WindowPolicy("full"), WindowPolicy("periodic", 256), WindowPolicy("zero")]


def ids(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(TINY.vocab_size), k=count))


def assert_nothing_leaks(engine: Engine) -> None:
    """Every page is free or in the prefix cache, every slot is free."""
    memory = engine.memory
    assert memory.pool.num_free + memory.prefix.num_pages == memory.pool.num_pages
    assert memory.prefix.evictable() == memory.prefix.num_pages
    assert memory.num_free_slots == engine.settings.slots
    memory.prefix.evict(memory.pool.num_pages)
    assert memory.pool.num_free == memory.pool.num_pages
    assert memory.prefix.num_block_bytes == 0


@pytest.mark.parametrize("length", [1, 3, 4, 5, 127, 128, 129, 300])
def test_an_answer_is_that_of_the_model_without_a_state(
    model: Transformer, drain: Callable[[Engine], Run], naive: Callable[[list[int], int], list[int]], length: int
) -> None:
    engine = Engine(model, Settings(slots=2, pages=8, step_tokens=128))
    number = engine.submit(Request(ids(length), 6, GREEDY))
    run = drain(engine)
    assert run.ids(number) == naive(list(ids(length)), 6)
    assert run.finish[number] is Finish.LENGTH


@st.composite
def requests(draw: st.DrawFn) -> Request:
    # Few beginnings, so that prompts share prefixes.
    beginning = ids(draw(st.sampled_from([0, 130, 260])), draw(st.integers(0, 1)))
    end = ids(draw(st.integers(1, 40)), 10 + draw(st.integers(0, 2)))
    sampling = draw(st.sampled_from([GREEDY, Sampling(seed=1), Sampling(seed=2, top_p=0.9, presence_penalty=0.5)]))
    return Request(beginning + end, draw(st.integers(1, 12)), sampling, priority=draw(st.integers(0, 1)))


@settings(max_examples=12)
@given(
    st.lists(st.tuples(requests(), st.integers(0, 6), st.booleans()), min_size=1, max_size=6),
    st.integers(4, 9),
    st.integers(1, 3),
    st.sampled_from(POLICIES),
    st.booleans(),
)
def test_any_crowd_gets_the_answers_of_each_alone(
    model: Transformer,
    alone: Callable[[Request], list[int]],
    arrivals: list[tuple[Request, int, bool]],
    pages: int,
    slots: int,
    policy: WindowPolicy,
    speculate: bool,
) -> None:
    """Requests arrive while others run, some are cancelled on the way, memory is short."""
    chosen = Settings(slots=slots, pages=pages, step_tokens=128, policy=policy, speculate=speculate)
    engine, run = Engine(model, chosen), Run()
    numbers: list[tuple[int, Request, bool]] = []
    for request, pause, cancelled in arrivals:
        numbers.append((engine.submit(request), request, cancelled))
        for _ in range(pause):
            run.add(engine.step())
        if cancelled:
            engine.cancel(numbers[-1][0])
    while engine.busy:
        run.add(engine.step())
    for number, request, cancelled in numbers:
        expected = alone(request)
        assert run.ids(number) == expected[: len(run.ids(number))]
        if run.finish[number] is not Finish.CANCELLED:
            assert run.ids(number) == expected
        assert cancelled or run.finish[number] is not Finish.CANCELLED
        assert engine.usage(number).output_tokens == len(run.ids(number))
    assert_nothing_leaks(engine)


def test_a_sequence_that_is_pushed_out_goes_on_where_it_was(
    model: Transformer, drain: Callable[[Engine], Run], alone: Callable[[Request], list[int]]
) -> None:
    """Two answers that outgrow the pool together: one waits, and neither repeats nor loses a token."""
    both = [Request(ids(100, seed), 50, Sampling(seed=seed)) for seed in (1, 2)]
    engine = Engine(model, Settings(slots=2, pages=3, step_tokens=128, policy=WindowPolicy("zero")))
    numbers = [engine.submit(request) for request in both]
    pushed_out = 0
    run = Run()
    while engine.busy:
        run.add(engine.step())
        pushed_out += bool(engine.waiting and engine.waiting[0].num_output)
    assert pushed_out
    assert [run.ids(number) for number in numbers] == [alone(request) for request in both]
    assert_nothing_leaks(engine)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
@pytest.mark.parametrize("length", [129, 256, 257, 700])
def test_a_known_prefix_is_not_computed_again_and_changes_nothing(
    model: Transformer, drain: Callable[[Engine], Run], policy: WindowPolicy, length: int
) -> None:
    """Logits after a prefix hit, to the accuracy of float64, and the tokens that were saved."""
    request = Request(ids(length), 3, replace(GREEDY, logprobs=5))
    engine = Engine(model, Settings(slots=1, pages=16, step_tokens=256, policy=policy))
    first, second = [], []
    for tokens in (first, second):
        number = engine.submit(request)
        tokens += drain(engine).tokens[number]
        cached = engine.usage(number).cached_tokens
    window = 128 * -(-(TINY.num_hidden_layers + 1) * TINY.sliding_window // 128)
    boundary = (length - 1) // 128 * 128
    assert cached == max(0, boundary - window if policy.kind == "zero" else boundary)
    assert [token.id for token in first] == [token.id for token in second]
    for ours, theirs in zip(first, second, strict=True):
        assert ours.top is not None
        assert theirs.top is not None
        assert [value for _, value in ours.top] == pytest.approx([value for _, value in theirs.top], abs=1e-9)


def test_the_next_turn_of_a_conversation_starts_from_the_last_answer(
    model: Transformer, drain: Callable[[Engine], Run], alone: Callable[[Request], list[int]]
) -> None:
    engine = Engine(model, Settings(slots=1, pages=16))
    number = engine.submit(Request(ids(100), 60, GREEDY))
    answer = drain(engine).ids(number)
    following = Request((*ids(100), *answer, *ids(20, 5)), 8, GREEDY)
    number = engine.submit(following)
    assert drain(engine).ids(number) == alone(following)
    assert engine.usage(number).cached_tokens == 128


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
def test_a_prefix_outlives_the_engine_on_disk(
    model: Transformer, drain: Callable[[Engine], Run], tmp_path: Path, policy: WindowPolicy
) -> None:
    """A new engine begins where the old one was, for the same logits; nothing comes from another model's records."""
    request = Request(ids(700), 3, replace(GREEDY, logprobs=5))
    answers, cached = [], []
    for fingerprint in ("one", "one", "other"):
        lines: list[str] = []
        disk = DiskCache(tmp_path, fingerprint, 10**9, lines.append)
        engine = Engine(model, Settings(slots=1, pages=16, step_tokens=256, policy=policy), disk)
        number = engine.submit(request)
        answers.append(drain(engine).tokens[number])
        cached.append(engine.usage(number).cached_tokens)
        assert_nothing_leaks(engine)
        disk.close()
        assert not lines
    assert cached == [0, 512 if policy.kind == "zero" else 640, 0]
    for answer in answers[1:]:
        assert [token.id for token in answer] == [token.id for token in answers[0]]
        for ours, theirs in zip(answer, answers[0], strict=True):
            assert [value for _, value in ours.top or ()] == pytest.approx(
                [value for _, value in theirs.top or ()], abs=1e-9
            )


def test_a_damaged_record_on_disk_costs_time_and_nothing_else(
    model: Transformer, drain: Callable[[Engine], Run], alone: Callable[[Request], list[int]], tmp_path: Path
) -> None:
    request, lines = Request(ids(700), 3, GREEDY), []
    for damage in (True, False):
        disk = DiskCache(tmp_path, "", 10**9, lines.append)
        engine = Engine(model, Settings(slots=1, pages=16), disk)
        number = engine.submit(request)
        assert drain(engine).ids(number) == alone(request)
        if damage:
            links: list[bytes] = []
            engine.memory.prefix.add_links(links, request.prompt, "")
            with disk._env.begin(write=True, db=disk._records) as change:  # pyright: ignore[reportPrivateUsage]
                change.put(b"p" + links[2], b"nonsense")
        disk.close()
    assert len(lines) == 1
    assert engine.usage(number).cached_tokens == 0


def test_a_prefix_on_disk_waits_for_room_and_takes_none_while_it_waits(
    model: Transformer, drain: Callable[[Engine], Run], alone: Callable[[Request], list[int]], tmp_path: Path
) -> None:
    """Another sequence holds the pages that the prefix needs, and the beginning of it is known in memory already."""
    long, beginning, other = (
        Request(ids(1000), 3, GREEDY),
        Request(ids(300), 1, GREEDY),
        Request(ids(1200, 1), 3, GREEDY),
    )
    lines: list[str] = []
    for serves in ([long], [beginning, other, long]):
        disk = DiskCache(tmp_path, "", 10**9, lines.append)
        engine = Engine(model, Settings(slots=2, pages=14, step_tokens=128), disk)
        drain_first = engine.submit(serves[0])
        drain(engine)
        numbers = [engine.submit(request) for request in serves[1:]]
        run = drain(engine)
        assert [run.ids(number) for number in numbers] == [alone(request) for request in serves[1:]]
        assert engine.usage(drain_first).cached_tokens in (0, 256)
        cached = [engine.usage(number).cached_tokens for number in numbers]
        assert_nothing_leaks(engine)
        disk.close()
    assert cached == [0, 896]
    assert not lines


def test_the_pages_of_a_waiting_request_are_hashed_once(
    model: Transformer, drain: Callable[[Engine], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, Settings(slots=2, pages=6))
    hashed = 0

    def counted(*arguments: Any) -> bytes:
        nonlocal hashed
        hashed += 1
        return chain(*arguments)

    monkeypatch.setattr("leadline.engine.prefix.chain", counted)
    for seed in (1, 2):
        engine.submit(Request(ids(500, seed), 30, GREEDY))
    waited = 0
    while engine.busy:
        engine.step()
        waited += len(engine.waiting)
    assert waited > 20
    assert hashed == 2 * (530 // 128)


def test_a_prefix_is_not_shared_between_namespaces(model: Transformer, drain: Callable[[Engine], Run]) -> None:
    engine = Engine(model, Settings(slots=1, pages=16))
    cached = []
    for namespace in ("one", "other", "one"):
        number = engine.submit(Request(ids(200), 1, GREEDY, namespace=namespace))
        drain(engine)
        cached.append(engine.usage(number).cached_tokens)
    assert cached == [0, 0, 128]


def test_a_thinking_budget_forces_the_end_of_thinking(model: Transformer, drain: Callable[[Engine], Run]) -> None:
    end = 9
    engine = Engine(model, Settings(slots=2, pages=8))
    banned = Sampling(seed=3, logit_bias={end: -1e9})
    forced = engine.submit(Request(ids(20), 12, banned, thinking=ThinkingBudget(5, end)))
    at_once = engine.submit(Request(ids(20), 12, banned, thinking=ThinkingBudget(0, end)))
    run = drain(engine)
    assert run.ids(forced).index(end) == 5
    assert run.ids(forced).count(end) == 1
    assert run.ids(at_once).index(end) == 0
    # Who ends by himself is not interrupted again.
    likely = Sampling(temperature=0.0, logit_bias={end: 1e9})
    number = engine.submit(Request(ids(20), 4, likely, thinking=ThinkingBudget(2, end)))
    assert drain(engine).ids(number) == [end] * 4


def test_a_grammar_is_asked_at_every_token_and_told_every_token(
    model: Transformer, drain: Callable[[Engine], Run]
) -> None:
    class Ascending:
        """Only ids above the last one."""

        def __init__(self) -> None:
            self.last = 0

        def allowed(self) -> Tensor:
            return torch.arange(TINY.vocab_size) > self.last

        def accept(self, token: int) -> None:
            assert token > self.last
            self.last = token

    engine = Engine(model, Settings(slots=1, pages=8, speculate=True))
    sampling = Sampling(temperature=0.0, logit_bias={id_: -0.5 * id_ for id_ in range(TINY.vocab_size)})
    number = engine.submit(Request(ids(5), 10, sampling, mask=Ascending()))
    answer = drain(engine).ids(number)
    assert len(answer) == 10
    assert answer == sorted(set(answer))


def test_a_stop_id_ends_the_answer_and_is_its_last(
    model: Transformer, drain: Callable[[Engine], Run], alone: Callable[[Request], list[int]]
) -> None:
    whole = alone(Request(ids(9), 20, GREEDY))
    stop = whole[4]
    engine = Engine(model, Settings(slots=1, pages=4))
    number = engine.submit(Request(ids(9), 20, GREEDY, frozenset({stop})))
    run = drain(engine)
    assert run.ids(number) == whole[: whole.index(stop) + 1]
    assert run.finish[number] is Finish.STOP


def test_damaged_logits_end_their_own_sequence_only(
    model: Transformer,
    monkeypatch: pytest.MonkeyPatch,
    drain: Callable[[Engine], Run],
    alone: Callable[[Request], list[int]],
) -> None:
    good, bad = Request(ids(30), 8, GREEDY), Request(ids(31, 1), 8, GREEDY)
    engine = Engine(model, Settings(slots=2, pages=8))
    numbers = engine.submit(good), engine.submit(bad)
    run_piece = engine.runner.run

    def damage(pieces: Sequence[Piece], step: bool) -> tuple[Output | None, Tensor]:
        output, logits_NV = run_piece(pieces, step)
        if len(pieces) == 2 and pieces[0].past > 33:
            logits_NV[1] = torch.nan
        return output, logits_NV

    monkeypatch.setattr(engine.runner, "run", damage)
    run = drain(engine)
    assert run.ids(numbers[0]) == alone(good)
    assert run.finish[numbers[1]] is Finish.ERROR
    assert "NaN" in (run.errors[numbers[1]] or "")
    assert run.ids(numbers[1]) == alone(bad)[: len(run.ids(numbers[1]))]
    assert_nothing_leaks(engine)


@pytest.mark.parametrize(
    ("policy", "device"),
    [*((policy, "cpu") for policy in POLICIES), pytest.param(POLICIES[1], "cuda", marks=pytest.mark.gpu)],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_batch_invariant_logits_are_the_trainers_to_the_last_bit(policy: WindowPolicy, device: str) -> None:
    """Cold, beside others, in other chunks, after a prefix hit, with drafts, after being pushed out: in float32, with
    tolerance zero, and equal to one forward pass without a state."""
    model = random_weights(Transformer(TINY), 5).to(device)
    request = Request(ids(300), 12, replace(GREEDY, logprobs=3))
    others = [Request(ids(150 + 40 * n, n), 60, Sampling(seed=n)) for n in range(2)]
    found = []
    for slots, pages, step_tokens, speculate in ((1, 16, 512, False), (3, 16, 128, True), (3, 5, 256, False)):
        chosen = Settings(slots, pages, step_tokens=step_tokens, policy=policy, speculate=speculate)
        engine = Engine(model, replace(chosen, batch_invariant=True))
        for _ in range(2):
            run, numbers = Run(), [engine.submit(other) for other in others[: slots - 1]]
            numbers.append(engine.submit(request))
            while engine.busy:
                run.add(engine.step())
            found.append([(token.id, token.logprob, token.top) for token in run.tokens[numbers[-1]]])
    tokens = [*request.prompt, *(id_ for id_, _, _ in found[0])]
    with torch.no_grad(), batch_invariant():
        logits_TV = model.logits(model.hidden(model(Segment.of(tokens, device=device)).streams_TSD))
    log_p_TV = torch.log_softmax(logits_TV[len(request.prompt) - 1 : -1], -1)
    trainers = [float(log_p_V[id_]) for log_p_V, (id_, _, _) in zip(log_p_TV, found[0], strict=True)]
    assert [logprob for _, logprob, _ in found[0]] == trainers
    assert all(other == found[0] for other in found)


@pytest.mark.gpu
def test_what_cannot_be_batch_invariant_on_a_gpu_is_refused_at_the_start() -> None:
    with pytest.raises(KernelError, match=r"batch invariance: no kernel for torch.float64 on cuda:0: it needs Triton"):
        Engine(Transformer(TINY).double().cuda(), Settings(slots=1, pages=2, batch_invariant=True))


@pytest.mark.parametrize("failures", [1, 2])
def test_running_out_of_memory_in_a_step_loses_no_token(
    model: Transformer,
    monkeypatch: pytest.MonkeyPatch,
    drain: Callable[[Engine], Run],
    alone: Callable[[Request], list[int]],
    failures: int,
) -> None:
    """The pass breaks off half way through the layers, when some have taken the tokens in and others have not."""
    all_of_them = [Request(ids(200 + n, n), 10, Sampling(seed=n)) for n in range(3)]
    engine = Engine(model, Settings(slots=3, pages=16, step_tokens=512))
    numbers = [engine.submit(request) for request in all_of_them]
    left, calls = failures, 0

    def fail(*_: object) -> None:
        nonlocal left, calls
        calls += 1
        if left and calls % 3 == 0:
            left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore words")

    hook = model.layers[2].register_forward_pre_hook(fail)
    run = drain(engine)
    hook.remove()
    assert left == 0
    assert [run.ids(number) for number in numbers] == [alone(request) for request in all_of_them]
    assert engine.step_tokens < 512
    assert engine.num_preempted >= failures
    assert_nothing_leaks(engine)


def test_a_request_that_never_fits_in_memory_ends_alone(
    model: Transformer, drain: Callable[[Engine], Run], alone: Callable[[Request], list[int]]
) -> None:
    long, short = Request(ids(500), 5, GREEDY), Request(ids(20, 2), 5, GREEDY)
    engine = Engine(model, Settings(slots=2, pages=16, step_tokens=128))
    numbers = engine.submit(long), engine.submit(short)

    def fail(_: object, arguments: tuple[Tensor, ...]) -> None:
        if len(arguments[0]) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = model.layers[3].register_forward_pre_hook(fail)
    run = drain(engine)
    hook.remove()
    assert run.finish[numbers[0]] is Finish.ERROR
    assert "out of memory" in (run.errors[numbers[0]] or "")
    assert run.ids(numbers[1]) == alone(short)


def test_steps_grow_again_when_memory_is_enough_again(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, alone: Callable[[Request], list[int]]
) -> None:
    """Two faults at the beginning, and a third one when they have grown once; after it they wait twice as long."""
    patience = 16
    monkeypatch.setattr("leadline.engine.engine.PATIENCE_STEPS", patience)
    engine = Engine(model, Settings(slots=1, pages=16, step_tokens=512))
    passes, third = 0, 2 * patience

    def fail(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes in (1, 2, third):
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = model.layers[0].register_forward_pre_hook(fail)
    request = Request(ids(140), third + 7 * patience, GREEDY)
    engine.submit(request)
    sizes: list[int] = []
    said: list[int] = []
    while engine.busy:
        said += [token.id for event in engine.step() for token in event.tokens]
        sizes.append(engine.step_tokens)
    hook.remove()
    assert said == alone(request)
    changes = [(at, size) for at, size in enumerate(sizes, start=1) if at == 1 or size != sizes[at - 2]]
    assert changes == [
        *((1, 256), (2, 128), (2 + patience, 256), (third, 128)),
        *((third + 2 * patience, 256), (third + 6 * patience, 512)),
    ]


def test_requests_that_can_never_be_served_are_refused(model: Transformer) -> None:
    engine = Engine(model, Settings(slots=1, pages=2))
    with pytest.raises(RequestError, match="at most 255 fit"):
        engine.submit(Request(ids(256), 1))
    with pytest.raises(RequestError, match="holds token 256"):
        engine.submit(Request((1, 256), 1))
    with pytest.raises(RequestError, match="the prompt is empty"):
        Request((), 1)
    with pytest.raises(RequestError, match="max_tokens is 0"):
        Request((1,), 0)
    assert not engine.busy


def test_priority_goes_first(model: Transformer) -> None:
    engine = Engine(model, Settings(slots=1, pages=8))
    numbers = [engine.submit(Request(ids(10), 3, GREEDY, priority=priority)) for priority in (1, 2, 0)]
    ended = [event.sequence for _ in range(20) for event in engine.step() if event.finish]
    assert ended == [numbers[2], numbers[0], numbers[1]]
