"""Gated pooling against a loop over entries, slots and channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.gated_pool import gated_pool


def one_by_one(values: Tensor, scores: Tensor, rows: Tensor, width: int) -> Tensor:
    """Each channel of each entry: the softmax of its filled slots' scores, times their values."""
    entries = []
    for slots in rows.tolist():
        channels = []
        for channel in range(width):
            picked = []
            for slot, row in enumerate(slots):
                second_half = values.shape[1] == 2 * width and slot >= len(slots) // 2
                if row >= 0:
                    column = channel + width * second_half
                    picked.append((scores[row, column].double(), values[row, column].double()))
            gates = torch.softmax(torch.stack([score for score, _ in picked]), dim=0)
            channels.append((gates * torch.stack([value for _, value in picked])).sum())
        entries.append(torch.stack(channels))
    return torch.stack(entries) if entries else values.new_zeros(0, width).double()


def overlapping(tokens: int) -> Tensor:
    """Windows of four tokens, each with the four before it: the rows of ratio 4."""
    rows = torch.arange(tokens // 4)[:, None] * 4 + torch.arange(-4, 4)
    return rows.clamp_min(-1)


def disjoint(tokens: int, ratio: int) -> Tensor:
    return torch.arange(tokens // ratio * ratio).view(-1, ratio)


CASES = {
    "overlapping-4": (4, 3, overlapping(4), 2),
    "overlapping-0": (3, 1, overlapping(3), 2),
    "overlapping-129": (129, 5, overlapping(129), 2),
    "disjoint-1": (1, 4, disjoint(1, 1), 1),
    "disjoint-128": (128, 2, disjoint(128, 128), 1),
    "disjoint-127": (127, 2, disjoint(127, 128), 1),
    "disjoint-300": (300, 3, disjoint(300, 128), 1),
    "out of order": (9, 2, torch.tensor([[8, -1, 3, 0], [-1, -1, -1, 7]]), 1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_value_and_gradients(case: tuple[int, int, Tensor, int]) -> None:
    tokens, width, rows, halves = case
    values, scores = (torch.randn(2, tokens, halves * width) * 2).requires_grad_().unbind()
    entries, expected = gated_pool(values, scores, rows, width), one_by_one(values, scores, rows, width)
    torch.testing.assert_close(entries.double(), expected, rtol=1e-5, atol=1e-5)
    d = torch.randn(entries.shape)
    if not len(rows):
        assert all(not grad.any() for grad in torch.autograd.grad(entries, [values, scores], d))
        return
    found, wanted = (
        torch.autograd.grad(entries, [values, scores], d),
        torch.autograd.grad(expected, [values, scores], d.double()),
    )
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "halves"), [(overlapping(9), 2), (disjoint(9, 3), 1)], ids=["overlapping", "disjoint"]
)
def test_gradcheck(rows: Tensor, halves: int) -> None:
    values, scores = torch.randn(2, 9, halves * 2, dtype=torch.float64)
    inputs = (values.requires_grad_(), scores.requires_grad_())
    assert torch.autograd.gradcheck(lambda values, scores: gated_pool(values, scores, rows, 2), inputs)


def test_any_layout_in(scattered: Callable[[Tensor], Tensor]) -> None:
    values, scores, d = torch.randn(8, 6), torch.randn(8, 6), torch.randn(2, 3)
    results = []
    for layout in (torch.clone, scattered):
        inputs = [layout(values).requires_grad_(), layout(scores).requires_grad_()]
        y = gated_pool(inputs[0], inputs[1], layout(overlapping(8)), 3)
        results.append((y, *torch.autograd.grad(y, inputs, layout(d))))
    for plain, strided in zip(*results, strict=True):
        torch.testing.assert_close(plain, strided, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e38])
def test_an_empty_slot_reads_nothing(garbage: float) -> None:
    """Row 0 belongs to someone else: an empty slot of another entry must not be touched by what it holds."""
    values, scores = torch.randn(2, 8, 4)
    rows = torch.tensor([[-1, -1, -1, -1, 4, 5, 6, 7]])
    expected = gated_pool(values, scores, rows, 2)
    values[:4] = scores[:4] = garbage
    assert torch.equal(gated_pool(values, scores, rows, 2), expected)
    inputs = [values.requires_grad_(), scores.requires_grad_()]
    grads = torch.autograd.grad(gated_pool(values, scores, rows, 2).sum(), inputs)
    for grad in grads:
        assert not grad[:4].any()
        assert torch.isfinite(grad).all()


def test_wild_scores_choose_one_slot() -> None:
    values = torch.arange(8.0)[:, None]
    scores = torch.full((8, 1), -1e4)
    scores[6] = 1e4
    assert gated_pool(values, scores, torch.arange(8)[None], 1).item() == 6.0


def test_linear_memory(largest_tensor) -> None:
    values, scores = torch.randn(2, 4096, 8)
    with largest_tensor:
        gated_pool(values, scores, overlapping(4096), 4)
    assert largest_tensor.elements <= 2 * values.numel()
