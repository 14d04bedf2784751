"""What the cache holds: the same numbers as floats and as bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.model.cache_format import CACHE_FORMATS, EXACT, PACKED, SERVED
from leadline.model.config import TINY, ModelConfig
from leadline.model.segment import Segment
from leadline.model.state import State
from leadline.model.transformer import Transformer

RandomModel = Callable[[ModelConfig, int], Transformer]


def test_the_formats_by_name() -> None:
    assert CACHE_FORMATS == {"exact": EXACT, "served": SERVED, "packed": PACKED}
    assert all(name == cache_format.name for name, cache_format in CACHE_FORMATS.items())
    assert [cache_format.packed for cache_format in CACHE_FORMATS.values()] == [False, False, True]
    assert [(one.key, one.index) for one in CACHE_FORMATS.values()] == [(None, None), ("fp8", "fp4"), ("fp8", "fp4")]


# What is kept in FP8: 16, 80 and 64 values.
SHAPES = [
    TINY,
    TINY.replace(head_dim=96, qk_rope_head_dim=16, index_head_dim=64),
    TINY.replace(head_dim=96, qk_rope_head_dim=32, index_head_dim=128),
]


@torch.no_grad()
@pytest.mark.parametrize("config", SHAPES, ids=["part of a block", "block and more", "whole block"])
@settings(max_examples=3)
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16]), data=st.data())
def test_packed_has_the_bits_of_served(
    random_model: RandomModel, config: ModelConfig, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Every logit of trunk and MTP block, in chunks and steps, with pages anywhere."""
    model = random_model(config, 0).to(dtype)
    length, slots = data.draw(st.sampled_from([9, 140, 290])), 2
    inner = data.draw(st.lists(st.integers(1, length - 1), max_size=4, unique=True))
    borders = sorted({0, *inner, *range(length - 3, length), length})
    tokens = torch.randint(0, 256, (slots, length + 1))
    served = State(model.config, slots, dtype=dtype)
    packed = State(model.config, slots, pages=9, max_tokens=300, cache_format=PACKED, dtype=dtype)
    order = data.draw(st.permutations(range(9)))
    for slot in range(slots):
        packed.assign(slot, order[3 * slot : 3 * slot + 3])
    for start, stop in itertools.pairwise(borders):
        segment = Segment.of(*tokens[:, start:stop], past=[start] * slots)
        found = []
        for model.cache_format, state in ((SERVED, served), (PACKED, packed)):
            output = model(segment, state)
            second, _ = model.predict_second(output, tokens[:, start + 1 : stop + 1].flatten(), state)
            found.append((model.logits(model.hidden(output.streams_TSD)), model.logits(second)))
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs)


@torch.no_grad()
def test_a_state_of_another_format_is_refused(random_model: RandomModel) -> None:
    model = random_model(TINY, 0)
    with pytest.raises(ValueError, match="the state's cache format is packed, the model's exact: build"):
        model(Segment.of([1]), State(TINY, 1, cache_format=PACKED))
    model.cache_format = PACKED
    with pytest.raises(ValueError, match="the state's cache format is exact, the model's packed: build"):
        model(Segment.of([1]), State(TINY, 1))


@torch.no_grad()
def test_a_served_model_is_near_the_exact_one_and_chunks_agree(
    random_model: RandomModel, logits_of: Callable[..., Tensor]
) -> None:
    """Rounding happens once per key, whenever it is computed: chunks see the same cache. Everything is picked here, as
    rounded index scores tie often."""
    config = TINY.replace(index_topk=100)
    model = random_model(config, 0)
    tokens = torch.randint(0, 256, (150,))
    exact = logits_of(model, Segment.of(tokens))
    model.cache_format = SERVED
    served = logits_of(model, Segment.of(tokens))
    error = (served - exact).norm() / exact.norm()
    assert 1e-3 < error < 0.2
    state = State(config, 1)
    borders = [0, 3, 67, 68, 150]
    parts = [
        logits_of(model, Segment.of(tokens[start:stop], past=[start]), state)
        for start, stop in itertools.pairwise(borders)
    ]
    # a value at a rounding border may fall to either side when it is computed in another order
    row_error = (torch.cat(parts) - served).norm(dim=1) / served.norm(dim=1)
    assert row_error.median() < 1e-3
    assert row_error.mean() < error / 2
