"""The indexer's loss and recall against dense formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.ops.indexer_loss import indexer_loss, indexer_recall
from leadline.ops.reach import Reach

HEADS, WIDTH, INDEX_HEADS, INDEX_WIDTH = 3, 4, 2, 5


def joint_lse(q: Tensor, keys: Tensor, entries: Tensor, sink: Tensor, sees_key: Tensor, sees_entry: Tensor) -> Tensor:
    """Log of the attention's denominator: window keys, entries and sink together."""
    vectors, sees = torch.cat([keys, entries]).double(), torch.cat([sees_key, sees_entry], dim=1)
    scores = torch.einsum("thk,xk->thx", q.double(), vectors) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~sees[:, None], float("-inf"))
    return torch.logsumexp(torch.cat([scores, sink.double().expand(len(q), -1)[..., None]], dim=-1), dim=-1)


def entry_mass(q: Tensor, entries: Tensor, lse: Tensor, sees: Tensor) -> Tensor:
    """Attention probability of every entry, summed over the heads: [T, C]."""
    scores = torch.einsum("thk,ck->thc", q.double(), entries.double()) / q.shape[-1] ** 0.5
    return (torch.exp(scores - lse.double()[..., None]) * sees[:, None]).sum(1)


def dense_loss(
    index_q: Tensor, index_weight: Tensor, index_keys: Tensor, q: Tensor, entries: Tensor, lse: Tensor, sees: Tensor
) -> Tensor:
    """KL(target || guess) of each query, one query at a time."""
    mass = entry_mass(q, entries, lse, sees)
    products = torch.relu(torch.einsum("tji,ci->tjc", index_q.double(), index_keys.double()))
    scores = torch.einsum("tj,tjc->tc", index_weight.double(), products)
    losses = []
    for row in range(len(q)):
        seen = sees[row]
        if not seen.any():
            losses.append(scores.new_zeros(()))
            continue
        target = mass[row, seen] / mass[row, seen].sum()
        log_guess = torch.log_softmax(scores[row, seen], dim=-1)
        losses.append((target * (target.log() - log_guess)).sum())
    return torch.stack(losses)


class Example:
    """Random operands of one segment; `picked`: whether attention and loss see the picks or all visible entries."""

    def __init__(self, case: Any, picked: bool, dtype: torch.dtype = torch.float32) -> None:
        tokens, entries = case.queries, case.entries
        self.reach: Reach = case.reach
        self.sees: Tensor = case.sees_picked_TC if picked else case.sees_entry_TC
        self.picked: Tensor | None = case.picked_TM if picked else None
        self.index = (
            torch.randn(tokens, INDEX_HEADS, INDEX_WIDTH, dtype=dtype, requires_grad=True),
            torch.randn(tokens, INDEX_HEADS, dtype=dtype, requires_grad=True),
            torch.randn(entries, INDEX_WIDTH, dtype=dtype, requires_grad=True),
        )
        self.q = torch.randn(tokens, HEADS, WIDTH, dtype=dtype)
        self.entries = torch.randn(entries, WIDTH, dtype=dtype)
        keys = torch.randn(case.keys, WIDTH, dtype=dtype)
        lse = joint_lse(self.q, keys, self.entries, torch.randn(HEADS), case.sees_key_TX, self.sees)
        self.lse = lse.to(dtype)

    def loss(self) -> Tensor:
        return indexer_loss(*self.index, self.q, self.entries, self.lse, self.reach, self.picked)

    def expected(self) -> Tensor:
        return dense_loss(*self.index, self.q, self.entries, self.lse, self.sees)


# name: lengths, past, ratio, picks, gap
CASES = {
    "one token": ([1], [0], 1, 1, 0),
    "no entry": ([3, 2, 20], [0, 0, 0], 128, 2, 0),
    "127": ([127], [0], 4, 3, 0),
    "129, gathered": ([129], [0], 4, 2, 0),
    "ragged": ([1, 40, 3, 2, 17, 8, 9], [5, 0, 0, 33, 12, 3, 64], 4, 3, 2),
    "short sequences": ([4, 3, 5, 1], [0, 0, 0, 0], 2, 2, 0),
}


@pytest.mark.parametrize("picked", [False, True], ids=["dense", "picked"])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(look_back: Callable[..., Any], name: str, picked: bool) -> None:
    lengths, past, ratio, picks, gap = CASES[name]
    example = Example(look_back(lengths, past, 8, ratio, picks, gap), picked)
    kl, expected = example.loss(), example.expected()
    torch.testing.assert_close(kl.double(), expected, rtol=1e-4, atol=1e-5)
    assert (kl >= -1e-6).all()
    assert not kl[~example.sees.any(1)].any()
    dkl = torch.randn(len(kl))
    found = torch.autograd.grad(kl, example.index, dkl)
    if not example.sees.any():
        assert all(not grad.any() for grad in found)
        return
    wanted = torch.autograd.grad(expected, example.index, dkl.double())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@settings(max_examples=25)
@given(st.data())
def test_any_segment(look_back: Callable[..., Any], data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 24), min_size=1, max_size=5))
    past = [data.draw(st.integers(0, 30)) for _ in lengths]
    seed = data.draw(st.integers(0, 99))
    torch.manual_seed(seed)
    case = look_back(lengths, past, 6, data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4)), 1, seed)
    example = Example(case, data.draw(st.booleans()))
    torch.testing.assert_close(example.loss().double(), example.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("picked", [False, True], ids=["dense", "picked"])
@pytest.mark.parametrize(
    ("lengths", "past", "picks"),
    [([10], [0], 2), ([10], [0], 1), ([2, 3, 1], [0, 4, 9], 2), ([9, 2, 1], [3, 0, 5], 1)],
    ids=["shared tile", "shared tile, gathered", "mixed tile", "both"],
)
def test_gradcheck(
    look_back: Callable[..., Any], lengths: list[int], past: list[int], picks: int, picked: bool
) -> None:
    example = Example(look_back(lengths, past, 3, 1, picks), picked, torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, weight, keys: indexer_loss(
            q, weight, keys, example.q, example.entries, example.lse, example.reach, example.picked
        ),
        example.index,
    )


def test_the_target_is_the_conditional_of_the_joint_softmax(look_back: Callable[..., Any]) -> None:
    """A head that lives in its window has little say. Head 0 gives entry 0 a mass of 0.8, head 1 gives entry 1 a mass
    of 0.1 and its window the rest: the target is (8/9, 1/9), where a vote per head would make it (1/2, 1/2)."""
    case = look_back([2], [0], 2, 1, 1)
    q = torch.zeros(2, 2, 2)
    q[1] = torch.eye(2) * 2**0.5 * 20  # head h scores entry h with 20, the other one with 0
    entries = torch.eye(2)
    lse = torch.zeros(2, 2)
    lse[1] = 20 - torch.tensor([0.8, 0.1]).log()
    keys = torch.eye(2)
    guess = torch.tensor([8 / 9, 1 / 9])
    index_q = torch.zeros(2, 1, 2)
    index_q[1, 0] = guess.log() - guess.log().min() + 1  # positive, so that the ReLU lets it pass
    kl = indexer_loss(index_q, torch.ones(2, 1), keys, q, entries, lse, case.reach, None)
    torch.testing.assert_close(kl[1], torch.tensor(0.0), rtol=0, atol=1e-5)


def test_nothing_flows_into_the_attention(look_back: Callable[..., Any]) -> None:
    example = Example(look_back([20], [0], 4, 2, 2), picked=False)
    attention = [x.requires_grad_() for x in (example.q, example.entries, example.lse)]
    grads = torch.autograd.grad(example.loss().sum(), attention, allow_unused=True)
    assert grads == (None, None, None)


@pytest.mark.parametrize("picked", [False, True], ids=["dense", "picked"])
def test_any_layout_in(look_back: Callable[..., Any], scattered: Callable[[Tensor], Tensor], picked: bool) -> None:
    example = Example(look_back([20, 2], [0, 9], 4, 2, 2), picked)
    plain = example.loss()
    wanted = torch.autograd.grad(plain.sum(), example.index)
    index_q, index_weight, index_keys = (scattered(x.detach()).requires_grad_() for x in example.index)
    example.index = (index_q, index_weight, index_keys)
    example.q, example.entries, example.lse = (scattered(x) for x in (example.q, example.entries, example.lse))
    strided = example.loss()
    torch.testing.assert_close(strided, plain, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(strided.sum(), example.index), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "picked"])
@pytest.mark.parametrize(("lengths", "past"), [([60], [0]), ([3, 20, 1], [30, 0, 50])])
def test_recall(look_back: Callable[..., Any], lengths: list[int], past: list[int], dense: bool) -> None:
    """Either denominator leads to the same recall: that of the attention which sees every visible entry."""
    case = look_back(lengths, past, 5, 2, 3, 1)
    q, entries, keys = (
        torch.randn(case.queries, HEADS, WIDTH),
        torch.randn(case.entries, WIDTH),
        torch.randn(case.keys, WIDTH),
    )
    sees = case.sees_entry_TC, case.sees_picked_TC
    sink = torch.randn(HEADS)
    lse_all, lse_picked = (joint_lse(q, keys, entries, sink, case.sees_key_TX, seen).float() for seen in sees)
    mass = entry_mass(q, entries, lse_all, case.sees_entry_TC)
    expected = (mass * case.sees_picked_TC).sum(1) / mass.sum(1)
    unsure = (case.sees_entry_TC.sum(1) > case.sees_picked_TC.sum(1)).nonzero().flatten()
    queries = torch.arange(case.queries)
    found = indexer_recall(q, entries, lse_all if dense else lse_picked, case.reach, case.picked_TM, dense, queries)
    torch.testing.assert_close(found.double(), expected[unsure], rtol=1e-4, atol=1e-5)
    some = unsure[1::3]
    found = indexer_recall(q, entries, lse_all if dense else lse_picked, case.reach, case.picked_TM, dense, some)
    torch.testing.assert_close(found.double(), expected[some], rtol=1e-4, atol=1e-5)


def test_recall_of_nothing_is_empty(look_back: Callable[..., Any]) -> None:
    case = look_back([3], [0], 5, 4, 2)
    q, entries = torch.randn(3, HEADS, WIDTH), torch.randn(0, WIDTH)
    for queries in (torch.arange(3), torch.arange(0)):
        assert indexer_recall(q, entries, torch.zeros(3, HEADS), case.reach, case.picked_TM, True, queries).shape == (
            0,
        )


@pytest.mark.parametrize("picked", [False, True], ids=["dense", "picked"])
def test_linear_memory(largest_tensor: Any, picked: bool) -> None:
    """Queries times entries would be 4 million, before the heads; a tile of 64 queries is the most that exists."""
    tokens = 2048
    position = torch.arange(tokens)
    reach = Reach((tokens,), position, position, torch.zeros_like(position), position + 1, tokens)
    picks = torch.arange(4).expand(tokens, -1) if picked else None
    index = (
        torch.randn(tokens, 2, 4, requires_grad=True),
        torch.randn(tokens, 2, requires_grad=True),
        torch.randn(tokens, 4, requires_grad=True),
    )
    q, entries, lse = torch.randn(tokens, 2, 4), torch.randn(tokens, 4), torch.full((tokens, 2), 9.0)
    with largest_tensor:
        indexer_loss(*index, q, entries, lse, reach, picks).sum().backward()
    assert largest_tensor.elements <= 64 * 2 * tokens
