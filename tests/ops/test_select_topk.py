"""Top-k against sorting, with many ties."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leadline.ops.select_topk import select_topk


def by_sorting(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    rows = []
    for row, count in zip(scores.tolist(), visible.tolist(), strict=True):
        ranked = sorted(range(count), key=lambda column: (-row[column], column))
        picked = sorted(ranked[:k])
        rows.append(picked + [-1] * (k - len(picked)))
    return torch.tensor(rows, dtype=torch.int64).view(len(scores), k)


@given(st.data())
def test_equals_sorting(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
    k = data.draw(st.integers(1, 45))
    # Three values only: nearly everything ties.
    values = st.sampled_from([-1.0, 0.0, -0.0, 2.5, float("-inf"), float("inf")])
    scores = torch.tensor([[data.draw(values) for _ in range(columns)] for _ in range(rows)])
    visible = torch.tensor([data.draw(st.integers(0, columns)) for _ in range(rows)])
    assert torch.equal(select_topk(scores, visible, k), by_sorting(scores, visible, k))


@pytest.mark.parametrize("columns", [1, 3, 4, 5, 127, 128, 129, 1000])
@pytest.mark.parametrize("k", [1, 4, 128])
def test_awkward_sizes(columns: int, k: int) -> None:
    scores, visible = torch.randn(9, columns), torch.randint(0, columns + 1, (9,))
    assert torch.equal(select_topk(scores, visible, k), by_sorting(scores, visible, k))


def test_ties_go_to_the_lower_column() -> None:
    scores = torch.tensor([[0.0, 5.0, 0.0, 0.0, 5.0, 0.0]])
    assert select_topk(scores, torch.tensor([6]), 3).tolist() == [[0, 1, 4]]
    assert select_topk(torch.zeros(1, 100), torch.tensor([100]), 3).tolist() == [[0, 1, 2]]


def test_what_is_invisible_is_never_read() -> None:
    scores = torch.tensor([[1.0, 2.0, float("nan"), float("inf")], [float("nan")] * 4])
    assert select_topk(scores, torch.tensor([2, 0]), 3).tolist() == [[0, 1, -1], [-1, -1, -1]]


@pytest.mark.parametrize("k", [1, 3])
def test_a_visible_nan_is_an_error(k: int) -> None:
    with pytest.raises(ValueError, match="not finite"):
        select_topk(torch.tensor([[1.0, float("nan"), 0.0, 2.0]]), torch.tensor([4]), k)


def test_input_unchanged_and_any_layout(scattered: Callable[[Tensor], Tensor]) -> None:
    scores, visible = torch.randn(4, 9), torch.tensor([0, 3, 9, 5])
    kept = scores.clone()
    expected = select_topk(scores, visible, 4)
    assert torch.equal(scores, kept)
    assert torch.equal(select_topk(scattered(scores), scattered(visible), 4), expected)
