"""Drafts change no token, whatever they are: those of the MTP block, of the draft stages, right, wrong and damaged."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leadline.engine.drafter import DSparkDrafter, Fed, Guess, MTPDrafter, drafter_of
from leadline.engine.engine import Engine, Settings
from leadline.engine.native import NativeSteps
from leadline.engine.prefix import WindowPolicy
from leadline.engine.request import Request, Sampling, ThinkingBudget
from leadline.engine.runner import Runner
from leadline.engine.sampler import draw, draw_of
from leadline.engine.sequence import Finish, Sequence
from leadline.model.config import TINY
from leadline.model.init import initialize
from leadline.model.segment import Segment
from leadline.model.state import State
from leadline.model.transformer import Output, Transformer
from leadline.weights.synthetic import DRAFT_BLOCK, few_layers

from .conftest import Run, random_weights

GREEDY = Sampling(temperature=0.0)
SAMPLINGS = [GREEDY, Sampling(seed=1), Sampling(seed=2, top_p=0.9, presence_penalty=0.5, repetition_penalty=1.2)]
POLICIES = [WindowPolicy("full"), WindowPolicy("periodic", 256), WindowPolicy("zero")]


def ids(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(TINY.vocab_size), k=count))


def with_stages(trunk: Transformer, seed: int) -> Transformer:
    """The same trunk, with random draft stages in the place of the MTP block."""
    model = Transformer(few_layers(TINY, TINY.num_hidden_layers, draft_stages=True)).to(trunk.embed.weight.dtype)
    random_weights(model, seed)
    shared = {name: tensor for name, tensor in trunk.state_dict().items() if not name.startswith("mtp.")}
    assert not model.load_state_dict(shared, strict=False).unexpected_keys
    with torch.no_grad():  # else every confidence is 0 or 1
        model.mtp[-1].get_parameter("confidence_head.proj.weight").mul_(0.02)
    return model


@pytest.fixture(scope="module")
def spark(model: Transformer) -> Transformer:
    return with_stages(model, 8)


class Oracle:
    """Guesses that are right or wrong as a seed decides, of any length."""

    name = "oracle"

    def __init__(self, length: int, answers: dict[int, list[int]], seed: int, share_right: float):
        self.length, self.answers, self.share_right = length, answers, share_right
        self.random = random.Random(seed)

    def guess(self, runner: Runner, output: Output, fed: Fed) -> list[tuple[Sequence, Guess]]:
        found: list[tuple[Sequence, Guess]] = []
        for sequence, piece in fed:
            if piece.wanted and sequence.slot is not None:
                coming = self.answers[sequence.number][sequence.num_output :][: self.random.randint(0, self.length)]
                drafts = [
                    token if self.random.random() < self.share_right else (token + 1) % TINY.vocab_size
                    for token in coming
                ]
                found.append((sequence, Guess(tuple(drafts), (1.0,) * len(drafts))))
        return found


@contextmanager
def oracle_of(engine: Engine, answers: dict[int, list[int]], seed: int, share_right: float) -> Iterator[None]:
    assert engine.drafter is not None
    engine.drafter = Oracle(engine.drafter.length, answers, seed, share_right)
    yield


def settle(engine: Engine, run: Run) -> None:
    while engine.busy:
        run.add(engine.step())


def assert_nothing_leaks(engine: Engine) -> None:
    memory = engine.memory
    assert memory.pool.num_free + memory.prefix.num_pages == memory.pool.num_pages
    assert memory.num_free_slots == engine.settings.slots
    memory.prefix.evict(memory.pool.num_pages)
    assert memory.pool.num_free == memory.pool.num_pages
    assert memory.prefix.num_block_bytes == 0


def test_the_weights_decide_who_drafts(model: Transformer, spark: Transformer) -> None:
    assert isinstance(drafter_of(model), MTPDrafter)
    assert isinstance(drafter_of(spark), DSparkDrafter)
    assert drafter_of(spark).length == DRAFT_BLOCK
    with pytest.raises(ValueError, match="speculation needs the MTP block or the draft stages"):
        Engine(Transformer(TINY, with_mtp=False), Settings(speculate=True))
    with pytest.raises(ValueError, match="draft_cost is -1"):
        Engine(spark, Settings(speculate=True, draft_cost=-1))


@st.composite
def requests(draw: st.DrawFn) -> Request:
    beginning = ids(draw(st.sampled_from([0, 120, 250])), draw(st.integers(0, 1)))  # few, so that prompts share them
    end = ids(draw(st.integers(1, 20)), 10 + draw(st.integers(0, 2)))
    sampling, count = draw(st.sampled_from(SAMPLINGS)), draw(st.sampled_from([1, 2, 5, 6, 7, 30]))
    return Request(beginning + end, count, sampling, priority=draw(st.integers(0, 1)))


@settings(max_examples=25)
@given(
    st.lists(st.tuples(requests(), st.integers(0, 6)), min_size=1, max_size=5),
    st.integers(4, 9),
    st.integers(1, 3),
    st.sampled_from(POLICIES),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.sampled_from([128, 200, 512]),
    st.integers(0, 99),
)
def test_any_pattern_of_right_and_wrong_gives_the_tokens_of_plain_decoding(
    spark: Transformer,
    alone: Callable[[Request], list[int]],
    arrivals: list[tuple[Request, int]],
    pages: int,
    slots: int,
    policy: WindowPolicy,
    share_right: float,
    step_tokens: int,
    seed: int,
) -> None:
    """Requests arrive while others run and share prefixes, slots are used again, sequences are pushed out in the middle
    of their drafts."""
    chosen = Settings(slots=slots, pages=pages, step_tokens=step_tokens, policy=policy, speculate=True)
    engine, run, numbers = Engine(spark, chosen), Run(), []
    answers: dict[int, list[int]] = {}
    with oracle_of(engine, answers, seed, share_right):
        for request, pause in arrivals:
            numbers.append(engine.submit(request))
            answers[numbers[-1]] = alone(request)
            for _ in range(pause):
                run.add(engine.step())
        settle(engine, run)
    for number in numbers:
        usage = engine.usage(number)
        assert run.ids(number) == answers[number]
        assert all(right <= drafted for right, drafted in zip(usage.accepted, usage.drafted, strict=True))
        assert list(usage.drafted) == sorted(usage.drafted, reverse=True)
        assert usage.num_accepted < max(1, usage.output_tokens)
        if share_right == 1.0:
            assert usage.accepted == usage.drafted
    assert_nothing_leaks(engine)


@settings(max_examples=12)
@given(
    st.lists(st.tuples(requests(), st.integers(0, 6), st.booleans()), min_size=1, max_size=5),
    st.integers(4, 9),
    st.integers(1, 3),
    st.sampled_from(POLICIES),
    st.sampled_from([0.0, 0.3]),
)
def test_the_stages_change_no_token_of_any_crowd(
    spark: Transformer,
    alone: Callable[[Request], list[int]],
    arrivals: list[tuple[Request, int, bool]],
    pages: int,
    slots: int,
    policy: WindowPolicy,
    draft_cost: float,
) -> None:
    chosen = Settings(slots, pages, step_tokens=128, policy=policy, speculate=True, draft_cost=draft_cost)
    engine, run, numbers = Engine(spark, chosen), Run(), []
    for request, pause, cancelled in arrivals:
        numbers.append((engine.submit(request), request, cancelled))
        for _ in range(pause):
            run.add(engine.step())
        if cancelled:
            engine.cancel(numbers[-1][0])
    settle(engine, run)
    for number, request, cancelled in numbers:
        expected = alone(request)
        assert run.ids(number) == (expected[: len(run.ids(number))] if cancelled else expected)
    assert_nothing_leaks(engine)


@pytest.mark.parametrize("seed", range(2))
def test_drafts_of_one_token_change_none(model: Transformer, alone: Callable[[Request], list[int]], seed: int) -> None:
    """Those of the MTP block: greedy and sampled, across window and entry borders."""
    both = [Request(ids(110 + seed, 3), 40, GREEDY), Request(ids(3 + seed, 4), 30, Sampling(seed=seed, top_p=0.95))]
    engine, run = Engine(model, Settings(slots=2, pages=16, step_tokens=128, speculate=True)), Run()
    numbers = [engine.submit(request) for request in both]
    with oracle_of(engine, {n: alone(r) for n, r in zip(numbers, both, strict=True)}, seed, 0.5):
        settle(engine, run)
    assert [run.ids(number) for number in numbers] == [alone(request) for request in both]
    for number in numbers:
        usage = engine.usage(number)
        assert 0 < usage.num_accepted < usage.num_drafted
        assert len(usage.drafted) == 1
    assert_nothing_leaks(engine)


def test_a_sequence_is_pushed_out_in_the_middle_of_its_drafts(
    spark: Transformer, alone: Callable[[Request], list[int]]
) -> None:
    """Two answers that outgrow the pool together: drafts are forgotten, and no token is lost or said twice."""
    both = [Request(ids(100, seed), 60, Sampling(seed=seed)) for seed in (1, 2)]
    chosen = Settings(slots=2, pages=3, step_tokens=128, policy=WindowPolicy("zero"), speculate=True)
    engine, run = Engine(spark, chosen), Run()
    numbers = [engine.submit(request) for request in both]
    with oracle_of(engine, {n: alone(r) for n, r in zip(numbers, both, strict=True)}, 5, 0.8):
        settle(engine, run)
    assert engine.num_preempted
    assert [run.ids(number) for number in numbers] == [alone(request) for request in both]
    assert all(engine.usage(number).num_accepted > 20 for number in numbers)
    assert_nothing_leaks(engine)


@pytest.mark.parametrize("at", range(7))
def test_a_stop_id_inside_of_a_block_ends_the_answer_there(
    spark: Transformer, alone: Callable[[Request], list[int]], at: int
) -> None:
    whole = alone(Request(ids(9), 30, GREEDY))
    stop = whole[at]
    engine, run = Engine(spark, Settings(slots=1, pages=4, speculate=True)), Run()
    number = engine.submit(Request(ids(9), 30, GREEDY, frozenset({stop})))
    with oracle_of(engine, {number: whole}, 0, 1.0):
        settle(engine, run)
    assert run.ids(number) == whole[: whole.index(stop) + 1]
    assert run.finish[number] is Finish.STOP
    assert engine.usage(number).num_accepted < len(run.ids(number))
    assert_nothing_leaks(engine)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 11])
def test_max_tokens_ends_an_answer_inside_of_a_block(
    spark: Transformer, alone: Callable[[Request], list[int]], count: int
) -> None:
    """No draft is verified that could not be said any more; the sequence's last place in memory may be in the block."""
    request = Request(ids(256 - count), count, GREEDY)
    engine, run = Engine(spark, Settings(slots=1, pages=3, max_tokens=256, speculate=True)), Run()
    number = engine.submit(request)
    settle(engine, run)  # with the drafts of the stages
    assert run.ids(number) == alone(request)
    number = engine.submit(request)
    with oracle_of(engine, {number: alone(Request(ids(256 - count), 40, GREEDY))}, 0, 1.0):
        settle(engine, run)
    assert run.ids(number) == alone(request)
    assert run.finish[number] is Finish.LENGTH
    usage = engine.usage(number)
    assert usage.num_drafted == usage.num_accepted < count


def test_a_thinking_budget_has_its_word_where_drafts_would_run_over_it(
    spark: Transformer, alone: Callable[[Request], list[int]]
) -> None:
    end = 9
    sampling = Sampling(seed=3, logit_bias={end: -1e9})
    free = alone(Request(ids(20), 40, sampling))
    for budget in (0, 1, 4, 5, 6, 7, 13):
        request = Request(ids(20), 20, sampling, thinking=ThinkingBudget(budget, end))
        plain, found = Run(), Run()
        engine = Engine(spark, Settings(slots=1, pages=4))
        number = engine.submit(request)
        settle(engine, plain)
        engine = Engine(spark, Settings(slots=1, pages=4, speculate=True))
        assert engine.submit(request) == number
        with oracle_of(engine, {number: [*free[:budget], *plain.ids(number)[budget:]]}, budget, 0.9):
            settle(engine, found)
        assert found.ids(number) == plain.ids(number)
        assert found.ids(number).index(end) == budget


def test_the_next_turn_starts_from_an_answer_that_was_drafted(
    spark: Transformer, alone: Callable[[Request], list[int]]
) -> None:
    """Prefix hits behind accepted blocks: the fixed block at a page's end was kept, and is that of plain decoding."""
    engine, run = Engine(spark, Settings(slots=1, pages=16, speculate=True)), Run()
    first = Request(ids(100), 60, GREEDY)
    answers = {0: alone(first)}
    with oracle_of(engine, answers, 1, 0.8):
        number = engine.submit(first)
        settle(engine, run)
        following = Request((*ids(100), *run.ids(number), *ids(20, 5)), 40, Sampling(seed=6))
        answers[1] = alone(following)
        number = engine.submit(following)
        settle(engine, run)
    assert run.ids(number) == alone(following)
    assert engine.usage(number).cached_tokens == 128


def test_batch_invariant_tokens_and_logprobs_are_the_same_bits_with_drafts() -> None:
    """Greedy and sampled, beside others and after a prefix hit: equal to plain decoding alone, with tolerance zero."""
    trunk = random_weights(Transformer(TINY), 5)
    spark = with_stages(trunk, 6)
    for sampling in (GREEDY, Sampling(seed=4, top_p=0.95)):
        request = Request(ids(150), 14, replace(sampling, logprobs=3))
        plain, number = Run(), 0
        engine = Engine(trunk, Settings(slots=1, pages=8, batch_invariant=True))
        engine.submit(request)
        settle(engine, plain)
        wanted = [(token.id, token.logprob, token.top) for token in plain.tokens[number]]
        answers = {n: plain.ids(number) for n in range(9)}
        for share_right in (0.6, None):
            engine = Engine(spark, Settings(slots=2, pages=16, step_tokens=128, speculate=True, batch_invariant=True))
            if share_right is not None:
                assert engine.drafter is not None
                engine.drafter = Oracle(engine.drafter.length, answers, 2, share_right)
            for _ in range(2):
                run = Run()
                engine.submit(Request(ids(40, 2), 20, Sampling(seed=9)))
                number = engine.submit(request)
                settle(engine, run)
                assert [(token.id, token.logprob, token.top) for token in run.tokens[number]] == wanted
        number = 0


def test_the_mtp_block_drafts_what_it_drafts_without_a_state(model: Transformer) -> None:
    """The window of the MTP block moves along through chunks, single tokens, and wrong drafts."""
    engine = Engine(model, Settings(slots=1, pages=8, step_tokens=128, speculate=True))
    number = engine.submit(Request(ids(150), 16, GREEDY))
    guesses: dict[int, int] = {}
    tokens: list[int] = []
    while engine.busy:
        engine.step()
        for sequence in engine.running:
            if sequence.drafts:
                (guesses[len(sequence.tokens)],) = sequence.drafts
                tokens = sequence.tokens
    assert len(guesses) > 10
    for length, guess in guesses.items():
        with torch.no_grad():
            output = model(Segment.of(tokens[: length - 1]))
            hidden_TD, _ = model.predict_second(output, torch.tensor(tokens[1:length]))
            assert int(model.logits(hidden_TD[-1:]).argmax()) == guess
    assert engine.usage(number).num_drafted > 10


@torch.no_grad()
def block_of(spark: Transformer, sequence: Sequence) -> tuple[list[int], list[float]]:
    """Drafts and survivals behind a sequence, from a state that takes its tokens in at once."""
    sequence = copy(sequence)  # without its drafts, which do not count as said
    sequence.propose((), ())
    past, stages = len(sequence.tokens) - 1, spark.dspark
    assert stages is not None
    state = State(spark.config, 1, past, spare_tokens=DRAFT_BLOCK, dtype=spark.embed.weight.dtype)
    spark(Segment.of(sequence.tokens[:-1]), state)
    blocks = spark.draft(Segment.of(sequence.tokens[-1:], past=[past]), state)
    previous, survival = torch.tensor(sequence.tokens[-1:]), 1.0
    drafts: list[int] = []
    survivals: list[float] = []
    for place in range(DRAFT_BLOCK):
        survival *= float(stages.confidence(blocks.h_NBD[:, place], previous))
        logits_NV = blocks.logits_NBV[:, place] + stages.markov_bias(previous)
        (token,) = draw(logits_NV, [draw_of(sequence, place)]).tokens()
        assert token is not None
        drafts.append(token.id)
        survivals.append(survival)
        previous = torch.tensor([token.id])
    return drafts, survivals


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "shaped"])
def test_the_stages_draft_what_they_draft_from_a_fresh_state(spark: Transformer, sampling: Sampling) -> None:
    """Their windows move along through chunks, steps, wrong drafts and a prefix hit."""
    engine = Engine(spark, Settings(slots=1, pages=8, step_tokens=128, speculate=True))
    for _ in range(2):
        number, guessed = engine.submit(Request(ids(150), 10, sampling)), 0
        while engine.busy:
            engine.step()
            for sequence in engine.running:
                if sequence.drafts:
                    drafts, survivals = block_of(spark, sequence)
                    assert sequence.survival == pytest.approx(survivals, rel=1e-6)
                    assert list(sequence.drafts) == drafts
                    guessed += 1
        assert guessed > 5
        assert 0 < len(engine.usage(number).drafted) <= DRAFT_BLOCK


@torch.no_grad()
def test_native_steps_move_the_windows_of_the_stages(spark: Transformer) -> None:
    """Else drafts would get worse in silence: no token changes."""
    spark = deepcopy(spark).float()
    windows: list[dict[str, torch.Tensor]] = []
    for native in (False, True):
        state = State(spark.config, 2, pages=4, max_tokens=256, spare_tokens=DRAFT_BLOCK)
        state.assign(0, [3, 1])
        state.assign(1, [2])
        spark(Segment.of(ids(30)), state)
        if native:
            NativeSteps(spark, state, drafts=True).run(torch.tensor([1, 2, 3]), [30], [0])
        else:
            spark(Segment.of((1, 2, 3), past=[30]), state)
        windows.append({name: tensor[0] for name, tensor in state.fixed_tensors().items() if name.startswith("mtp.")})
    for name, tensor in windows[0].items():
        assert tensor.any(), name
        torch.testing.assert_close(windows[1][name], tensor, rtol=1e-4, atol=1e-5)


def rigged() -> Transformer:
    """A trunk whose next token is a function of the last, and stages that know it: every block is the identity, the
    vocabulary head reads the next token's embedding out of this one's, and the Markov head has the same table."""
    model = Transformer(few_layers(TINY, TINY.num_hidden_layers, draft_stages=True))
    initialize(model, 1)
    vocabulary, width = TINY.vocab_size, TINY.hidden_size
    following = torch.tensor(random.Random(3).sample(range(vocabulary), vocabulary))
    stages = model.dspark
    assert stages is not None
    with torch.no_grad():
        codes_VD = torch.nn.functional.normalize(torch.randn(vocabulary, width), dim=1)
        model.embed.weight.copy_(codes_VD)
        model.head.weight[following] = 40 * codes_VD
        markov = stages[-1].get_submodule("markov_head")
        w1_VY, w2_VY = markov.get_parameter("markov_w1.weight"), markov.get_parameter("markov_w2.weight")
        w1_VY.copy_(torch.nn.functional.normalize(torch.randn(w1_VY.shape), dim=1))
        w2_VY[following] = 1e5 * w1_VY
        stages[-1].get_parameter("confidence_head.proj.weight").zero_()[0, -1] = 1.0
        stages.get_parameter(f"{len(stages) - 1}.norm.weight").fill_(0.0)  # nothing but the Markov head has a say
    return model


def test_stages_that_know_the_next_tokens_are_accepted_whole() -> None:
    """n tokens in about n / (B + 1) steps, greedy and sampled alike."""
    model = rigged()
    for sampling in (GREEDY, Sampling(seed=3)):
        request = Request(ids(20), 1 + 6 * (DRAFT_BLOCK + 1), sampling)
        plain, run = Run(), Run()
        engine = Engine(model, Settings(slots=1, pages=4))
        number = engine.submit(request)
        settle(engine, plain)
        engine, steps = Engine(model, Settings(slots=1, pages=4, speculate=True)), 0
        engine.submit(request)
        while engine.busy:
            run.add(engine.step())
            steps += 1
        assert run.ids(number) == plain.ids(number)
        usage = engine.usage(number)
        assert usage.drafted == usage.accepted == (6,) * DRAFT_BLOCK
        assert steps == 7


def test_nan_in_the_drafts_logits_costs_the_drafts_and_nothing_else(
    spark: Transformer, alone: Callable[[Request], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [Request(ids(30), 12, GREEDY), Request(ids(31, 1), 12, Sampling(seed=1))]
    for place in (0, 2):
        engine, run = Engine(spark, Settings(slots=2, pages=8, speculate=True)), Run()
        draft_blocks = engine.runner.draft_blocks

        def damage(anchors: object, place: int = place, draft_blocks: Callable[..., object] = draft_blocks) -> object:
            blocks = draft_blocks(anchors)
            blocks.logits_NBV[0, place, 5] = torch.nan  # pyright: ignore[reportAttributeAccessIssue]
            return blocks

        monkeypatch.setattr(engine.runner, "draft_blocks", damage)
        numbers = [engine.submit(request) for request in both]
        settle(engine, run)
        assert [run.ids(number) for number in numbers] == [alone(request) for request in both]
        assert engine.num_damaged_drafts > 0
        usages = [engine.usage(number) for number in numbers]
        assert len(usages[0].drafted) <= max(place, DRAFT_BLOCK * (place > 0))
        assert len(usages[1].drafted) == DRAFT_BLOCK


def test_nan_in_the_mtp_blocks_logits_costs_the_draft_and_nothing_else(
    model: Transformer, alone: Callable[[Request], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(ids(30), 8, GREEDY)
    engine, run = Engine(model, Settings(slots=1, pages=8, speculate=True)), Run()
    monkeypatch.setattr(engine.runner, "draft", lambda output, following, rows: torch.full((len(rows), 256), torch.nan))
    number = engine.submit(request)
    settle(engine, run)
    assert run.ids(number) == alone(request)
    assert engine.num_damaged_drafts == 6  # behind the first token and all but the last two: one more could follow
    assert engine.usage(number).num_drafted == 0


def test_nan_behind_a_wrong_draft_is_nobodys_business(
    spark: Transformer, alone: Callable[[Request], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model says behind a draft that was wrong would never have been computed."""
    request = Request(ids(30), 12, GREEDY)
    answer = alone(request)
    for share_right, finish in ((0.0, Finish.LENGTH), (1.0, Finish.ERROR)):
        engine, run = Engine(spark, Settings(slots=1, pages=8, speculate=True)), Run()
        run_pass = engine.runner.run

        def damage(pieces: list[object], step: bool, run_pass: Callable[..., object] = run_pass) -> object:
            output, logits_NV = run_pass(pieces, step)  # pyright: ignore[reportGeneralTypeIssues]
            logits_NV[1:] = torch.nan
            return output, logits_NV

        monkeypatch.setattr(engine.runner, "run", damage)
        number = engine.submit(request)
        with oracle_of(engine, {number: answer}, 3, share_right):
            settle(engine, run)
        assert run.finish[number] is finish
        assert run.ids(number) == answer[: len(run.ids(number))]
        assert len(run.ids(number)) >= (12 if finish is Finish.LENGTH else 2)
    assert "NaN" in (run.errors[number] or "")


def test_unsure_drafts_are_not_verified_where_tokens_cost_time(spark: Transformer) -> None:
    """The confidence of random stages is what it is; a high price leaves the surest of them, an absurd one none."""
    verified: list[int] = []
    for draft_cost in (0.0, 0.2, 1e9):
        engine = Engine(spark, Settings(slots=1, pages=8, speculate=True, draft_cost=draft_cost))
        number = engine.submit(Request(ids(30), 30, GREEDY))
        settle(engine, Run())
        verified.append(engine.usage(number).num_drafted)
    assert verified[0] > verified[1] > verified[2] == 0
