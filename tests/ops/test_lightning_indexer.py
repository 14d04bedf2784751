"""The lightning indexer against the full score matrix, sorted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.ops.lightning_indexer import pick_entries
from leadline.ops.reach import Reach


def by_sorting(q: Tensor, weight: Tensor, keys: Tensor, reach: Reach, k: int) -> Tensor:
    assert reach.first_entry_T is not None
    assert reach.visible_T is not None
    products = torch.relu(torch.einsum("tji,ci->tjc", q.double(), keys.double()))
    scores = torch.einsum("tj,tjc->tc", weight.double(), products)
    width = min(k, int(reach.visible_T.max()))
    rows = []
    for row, first, visible in zip(
        scores.tolist(), reach.first_entry_T.tolist(), reach.visible_T.tolist(), strict=True
    ):
        ranked = sorted(range(visible), key=lambda number, row=row, first=first: (-row[first + number], number))
        picked = sorted(ranked[:width])
        rows.append(picked + [-1] * (width - len(picked)))
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), width)


def whole_numbers(case: Any, heads: int, width: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Operands whose scores are exact in FP32, with ties whenever `most` is small."""
    shapes = [(case.queries, heads, width), (case.queries, heads), (case.entries, width)]
    q, weight, keys = (torch.randint(-most, most + 1, shape).float() for shape in shapes)
    return q, weight, keys


@settings(max_examples=60)
@given(st.data())
def test_equals_sorting(look_back: Callable[..., Any], data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    past = [data.draw(st.integers(0, 60)) for _ in lengths]
    ratio, gap, seed = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 3)), data.draw(st.integers(0, 99))
    case = look_back(lengths, past, 4, ratio, 1, gap, seed)
    torch.manual_seed(seed)
    operands = whole_numbers(case, data.draw(st.integers(1, 5)), 3, data.draw(st.sampled_from([1, 100])))
    k = data.draw(st.integers(1, 12))
    assert torch.equal(pick_entries(*operands, case.reach, k), by_sorting(*operands, case.reach, k))


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 127, 128, 129])
@pytest.mark.parametrize("k", [1, 8, 200])
def test_awkward_sizes(look_back: Callable[..., Any], tokens: int, k: int) -> None:
    case = look_back([tokens], [0], 4, 4, 1)
    operands = whole_numbers(case, 16, 4, 50)
    picked = pick_entries(*operands, case.reach, k)
    assert picked.shape == (tokens, min(k, tokens // 4))
    assert torch.equal(picked, by_sorting(*operands, case.reach, k))


def test_many_heads_are_scored_in_pieces(look_back: Callable[..., Any]) -> None:
    """64 queries by 300 heads: 64 entries at a time, the last piece shorter."""
    case = look_back([130], [0], 4, 1, 1)
    operands = whole_numbers(case, 300, 2, 20)
    assert torch.equal(pick_entries(*operands, case.reach, 5), by_sorting(*operands, case.reach, 5))


def test_ties_go_to_the_lower_number(look_back: Callable[..., Any]) -> None:
    case = look_back([20], [0], 4, 1, 1)
    zeros = torch.zeros(20, 2, 4), torch.ones(20, 2), torch.zeros(20, 4)
    assert pick_entries(*zeros, case.reach, 3)[-1].tolist() == [0, 1, 2]


def test_negative_weights_rank_below_zero(look_back: Callable[..., Any]) -> None:
    """The ReLU stands inside the weighted sum: a head with a negative weight pushes its entries down."""
    case = look_back([2], [0], 4, 1, 1)
    q, keys = torch.ones(2, 1, 1), torch.tensor([[1.0], [-1.0]])
    assert pick_entries(q, torch.full((2, 1), -1.0), keys, case.reach, 1)[-1].tolist() == [1]
    assert pick_entries(q, torch.full((2, 1), 1.0), keys, case.reach, 1)[-1].tolist() == [0]


def test_no_entry_no_pick(look_back: Callable[..., Any]) -> None:
    case = look_back([3, 2], [0, 0], 4, 4, 1)
    assert case.entries == 0
    assert pick_entries(*whole_numbers(case, 2, 4, 3), case.reach, 8).shape == (5, 0)


def test_what_nobody_sees_may_be_nan(look_back: Callable[..., Any]) -> None:
    case = look_back([1, 1, 30, 1], [0, 40, 9, 90], 4, 4, 1, gap=2)
    q, weight, keys = whole_numbers(case, 3, 4, 50)
    expected = pick_entries(q, weight, keys, case.reach, 3)
    keys[~case.sees_entry_TC.any(0)] = float("nan")
    assert torch.equal(pick_entries(q, weight, keys, case.reach, 3), expected)


def test_a_nan_score_is_an_error(look_back: Callable[..., Any]) -> None:
    case = look_back([40], [0], 4, 4, 1)
    q, weight, keys = whole_numbers(case, 3, 4, 50)
    q[35] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        pick_entries(q, weight, keys, case.reach, 3)


def test_any_layout_in(look_back: Callable[..., Any], scattered: Callable[[Tensor], Tensor]) -> None:
    case = look_back([30, 2], [0, 50], 4, 2, 1)
    q, weight, keys = whole_numbers(case, 3, 4, 50)
    expected = pick_entries(q, weight, keys, case.reach, 3)
    assert torch.equal(pick_entries(scattered(q), scattered(weight), scattered(keys), case.reach, 3), expected)


def test_the_workspace_is_bounded(largest_tensor: Any) -> None:
    """4096 queries by 4096 entries would be 16 million scores; 64 queries are scored at a time."""
    tokens = 4096
    position = torch.arange(tokens)
    reach = Reach((tokens,), position, position, torch.zeros_like(position), position + 1, tokens)
    operands = torch.randn(tokens, 2, 2), torch.rand(tokens, 2), torch.randn(tokens, 2)
    with largest_tensor:
        pick_entries(*operands, reach, 4)
    assert largest_tensor.elements <= 2**20
