"""The layer state: its size, its growth, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leadline.model import accounting
from leadline.model.config import FLASH, NANO, PRO, TINY, ModelConfig
from leadline.model.segment import Segment
from leadline.model.state import State
from leadline.model.transformer import Transformer


def test_what_each_kind_of_layer_remembers() -> None:
    state = State(TINY, slots=3, capacity_tokens=300, dtype=torch.bfloat16)
    window, csa, hca, _ = state.layers
    assert (window.entries, window.index) == (None, None)
    assert window.window_NWK.shape == (3, TINY.sliding_window, TINY.head_dim)
    assert csa.entries is not None
    assert csa.index is not None
    assert csa.entries.values_NRE.shape == csa.entries.scores_NRE.shape == (3, 8, 2 * TINY.head_dim)
    assert csa.entries.entries_NCD.shape == (3, 75, TINY.head_dim)
    assert csa.index.values_NRE.shape == (3, 8, 2 * TINY.index_head_dim)
    assert csa.index.entries_NCD.shape == (3, 75, TINY.index_head_dim)
    assert hca.entries is not None
    assert hca.index is None
    assert hca.entries.values_NRE.shape == (3, 128, TINY.head_dim)
    assert hca.entries.entries_NCD.shape == (3, 2, TINY.head_dim)
    assert [layer.window_NWK.shape for layer in state.mtp] == [window.window_NWK.shape]
    for layer in (csa, hca):
        assert layer.entries is not None
        assert layer.window_NWK.dtype == layer.entries.entries_NCD.dtype == torch.bfloat16
        assert layer.entries.values_NRE.dtype == layer.entries.scores_NRE.dtype == torch.float32


@pytest.mark.parametrize("config", [FLASH, PRO, TINY, NANO], ids=["flash", "pro", "tiny", "nano"])
@pytest.mark.parametrize("context", [128, 4096, 1 << 20])
def test_bytes_are_those_of_the_closed_form(config: ModelConfig, context: int) -> None:
    """In bf16 and without the MTP block's window, which `plan` does not count."""
    context = max(context, config.sliding_window)
    state = State(config, 1, context, dtype=torch.bfloat16, device="meta")
    mtp = sum(layer.window_NWK.nbytes for layer in state.mtp)
    expected = accounting.kv_cache_bytes_bf16(config, context) + accounting.tail_bytes(config)
    assert state.num_bytes - mtp == expected


@given(st.data())
def test_growth_keeps_everything_and_at_least_doubles(data: st.DataObject) -> None:
    state = State(TINY, slots=2, capacity_tokens=data.draw(st.integers(0, 200)))
    entries = [part.entries_NCD for layer in state.layers for part in (layer.entries, layer.index) if part is not None]
    for number, tensor in enumerate(entries):
        tensor.copy_(torch.arange(tensor.numel()).view_as(tensor) + number)
    for _ in range(3):
        past, length = data.draw(st.integers(0, 400)), data.draw(st.integers(1, 50))
        before = state.capacity_tokens
        state.reserve(Segment.of(range(length), past=[past], slots=[1]))
        if past + length <= before:
            assert state.capacity_tokens == before
        else:
            assert state.capacity_tokens >= max(past + length, 2 * before)
    grown = [part.entries_NCD for layer in state.layers for part in (layer.entries, layer.index) if part is not None]
    for old, new in zip(entries, grown, strict=True):
        assert torch.equal(new[:, : old.shape[1]], old)
    for layer, ratio in zip(state.layers, TINY.layer_ratios, strict=True):
        if layer.entries is not None:
            assert layer.entries.entries_NCD.shape[1] == state.capacity(ratio) == state.capacity_tokens // ratio


def test_a_slot_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="slot 2 does not exist: the state has 2 slots"):
        State(TINY, 2).reserve(Segment.of([1], [2], slots=[0, 2]))


def test_gradients_never_flow_through_a_state(random_model: Callable[[ModelConfig, int], Transformer]) -> None:
    with pytest.raises(ValueError, match="no_grad"):
        random_model(TINY, 0)(Segment.of([1, 2]), State(TINY, 1))


def test_other_slots_are_left_alone(
    random_model: Callable[[ModelConfig, int], Transformer], logits_of: Callable[..., Tensor]
) -> None:
    """A segment writes into the rows of its own slots and into no other."""
    state = State(TINY, 3, 200)

    def tensors() -> list[Tensor]:
        parts = [part for layer in state.layers for part in (layer.entries, layer.index) if part is not None]
        compressed = [t for part in parts for t in (part.values_NRE, part.scores_NRE, part.entries_NCD)]
        return [*(layer.window_NWK for layer in state.layers), *compressed]

    for tensor in tensors():
        tensor.normal_()
    before = [tensor.clone() for tensor in tensors()]
    logits_of(random_model(TINY, 0), Segment.of(range(150), slots=[1]), state)
    for old, new in zip(before, tensors(), strict=True):
        assert torch.equal(old[[0, 2]], new[[0, 2]])
        assert not torch.equal(old[1], new[1])


def test_a_state_of_another_dtype_is_refused_by_name():
    model = Transformer(TINY).to(torch.bfloat16)
    state = State(TINY, 1)
    with torch.no_grad(), pytest.raises(ValueError, match=r"the state is torch\.float32 .* the model torch\.bfloat16"):
        model(Segment.of([1, 2, 3]), state)
