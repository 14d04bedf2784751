"""What the cache holds: which values are rounded, and that gradients pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.formats import fp4, fp8, hadamard
from leadline.model.cache_format import CACHE_FORMATS, EXACT, SERVED
from leadline.model.config import TINY, ModelConfig
from leadline.model.segment import Segment
from leadline.model.state import State
from leadline.model.transformer import Transformer


def test_exact_leaves_every_value() -> None:
    x = torch.randn(3, 96)
    assert EXACT.key(x, 32) is x
    assert EXACT.index(x) is x
    assert CACHE_FORMATS == {"exact": EXACT, "served": SERVED}


@pytest.mark.parametrize(("width", "rotary"), [(96, 32), (512, 64), (80, 16)])
def test_served_keys_round_all_but_the_rotary_part(width: int, rotary: int) -> None:
    x = torch.randn(5, width)
    kept = x.clone()
    y = SERVED.key(x, rotary)
    assert torch.equal(y[:, -rotary:], x[:, -rotary:])
    assert torch.equal(y[:, :-rotary], fp8.fake_quantize(x[:, :-rotary], 64))
    assert not torch.equal(y, x)
    assert torch.equal(x, kept)


def test_served_index_vectors_are_rotated_and_rounded() -> None:
    x = torch.randn(5, 3, 64)
    assert torch.equal(SERVED.index(x), fp4.fake_quantize(hadamard.rotate(x)))


def test_the_gradient_passes_straight_through() -> None:
    x, g = torch.randn(4, 64, requires_grad=True), torch.randn(4, 64)
    (key_grad,) = torch.autograd.grad(SERVED.key(x, 16), x, g)
    assert torch.equal(key_grad, g)
    (index_grad,) = torch.autograd.grad(SERVED.index(x), x, g)
    torch.testing.assert_close(index_grad, hadamard.rotate(g), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_served_model_is_near_the_exact_one_and_chunks_agree(
    random_model: Callable[[ModelConfig, int], Transformer], logits_of: Callable[..., Tensor]
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
