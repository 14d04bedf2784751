"""One path: however sequences are cut, mixed and resumed, their numbers are those of a single run.

The prompts and weights are fixed, and no choice of an indexer or router in them is close (see `closest_choices`): what
is drawn at random is how the prompts are cut and mixed, so the comparisons can be tight.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.model.config import TINY, ModelConfig
from leadline.model.page_table import num_pages
from leadline.model.segment import Segment
from leadline.model.state import State
from leadline.model.transformer import Transformer

LENGTHS = (300, 150, 131, 40)
SMALLEST_GAP = 4e-5
CHUNKS = [1, 3, 4, 5, 64, 127, 128, 129]


@dataclass(frozen=True)
class Prompts:
    """A model, some token sequences, and the logits of each from a run of its own."""

    model: Transformer
    tokens: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    mtp_logits: tuple[Tensor, ...]

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def state(self, slots: int) -> State:
        return State(self.config, slots)


@torch.no_grad()
def run(model: Transformer, segment: Segment, state: State | None = None) -> list[Tensor]:
    """Logits of each sequence of the segment."""
    return list(model.logits(model.hidden(model(segment, state).streams_TSD)).split(segment.lengths))


@torch.no_grad()
def run_mtp(
    model: Transformer, segment: Segment, following: Sequence[Tensor], state: State | None = None
) -> list[Tensor]:
    """The MTP block's logits of each sequence, given the token after each of its tokens."""
    hidden, _ = model.predict_second(model(segment, state), torch.cat(list(following)), state)
    return list(model.logits(hidden).split(segment.lengths))


@pytest.fixture(scope="module")
def prompts(random_model: Callable[[ModelConfig, int], Transformer], closest_choices: Callable[..., Tensor]) -> Prompts:
    model = random_model(TINY, 0)
    generator = torch.Generator().manual_seed(10)
    tokens = [torch.randint(0, TINY.vocab_size, (length,), generator=generator) for length in LENGTHS]
    for sequence in tokens:
        assert closest_choices(model, sequence, with_mtp=True).min() > SMALLEST_GAP, "choose another seed"
    logits = [run(model, Segment.of(sequence))[0] for sequence in tokens]
    mtp = [run_mtp(model, Segment.of(sequence[:-1]), [sequence[1:]])[0] for sequence in tokens]
    return Prompts(model, tuple(tokens), tuple(logits), tuple(mtp))


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest logit."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def runs_of(prompts: Prompts, number: int, borders: Sequence[int], slot: int, state: State) -> Tensor:
    """Logits of a prompt fed chunk by chunk into a slot."""
    parts = []
    for start, stop in itertools.pairwise(borders):
        segment = Segment.of(prompts.tokens[number][start:stop], past=[start], slots=[slot])
        parts += run(prompts.model, segment, state)
    return torch.cat(parts)


def cuts(data: st.DataObject, length: int, most: int) -> list[int]:
    inner = data.draw(st.lists(st.integers(1, length - 1), max_size=most, unique=True)) if length > 1 else []
    return [0, *sorted(inner), length]


@pytest.mark.parametrize("chunk", CHUNKS)
def test_equal_chunks(prompts: Prompts, chunk: int) -> None:
    borders = [*range(0, LENGTHS[0], chunk), LENGTHS[0]]
    assert_close(runs_of(prompts, 0, borders, 0, prompts.state(1)), prompts.logits[0])


@settings(max_examples=30)
@given(st.data())
def test_any_split(prompts: Prompts, data: st.DataObject) -> None:
    number = data.draw(st.sampled_from(range(len(LENGTHS))))
    borders = cuts(data, LENGTHS[number], most=8)
    assert_close(runs_of(prompts, number, borders, 0, prompts.state(1)), prompts.logits[number])


@settings(max_examples=20)
@given(st.data())
def test_any_interleaving(prompts: Prompts, data: st.DataObject) -> None:
    """Each step takes some sequences, in any order, a few or many tokens of each; slots are given out at random."""
    numbers = data.draw(st.lists(st.sampled_from(range(len(LENGTHS))), min_size=1, max_size=5))
    slots = data.draw(st.permutations(range(len(numbers) + 2)))[: len(numbers)]
    state = prompts.state(len(numbers) + 2)
    seen = [0] * len(numbers)
    parts: list[list[Tensor]] = [[] for _ in numbers]
    while True:
        open_runs = [run for run, number in enumerate(numbers) if seen[run] < LENGTHS[number]]
        if not open_runs:
            break
        chosen = data.draw(st.lists(st.sampled_from(open_runs), min_size=1, unique=True))
        stops = []
        for which in chosen:
            rest = LENGTHS[numbers[which]] - seen[which]
            stops.append(seen[which] + data.draw(st.sampled_from(sorted({1, min(7, rest), min(60, rest), rest}))))
        segment = Segment.of(
            *(prompts.tokens[numbers[which]][seen[which] : stop] for which, stop in zip(chosen, stops, strict=True)),
            past=[seen[which] for which in chosen],
            slots=[slots[which] for which in chosen],
        )
        for which, stop, logits in zip(chosen, stops, run(prompts.model, segment, state), strict=True):
            parts[which].append(logits)
            seen[which] = stop
    for number, part in zip(numbers, parts, strict=True):
        assert_close(torch.cat(part), prompts.logits[number])


@settings(max_examples=30)
@given(st.data())
def test_ragged_segments_equal_single_runs(prompts: Prompts, data: st.DataObject) -> None:
    """Without a state and with one, trunk and MTP block."""
    numbers = data.draw(st.lists(st.sampled_from(range(len(LENGTHS))), min_size=1, max_size=6))
    lengths = [data.draw(st.integers(1, LENGTHS[number] - 1)) for number in numbers]
    pairs = list(zip(numbers, lengths, strict=True))
    segment = Segment.of(*(prompts.tokens[number][:length] for number, length in pairs))
    following = [prompts.tokens[number][1 : length + 1] for number, length in pairs]
    state = prompts.state(len(numbers)) if data.draw(st.booleans()) else None
    for (number, length), logits in zip(pairs, run(prompts.model, segment, state), strict=True):
        assert_close(logits, prompts.logits[number][:length])
    for (number, length), logits in zip(pairs, run_mtp(prompts.model, segment, following, state), strict=True):
        assert_close(logits, prompts.mtp_logits[number][:length])


@settings(max_examples=20)
@given(st.data())
def test_any_split_of_the_mtp_block(prompts: Prompts, data: st.DataObject) -> None:
    """Two sequences in one state, cut at the same places: the MTP block's ring moves in step with the trunk's."""
    first, second = data.draw(st.permutations(range(len(LENGTHS))))[:2]
    length = min(LENGTHS[first], LENGTHS[second]) - 1
    state, parts = prompts.state(2), []
    for start, stop in itertools.pairwise(cuts(data, length, most=8)):
        sequences = [prompts.tokens[number] for number in (first, second)]
        segment = Segment.of(*(tokens[start:stop] for tokens in sequences), past=[start, start])
        parts.append(run_mtp(prompts.model, segment, [tokens[start + 1 : stop + 1] for tokens in sequences], state))
    for number, logits in zip((first, second), zip(*parts, strict=True), strict=True):
        assert_close(torch.cat(logits), prompts.mtp_logits[number][:length])


def fill_with(state: State, garbage: float) -> None:
    """Overwrite all that a state holds."""
    for tensor in [*state.fixed_tensors().values(), *state.page_tensors().values()]:
        tensor.fill_(garbage)


@settings(max_examples=40)
@given(st.data())
def test_a_used_slot_is_as_good_as_a_fresh_one(prompts: Prompts, data: st.DataObject) -> None:
    """Restarting a slot with past = 0 needs no clearing: what the former owner left is never read. Bitwise."""
    number = data.draw(st.sampled_from(range(len(LENGTHS))))
    borders = cuts(data, LENGTHS[number], most=5)
    expected = runs_of(prompts, number, borders, 1, prompts.state(3))
    used = prompts.state(3)
    if data.draw(st.booleans()):
        used = State(prompts.config, 3, capacity_tokens=data.draw(st.integers(0, 400)))
        fill_with(used, float("nan"))
    for _ in range(data.draw(st.integers(1, 3))):
        former = data.draw(st.sampled_from(range(len(LENGTHS))))
        stop = data.draw(st.integers(1, LENGTHS[former]))
        runs_of(prompts, former, [0, stop], data.draw(st.integers(0, 2)), used)
    assert torch.equal(runs_of(prompts, number, borders, 1, used), expected)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("chunk", [1, 5, 130])
def test_a_slot_full_of_garbage(prompts: Prompts, garbage: float, chunk: int) -> None:
    borders = [*range(0, LENGTHS[2], chunk), LENGTHS[2]]
    state = State(prompts.config, 2, capacity_tokens=200)
    fill_with(state, garbage)
    expected = runs_of(prompts, 2, borders, 1, prompts.state(2))
    assert torch.equal(runs_of(prompts, 2, borders, 1, state), expected)


def test_a_batch_of_short_sequences_in_garbage(prompts: Prompts) -> None:
    """Sequences too short for an entry share a tile with one that has many; nobody's slot was clean."""
    state = State(prompts.config, 4, capacity_tokens=300)
    fill_with(state, float("nan"))
    runs_of(prompts, 1, [0, 140], 2, state)
    tokens = [prompts.tokens[0][:2], prompts.tokens[1][140:143], prompts.tokens[3][:1]]
    found = run(prompts.model, Segment.of(*tokens, past=[0, 140, 0], slots=[0, 2, 3]), state)
    expected = prompts.logits[0][:2], prompts.logits[1][140:143], prompts.logits[3][:1]
    for logits, wanted in zip(found, expected, strict=True):
        assert_close(logits, wanted)


def test_a_state_that_grows_in_midstream(prompts: Prompts) -> None:
    """Every step outgrows the slots; what other slots hold survives each move."""
    state = prompts.state(2)
    runs_of(prompts, 2, [0, 100], 1, state)
    capacities = []
    for start in range(0, 300, 20):
        segment = Segment.of(prompts.tokens[0][start : start + 20], past=[start], slots=[0])
        (logits,) = run(prompts.model, segment, state)
        assert_close(logits, prompts.logits[0][start : start + 20])
        capacities.append(state.capacity_tokens)
    assert capacities[-1] >= 300
    assert len(set(capacities)) <= 4, "the slots must at least double when they grow"
    segment = Segment.of(prompts.tokens[2][100:], past=[100], slots=[1])
    assert_close(run(prompts.model, segment, state)[0], prompts.logits[2][100:])


class Owner:
    """Gives the pages of a state to its slots, in any order, and takes them back dirty."""

    def __init__(self, state: State, data: st.DataObject):
        self.state, self.data = state, data
        self.free = list(data.draw(st.permutations(range(state.pages.pages))))
        self.users = [0] * state.pages.pages

    def reach(self, slot: int, tokens: int) -> None:
        """The pages that this many tokens need: of those that the slot has, and free ones."""
        pages = self.state.pages.pages_of(slot)
        count = num_pages(tokens)
        self.put(slot, pages[:count] + [self.take() for _ in range(count - len(pages))])

    def take(self) -> int:
        return self.free.pop(self.data.draw(st.sampled_from([0, -1])))

    def put(self, slot: int, pages: list[int]) -> None:
        before = self.state.pages.pages_of(slot)
        for page in pages:
            self.users[page] += 1
        self.state.assign(slot, pages)
        for page in before:
            self.users[page] -= 1
            if not self.users[page]:
                self.free.append(page)

    def end(self, slot: int) -> None:
        self.put(slot, [])
        self.state.release(slot)

    def fork(self, slot: int, target: int, tokens: int) -> None:
        """Another slot goes on from where this one is: full pages are shared, the one in writing is copied."""
        pages = self.state.pages.pages_of(slot)[: num_pages(tokens)]
        if tokens % 128:
            own = self.take()
            self.state.copy_page(pages[-1], own)
            pages[-1] = own
        self.put(target, pages)
        self.state.restore(target, self.state.snapshot(slot))


def pool(config: ModelConfig, slots: int, spare_tokens: int = 0) -> State:
    """Pages full of NaN for every slot's longest prompt, and as many again."""
    per_slot = num_pages(max(LENGTHS))
    state = State(config, slots, pages=2 * slots * per_slot, max_tokens=max(LENGTHS), spare_tokens=spare_tokens)
    fill_with(state, float("nan"))
    return state


@settings(max_examples=20)
@given(st.data())
def test_where_the_pages_are_changes_no_bit(prompts: Prompts, data: st.DataObject) -> None:
    number = data.draw(st.sampled_from(range(len(LENGTHS))))
    borders = cuts(data, LENGTHS[number], most=6)
    expected = prompts.state(2)
    logits = runs_of(prompts, number, borders, 1, expected)
    state = pool(prompts.config, 2)
    owner, parts = Owner(state, data), []
    for start, stop in itertools.pairwise(borders):
        owner.reach(1, stop)
        parts.append(runs_of(prompts, number, [start, stop], 1, state))
    assert torch.equal(torch.cat(parts), logits)
    pages, finished = state.pages.pages_of(1), expected.page_tensors()
    for name, tensor in state.page_tensors().items():
        found, wanted = tensor[pages].flatten(0, 1), finished[name].unflatten(0, (2, -1))[1].flatten(0, 1)
        count = LENGTHS[number] * tensor.shape[1] // 128
        assert torch.equal(found[:count], wanted[:count]), name


@dataclass
class Running:
    """A prompt in a slot, and how many of its tokens the slot has seen."""

    number: int
    seen: int = 0


def go_on(prompts: Prompts, owner: Owner, running: dict[int, Running], data: st.DataObject) -> None:
    """Some more tokens of each of these slots in one segment; the logits are those of a run alone."""
    slots = [slot for slot, run in running.items() if run.seen < LENGTHS[run.number]]
    if not slots:
        return
    stops = []
    for slot in slots:
        rest = LENGTHS[running[slot].number] - running[slot].seen
        stops.append(running[slot].seen + min(rest, data.draw(st.sampled_from([1, 1, 5, 64, 200]))))
        owner.reach(slot, stops[-1])
    past = [running[slot].seen for slot in slots]
    runs = list(zip([running[slot].number for slot in slots], past, stops, strict=True))
    segment = Segment.of(*(prompts.tokens[number][start:stop] for number, start, stop in runs), past=past, slots=slots)
    found = run(prompts.model, segment, owner.state)
    for slot, (number, start, stop), logits in zip(slots, runs, found, strict=True):
        assert_close(logits, prompts.logits[number][start:stop])
        running[slot].seen = stop


def stray(prompts: Prompts, owner: Owner, slot: int, seen: int, data: st.DataObject) -> None:
    """Some tokens that are not the prompt's."""
    length = data.draw(st.sampled_from([1, 7, 60]))
    owner.reach(slot, seen + length)
    run(prompts.model, Segment.of(torch.arange(length), past=[seen], slots=[slot]), owner.state)


@settings(max_examples=25)
@given(st.data())
def test_pages_handed_out_shared_and_taken_back(prompts: Prompts, data: st.DataObject) -> None:
    """Prompts start, go on in any mixture, fork, go astray and back, and end; nothing that others left is ever seen."""
    state = pool(prompts.config, 4, spare_tokens=data.draw(st.sampled_from([0, 4])))
    owner, running = Owner(state, data), {0: Running(0)}
    for _ in range(data.draw(st.integers(4, 12))):
        slot = data.draw(st.sampled_from(sorted(running)))
        seen, idle = running[slot].seen, sorted(set(range(4)) - set(running))
        act = data.draw(st.sampled_from(["all go on", "one goes on", "start", "fork", "fork astray", "go back", "end"]))
        if act == "all go on":
            go_on(prompts, owner, running, data)
        elif act == "one goes on":
            go_on(prompts, owner, {slot: running[slot]}, data)
        elif act == "start" and idle:
            running[idle[0]] = Running(data.draw(st.sampled_from(range(len(LENGTHS)))))
        elif act == "fork" and idle:
            owner.fork(slot, idle[0], seen)
            running[idle[0]] = Running(running[slot].number, seen)
        elif act == "fork astray" and idle:
            owner.fork(slot, idle[0], seen)
            stray(prompts, owner, idle[0], seen, data)
            owner.end(idle[0])
        elif act == "go back":
            before = state.snapshot(slot)
            stray(prompts, owner, slot, seen, data)
            state.restore(slot, before)
            owner.reach(slot, seen)
        elif act == "end" and len(running) > 1:
            owner.end(slot)
            del running[slot]
    go_on(prompts, owner, running, data)


@settings(max_examples=15)
@given(st.data())
def test_drafts_are_verified_and_taken_back(prompts: Prompts, data: st.DataObject) -> None:
    """Steps of up to eight tokens, the last of which may be wrong. With as many spare rows nothing need be restored:
    the next step writes over them. Trunk and MTP block."""
    state = pool(prompts.config, 2, spare_tokens=7)
    owner, number, slot = Owner(state, data), data.draw(st.sampled_from([0, 2])), 1
    tokens, seen = prompts.tokens[number], data.draw(st.sampled_from([0, 1, 100, 119, 125, 127, 128]))
    if seen:
        owner.reach(slot, seen)
        run_mtp(prompts.model, Segment.of(tokens[:seen], slots=[slot]), [tokens[1 : seen + 1]], state)
    for _ in range(4):
        rest = LENGTHS[number] - 1 - seen
        if not rest:
            break
        right = data.draw(st.integers(1, min(8, rest)))
        wrong = torch.arange(data.draw(st.integers(0, 8 - right)))
        owner.reach(slot, seen + right + len(wrong))
        draft = torch.cat([tokens[seen : seen + right], wrong])
        following = torch.cat([tokens[seen + 1 : seen + right + 1], wrong])
        segment = Segment.of(draft, past=[seen], slots=[slot])
        with torch.no_grad():
            output = prompts.model(segment, state)
            assert output.index.lookup is not None
            hidden, _ = prompts.model.predict_second(output, following, state)
            found = prompts.model.logits(prompts.model.hidden(output.streams_TSD)), prompts.model.logits(hidden)
        for logits, expected in zip(found, (prompts.logits[number], prompts.mtp_logits[number]), strict=True):
            assert_close(logits[:right], expected[seen : seen + right])
        seen += right
        owner.reach(slot, seen)


def test_a_step_whose_places_only_the_device_knows(prompts: Prompts) -> None:
    """The same tensors, filled anew before each step, as a captured graph would read them."""
    state = pool(prompts.config, 4)
    seen, slots = [118, 130], [3, 1]
    for number, (slot, tokens) in enumerate(zip(slots, seen, strict=True)):
        state.assign(slot, [7 - number, 2 + number, 11 + number])
        run(prompts.model, Segment.of(prompts.tokens[number][:tokens], slots=[slot]), state)
    tokens_T, positions_T = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    segment = Segment.on_device(tokens_T, positions_T, torch.tensor(slots), longest=384)
    for step in range(15):
        places = [past + step for past in seen]
        tokens_T.copy_(torch.stack([prompts.tokens[number][place] for number, place in enumerate(places)]))
        positions_T.copy_(torch.tensor(places))
        for number, logits in enumerate(run(prompts.model, segment, state)):
            assert_close(logits, prompts.logits[number][places[number] : places[number] + 1])


# In these two every token visits all experts, so that other tokens cannot change the shape of a matrix product: then
# independence can be asked for bitwise.
ALL_EXPERTS = TINY.replace(n_routed_experts=3, num_experts_per_tok=3)


@settings(max_examples=20)
@given(st.data())
def test_a_sequence_never_influences_another(
    random_model: Callable[[ModelConfig, int], Transformer], data: st.DataObject
) -> None:
    model = random_model(ALL_EXPERTS, 1)
    lengths = data.draw(st.lists(st.sampled_from([1, 2, 5, 9, 64, 140]), min_size=2, max_size=5))
    changed = data.draw(st.integers(0, len(lengths) - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    before = [torch.randint(0, 256, (length,), generator=generator) for length in lengths]
    after = list(before)
    after[changed] = torch.randint(0, 256, (lengths[changed],), generator=generator)
    with_state = data.draw(st.booleans())
    results = []
    for sequences in (before, after):
        state = State(ALL_EXPERTS, len(lengths)) if with_state else None
        logits = run(model, Segment.of(*sequences), state)
        if state is not None:  # and one more token each, with a past
            following = [sequence[:1] for sequence in sequences]
            logits += run(model, Segment.of(*following, past=lengths), state)
        results.append(logits)
    for place, (old, new) in enumerate(zip(*results, strict=True)):
        if place % len(lengths) != changed:
            assert torch.equal(old, new)


@settings(max_examples=20)
@given(st.data())
def test_the_future_never_influences_the_past(
    random_model: Callable[[ModelConfig, int], Transformer], data: st.DataObject
) -> None:
    """Item 2 of the report's causality: tokens from `border` on change nothing before it, trunk and MTP block."""
    model = random_model(ALL_EXPERTS, 2)
    length = data.draw(st.sampled_from([2, 5, 17, 129, 270]))
    border = data.draw(st.integers(1, length - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    before = torch.randint(0, 256, (length + 1,), generator=generator)
    after = before.clone()
    after[border:] = torch.randint(0, 256, (length + 1 - border,), generator=generator)
    old, new = (run(model, Segment.of(tokens[:-1]))[0] for tokens in (before, after))
    assert torch.equal(old[:border], new[:border])
    old, new = (run_mtp(model, Segment.of(tokens[:-1]), [tokens[1:]])[0] for tokens in (before, after))
    assert torch.equal(old[: border - 1], new[: border - 1])


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("changed", [0, 3, 4, 7, 126, 127, 128, 131, 200])
def test_a_token_reaches_its_own_entry_and_the_next_overlapping_one(
    random_model: Callable[[ModelConfig, int], Transformer], ratio: int, changed: int
) -> None:
    """In the first layer, where a token's input is its embedding alone."""
    config = TINY.replace(num_hidden_layers=1, compress_ratios=(ratio, 0), num_hash_layers=1)
    model = random_model(config, 0)
    tokens = torch.arange(260) % 256
    kept = []
    for sequence in (tokens, torch.where(torch.arange(260) == changed, 99, tokens)):
        state = State(config, 1)
        run(model, Segment.of(sequence), state)
        kept.append({name: tensor.flatten(0, 1) for name, tensor in state.page_tensors().items()})
    for name, before in kept[0].items():
        differing = (before != kept[1][name]).any(-1).nonzero().flatten().tolist()
        assert differing == ([changed // 4, changed // 4 + 1] if ratio == 4 else [changed // 128])


def test_shifting_every_position_by_a_multiple_of_128_changes_nothing(prompts: Prompts) -> None:
    """Queries, keys, entries and the rotation back all move together, YaRN included."""
    model = prompts.model
    segment = Segment.of(prompts.tokens[0])
    with torch.no_grad():
        index = model.index(segment, None)
        x = model.embed(segment.tokens_T)[:, None].expand(-1, model.config.hc_mult, -1)
        for ratio in (0, 4, 128):
            index._rotation[ratio] = model.rotary.at(segment.positions_T + 10 * 128, ratio)
        for ratio, rows in index.pool.items():
            index._entry_rotation[ratio] = model.rotary.at(rows.entry_positions_C + 10 * 128, ratio)
        for block in model.layers:
            x, _ = block(x, index, None, model.cache_format)
        logits = model.logits(model.hidden(x))
    # The angles themselves are FP32 numbers of up to 1580: their rounding is what is left.
    torch.testing.assert_close(logits, prompts.logits[0], rtol=0, atol=2e-3)
