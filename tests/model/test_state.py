"""The layer state: its size, its growth, its pages and fixed blocks, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.model import accounting
from leadline.model.cache_format import EXACT, PACKED, SERVED, CacheFormat
from leadline.model.config import FLASH, NANO, PRO, TINY, ModelConfig
from leadline.model.page_table import PageError
from leadline.model.segment import Segment
from leadline.model.state import FixedBlock, State, StateError
from leadline.model.transformer import Transformer

RandomModel = Callable[[ModelConfig, int], Transformer]
MILLION = 1 << 20


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def noisy(state: State) -> State:
    for tensor in (state.fixed_tensors() | state.page_tensors()).values():
        tensor.random_(0, 256)
    return state


@pytest.mark.parametrize("spare", [0, 7])
def test_what_the_layers_remember(spare: int) -> None:
    """TINY: a window-only layer, CSA, HCA, CSA, and a window-only MTP block."""
    state = State(TINY, slots=3, capacity_tokens=300, spare_tokens=spare, dtype=torch.bfloat16)
    width, index_width, window = TINY.head_dim, TINY.index_head_dim, [3, TINY.sliding_window + spare, TINY.head_dim]
    csa, index = [3, 8 + spare, 2 * width], [3, 8 + spare, 2 * index_width]
    hca = [3, 128 + spare, width]
    compressors = {
        "layers.1.entries": csa, "layers.1.index": index, "layers.2.entries": hca,
        "layers.3.entries": csa, "layers.3.index": index,
    }  # fmt: skip
    assert shapes_of(state.fixed_tensors()) == {
        **{f"{layer}.window.rows": window for layer in ("layers.0", "layers.1", "layers.2", "layers.3", "mtp.0")},
        **{f"{name}.{part}": shape for name, shape in compressors.items() for part in ("values", "scores")},
    }
    assert shapes_of(state.page_tensors()) == {
        "layers.1.entries.rows": [9, 32, width], "layers.1.index.rows": [9, 32, index_width],
        "layers.2.entries.rows": [9, 1, width],
        "layers.3.entries.rows": [9, 32, width], "layers.3.index.rows": [9, 32, index_width],
    }  # fmt: skip
    for name, tensor in (state.fixed_tensors() | state.page_tensors()).items():
        assert tensor.dtype == (torch.float32 if name.endswith(("values", "scores")) else torch.bfloat16)
        assert not tensor.any()
    assert state.capacity_tokens == 384


@pytest.mark.parametrize("cache_format", [SERVED, PACKED], ids=["bf16", "packed"])
@pytest.mark.parametrize("config", [FLASH, PRO, TINY, NANO], ids=["flash", "pro", "tiny", "nano"])
@pytest.mark.parametrize("context", [128, 4096, MILLION])
def test_bytes_are_those_of_the_plan(config: ModelConfig, context: int, cache_format: CacheFormat) -> None:
    """`plan` counts neither the MTP block's window nor the page table, and a window no longer than the context."""
    state = State(config, 1, context, cache_format=cache_format, dtype=torch.bfloat16, device="meta")
    entry, index_key, planned = 2 * config.head_dim, 2 * config.index_head_dim, accounting.kv_cache_bytes_bf16
    if cache_format.packed:
        entry, index_key = accounting.entry_bytes(config), accounting.index_key_bytes(config)
        planned = accounting.kv_cache_bytes
    assert state.bytes_per_page == accounting.page_bytes(config, entry, index_key)
    assert state.bytes_per_slot == accounting.slot_bytes(config, entry)
    table = state.pages.table_NP.nbytes
    assert table == 4 * context // 128
    assert state.num_bytes == state.bytes_per_slot + context // 128 * state.bytes_per_page + table
    unplanned = table + sum(t.nbytes for name, t in state.fixed_tensors().items() if name.startswith("mtp"))
    unplanned += config.num_hidden_layers * max(0, config.sliding_window - context) * entry
    assert state.num_bytes - unplanned == planned(config, context) + accounting.tail_bytes(config)


def test_a_million_tokens_of_flash_take_3517_bytes_each() -> None:
    """The published layout: 584 bytes for a key or entry, 68 for an index key."""
    state = State(FLASH, 1, MILLION, cache_format=PACKED, dtype=torch.bfloat16, device="meta")
    tensors = state.page_tensors() | {name: t for name, t in state.fixed_tensors().items() if name.startswith("layers")}
    kept = sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith((".values", ".scores")))
    assert kept == accounting.kv_cache_bytes(FLASH, MILLION) == 3_688_172_544
    assert kept // MILLION == 3517
    assert shapes_of(state.page_tensors())["layers.2.entries.payload"] == [8192, 32, 576]
    assert shapes_of(state.page_tensors())["layers.2.entries.scales"] == [8192, 32, 8]
    assert shapes_of(state.page_tensors())["layers.2.index.codes"] == [8192, 32, 64]
    assert shapes_of(state.page_tensors())["layers.2.index.scales"] == [8192, 32, 4]
    assert shapes_of(state.page_tensors())["layers.3.entries.payload"] == [8192, 1, 576]


@pytest.mark.parametrize(("slots", "pages"), [(1, 0), (3, 5)])
def test_bytes_of_a_pool(slots: int, pages: int) -> None:
    state = State(TINY, slots, pages=pages, max_tokens=1000)
    assert state.num_bytes == slots * state.bytes_per_slot + pages * state.bytes_per_page + 4 * slots * 8
    longer = State(TINY, slots, pages=pages, max_tokens=1000, spare_tokens=3)
    assert longer.bytes_per_page == state.bytes_per_page
    rows = 5 * TINY.head_dim + 2 * (2 * 2 * TINY.head_dim + 2 * 2 * TINY.index_head_dim) + 2 * TINY.head_dim
    assert longer.bytes_per_slot - state.bytes_per_slot == 4 * 3 * rows


@settings(max_examples=30)
@given(st.data())
def test_growth_keeps_everything_and_at_least_doubles(data: st.DataObject) -> None:
    cache_format = data.draw(st.sampled_from([EXACT, PACKED]))
    state = noisy(State(TINY, slots=2, capacity_tokens=data.draw(st.integers(0, 200)), cache_format=cache_format))
    fixed = {name: tensor.clone() for name, tensor in state.fixed_tensors().items()}
    entries, pages_before = state.page_tensors(), state.pages.pages_per_slot
    for _ in range(3):
        past, length = data.draw(st.integers(0, 400)), data.draw(st.integers(1, 50))
        before = state.capacity_tokens
        state.reserve(Segment.of(range(length), past=[past], slots=[1]))
        if past + length <= before:
            assert state.capacity_tokens == before
        else:
            assert state.capacity_tokens >= max(past + length, 2 * before)
        assert [state.pages.tokens_of(slot) for slot in (0, 1)] == [state.capacity_tokens] * 2
    for name, tensor in state.fixed_tensors().items():
        assert torch.equal(tensor, fixed[name])
    for name, tensor in state.page_tensors().items():
        for slot in (0, 1):
            new, old = slot * state.pages.pages_per_slot, slot * pages_before
            assert torch.equal(tensor[new : new + pages_before], entries[name][old : old + pages_before])
            assert not tensor[new + pages_before : new + state.pages.pages_per_slot].any()


def test_other_slots_are_left_alone(random_model: RandomModel, logits_of: Callable[..., Tensor]) -> None:
    """A segment writes into the rows of its own slots and pages and into no other."""
    state = State(TINY, 3, pages=6, max_tokens=256)
    for slot, pages in enumerate(([5, 1], [2, 0], [3])):
        state.assign(slot, pages)
    tensors = [*state.fixed_tensors().values(), *state.page_tensors().values()]
    for tensor in tensors:
        tensor.normal_()
    before = [tensor.clone() for tensor in tensors]
    model, segment = random_model(TINY, 0), Segment.of(range(150), slots=[1])
    with torch.no_grad():
        model.predict_second(model(segment, state), segment.tokens_T, state)
    fixed = len(state.fixed_tensors())
    for old, new in zip(before[:fixed], tensors[:fixed], strict=True):
        assert torch.equal(old[[0, 2]], new[[0, 2]])
        assert not torch.equal(old[1], new[1])
    for old, new in zip(before[fixed:], tensors[fixed:], strict=True):
        assert torch.equal(old[[1, 3, 4, 5]], new[[1, 3, 4, 5]])
        assert not torch.equal(old[2], new[2])


def contents(state: State, slot: int) -> dict[str, Tensor]:
    return {name: tensor[slot].clone() for name, tensor in state.fixed_tensors().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


BOTH_FORMS = pytest.mark.parametrize("cache_format", [EXACT, PACKED], ids=["floats", "packed"])


@BOTH_FORMS
def test_a_cleared_slot_holds_nothing(cache_format: CacheFormat) -> None:
    state = noisy(State(TINY, 2, 128, cache_format=cache_format))
    other = contents(state, 0)
    state.clear(1)
    assert not any(tensor.any() for tensor in contents(state, 1).values())
    assert same(contents(state, 0), other)


def test_a_released_slot_has_no_pages_and_holds_nothing() -> None:
    state = noisy(State(TINY, 2, pages=4, max_tokens=256))
    state.assign(1, [3, 0])
    state.release(1)
    assert state.pages.pages_of(1) == []
    assert not any(tensor.any() for tensor in contents(state, 1).values())
    with pytest.raises(PageError, match="slot 1 has pages for 0 tokens, the segment needs 1"):
        state.reserve(Segment.of([7], slots=[1]))


@BOTH_FORMS
def test_a_snapshot_is_a_copy_and_moves_to_any_slot(cache_format: CacheFormat) -> None:
    state = noisy(State(TINY, 2, 128, cache_format=cache_format))
    other = noisy(State(TINY, 3, pages=2, max_tokens=128, cache_format=cache_format))
    block, kept = state.snapshot(1), contents(state, 1)
    assert block.num_bytes == state.bytes_per_slot
    state.clear(1)
    assert same(block.tensors, kept)
    untouched = contents(other, 0), contents(other, 1)
    other.restore(2, block)
    assert same(contents(other, 2), kept)
    assert same(contents(other, 0), untouched[0])
    assert same(contents(other, 1), untouched[1])
    stored = safetensors.torch.load(safetensors.torch.save(kept))
    state.restore(0, FixedBlock(stored))
    assert same(contents(state, 0), kept)


@BOTH_FORMS
def test_a_copied_page_is_the_same_in_every_layer(cache_format: CacheFormat) -> None:
    state = noisy(State(TINY, 1, pages=4, max_tokens=128, cache_format=cache_format))
    before = {name: tensor.clone() for name, tensor in state.page_tensors().items()}
    state.copy_page(2, 0)
    for name, tensor in state.page_tensors().items():
        assert torch.equal(tensor[0], before[name][2])
        assert torch.equal(tensor[1:], before[name][1:])


REFUSED: list[tuple[Callable[[State], Any], str]] = [
    (lambda pool: pool.copy_page(0, 4), "page 4 does not exist: the state has 4 pages"),
    (lambda pool: pool.copy_page(-1, 0), "page -1 does not exist"),
    (lambda pool: pool.clear(2), "slot 2 does not exist: the state has 2 slots"),
    (lambda pool: pool.snapshot(-1), "slot -1 does not exist"),
    (lambda pool: pool.assign(2, [0]), "slot 2 does not exist"),
    (lambda pool: pool.restore(0, State(NANO, 1).snapshot(0)), r"does not fit the state: layers\.0\.window\.rows"),
    (lambda pool: pool.restore(0, FixedBlock({})), r"does not fit the state: layers\.0\.window\.rows is None"),
    (lambda pool: pool.restore(0, State(TINY, 1, spare_tokens=1).snapshot(0)), r"is \(torch\.Size\(\[17, 32\]\)"),
    (lambda pool: pool.restore(0, State(TINY, 1, cache_format=PACKED).snapshot(0)), r"window\.payload is \(torch"),
    (lambda pool: State(TINY, 1, 128).assign(0, [0]), "build it with pages and max_tokens"),
    (lambda pool: State(TINY, 1, 128).release(0), "build it with pages and max_tokens"),
    (lambda pool: State(TINY, 1, pages=3), "either capacity_tokens, or pages and max_tokens"),
    (lambda pool: State(TINY, 1, 128, pages=3, max_tokens=128), "either capacity_tokens, or pages and max_tokens"),
]


@pytest.mark.parametrize(("act", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_what_a_state_refuses(act: Callable[[State], Any], words: str) -> None:
    pool = State(TINY, 2, pages=4, max_tokens=256)
    before = {name: tensor.clone() for name, tensor in pool.fixed_tensors().items()}
    with pytest.raises((StateError, PageError), match=words):
        act(pool)
    assert same(pool.fixed_tensors(), before)


def test_a_slot_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="slot 2 does not exist: the state has 2 slots"):
        State(TINY, 2).reserve(Segment.of([1], [2], slots=[0, 2]))


def test_gradients_never_flow_through_a_state(random_model: RandomModel) -> None:
    with pytest.raises(ValueError, match="no_grad"):
        random_model(TINY, 0)(Segment.of([1, 2]), State(TINY, 1))


def test_a_state_of_another_dtype_is_refused_by_name() -> None:
    model = Transformer(TINY).to(torch.bfloat16)
    state = State(TINY, 1)
    with torch.no_grad(), pytest.raises(ValueError, match=r"the state is torch\.float32 .* the model torch\.bfloat16"):
        model(Segment.of([1, 2, 3]), state)
