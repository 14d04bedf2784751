"""Sparse attention against one dense softmax over all keys, all entries and the sink, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.ops.reach import Reach
from leadline.ops.sparse_attention import sparse_attention


def dense(
    q: Tensor, keys: Tensor, entries: Tensor | None, sink: Tensor, sees_key: Tensor, sees_entry: Tensor | None
) -> tuple[Tensor, Tensor]:
    """softmax([q keys^T, q entries^T, sink]) without its last column, times [keys, entries]; and the log of its sum."""
    vectors, sees = keys, sees_key
    if entries is not None and sees_entry is not None:
        vectors, sees = torch.cat([keys, entries]), torch.cat([sees_key, sees_entry], dim=1)
    q, vectors, sink = q.double(), vectors.double(), sink.double()
    scores = torch.einsum("thk,xk->thx", q, vectors) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~sees[:, None], float("-inf"))
    scores = torch.cat([scores, sink.expand(len(q), -1)[..., None]], dim=-1)
    return torch.softmax(scores, dim=-1)[..., :-1] @ vectors, torch.logsumexp(scores, dim=-1)


# name: lengths, past, window, ratio, picks, gap
CASES = {
    "one token": ([1], [0], 4, 4, 1, 0),
    "three": ([3], [0], 4, 4, 2, 0),
    "window filled exactly": ([4], [0], 4, 4, 2, 0),
    "one past the window": ([5], [0], 4, 4, 2, 0),
    "127": ([127], [0], 16, 4, 3, 0),
    "128": ([128], [0], 128, 128, 2, 0),
    "129": ([129], [0], 128, 128, 2, 0),
    "no entry at all": ([3, 2, 20], [0, 0, 0], 8, 128, 2, 0),
    "gathered picks": ([60], [0], 5, 2, 2, 0),
    "decode batch": ([1] * 9, [0, 1, 3, 4, 30, 7, 127, 128, 2], 8, 4, 2, 3),
    "decode after the window": ([1], [300], 16, 4, 4, 0),
    "ragged": ([1, 40, 3, 2, 17, 8, 9], [5, 0, 0, 33, 12, 3, 64], 7, 4, 3, 2),
    "chunk": ([33], [95], 16, 4, 2, 1),
}
MODES = ["window", "entries", "picked"]


def operands(case: Any, heads: int = 2, width: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [(case.queries, heads, width), (case.keys, width), (case.entries, width), (heads,)]
    return [torch.randn(shape, dtype=dtype) * 1.5 for shape in shapes]


def attend(case: Any, mode: str, q: Tensor, keys: Tensor, entries: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    if mode == "window":
        reach = Reach(case.reach.lengths, case.reach.first_key_T, case.reach.last_key_T)
        return sparse_attention(q, keys, None, sink, reach)
    return sparse_attention(q, keys, entries, sink, case.reach, case.picked_TM if mode == "picked" else None)


def expected_of(case: Any, mode: str, q: Tensor, keys: Tensor, entries: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    sees_entry = {"window": None, "entries": case.sees_entry_TC, "picked": case.sees_picked_TC}[mode]
    return dense(q, keys, None if mode == "window" else entries, sink, case.sees_key_TX, sees_entry)


def check(case: Any, mode: str, heads: int = 2, width: int = 8) -> None:
    inputs = [x.requires_grad_() for x in operands(case, heads, width)]
    (o, lse), (o_dense, lse_dense) = attend(case, mode, *inputs), expected_of(case, mode, *inputs)
    torch.testing.assert_close(o.double(), o_dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), lse_dense, rtol=1e-5, atol=1e-5)
    assert not lse.requires_grad
    do = torch.randn(o.shape)
    found = torch.autograd.grad(o, inputs, do, allow_unused=True)
    wanted = torch.autograd.grad(o_dense, inputs, do.double(), allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(look_back: Callable[..., Any], name: str, mode: str) -> None:
    lengths, past, window, ratio, picks, gap = CASES[name]
    check(look_back(lengths, past, window, ratio, picks, gap), mode)


@pytest.mark.parametrize("heads", [1, 3, 64, 100])
def test_numbers_of_heads(look_back: Callable[..., Any], heads: int) -> None:
    """The tile gets smaller as the heads get more."""
    check(look_back([70, 3, 2], [0, 5, 0], 9, 4, 3), "picked", heads, width=4)


@settings(max_examples=40)
@given(st.data())
def test_any_segment(look_back: Callable[..., Any], data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 24), min_size=1, max_size=6))
    past = [data.draw(st.integers(0, 40)) for _ in lengths]
    window, ratio = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 6))
    picks, gap, seed = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 3)), data.draw(st.integers(0, 99))
    torch.manual_seed(seed)
    check(look_back(lengths, past, window, ratio, picks, gap, seed), data.draw(st.sampled_from(MODES)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("lengths", "past", "picks"),
    [([11], [0], 2), ([11], [0], 1), ([2, 3, 1], [0, 4, 9], 2), ([9, 2, 1], [3, 0, 5], 1)],
    ids=["shared tile", "shared tile, gathered", "mixed tile", "both"],
)
def test_gradcheck(look_back: Callable[..., Any], lengths: list[int], past: list[int], picks: int, mode: str) -> None:
    case = look_back(lengths, past, window=3, ratio=1, picks=picks)
    inputs = [
        x.requires_grad_(not (mode == "window" and place == 2))
        for place, x in enumerate(operands(case, 2, 2, torch.float64))
    ]
    assert torch.autograd.gradcheck(lambda *x: attend(case, mode, *x)[0], inputs)


@pytest.mark.parametrize("mode", MODES)
def test_sink_of_minus_infinity_is_a_plain_softmax(look_back: Callable[..., Any], mode: str) -> None:
    case = look_back([20, 2], [0, 9], 5, 4, 2)
    q, keys, entries, _ = operands(case)
    ones = torch.ones_like(keys), torch.ones_like(entries)
    o, _ = attend(case, mode, q, *ones, torch.full((2,), float("-inf")))
    torch.testing.assert_close(o, torch.ones_like(o))
    inputs = [x.requires_grad_() for x in (q, keys, entries, torch.full((2,), float("-inf")))]
    grads = torch.autograd.grad(attend(case, mode, *inputs)[0].sum(), inputs, allow_unused=True)
    assert all(grad is None or torch.isfinite(grad).all() for grad in grads)
    assert grads[3] is not None
    assert not grads[3].any()


@pytest.mark.parametrize("height", [50.0, 200.0, 1e4])
def test_a_high_sink_takes_everything(look_back: Callable[..., Any], height: float) -> None:
    """Its logit may exceed the scores by more than exp can hold: output zero, and the log of the sum is the logit."""
    case = look_back([20, 2], [0, 9], 5, 4, 2)
    inputs = [x.requires_grad_() for x in (*operands(case)[:3], torch.full((2,), height))]
    o, lse = attend(case, "picked", *inputs)
    torch.testing.assert_close(o, torch.zeros_like(o), rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, torch.full_like(lse, height))
    for grad in torch.autograd.grad(o.sum(), inputs):
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_wild_scores_do_not_overflow(look_back: Callable[..., Any], mode: str) -> None:
    case = look_back([20, 2], [0, 9], 5, 4, 2)
    q, keys, entries, sink = operands(case)
    found, wanted = (
        attend(case, mode, q * 1e3, keys, entries, sink),
        expected_of(case, mode, q * 1e3, keys, entries, sink),
    )
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_nobody_sees_may_hold_anything(look_back: Callable[..., Any], mode: str) -> None:
    """A slot of the state keeps what its former owner left, be it NaN."""
    case = look_back([1] * 5 + [12], [0, 1, 2, 40, 2, 70], 6, 4, 2, gap=3)
    q, keys, entries, sink = operands(case)
    expected = attend(case, mode, q, keys, entries, sink)
    unseen = ~case.sees_entry_TC.any(0)
    assert unseen.any()
    entries[unseen] = float("nan")
    for found, wanted in zip(attend(case, mode, q, keys, entries, sink), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_never_moves_another(look_back: Callable[..., Any], mode: str) -> None:
    """Other numbers in sequences 0 and 2 leave sequence 1 and its gradients bitwise as they were."""
    lengths, past = [3, 30, 2], [9, 4, 17]
    case = look_back(lengths, past, 6, 4, 2)
    q, keys, entries, sink = operands(case)
    mine = torch.zeros(case.queries, dtype=torch.bool)
    mine[3:33] = True
    my_keys, my_entries = case.sees_key_TX[mine].any(0), case.sees_entry_TC[mine].any(0)
    results = []
    for factor in (1.0, -3.0):
        inputs = [
            torch.where(keep.view(-1, *[1] * (x.ndim - 1)), x, factor * x).requires_grad_()
            for x, keep in ((q, mine), (keys, my_keys), (entries, my_entries))
        ]
        o, lse = attend(case, mode, inputs[0], inputs[1], inputs[2], sink)
        grads = torch.autograd.grad(o[mine].sum(), inputs, allow_unused=True)
        results.append(
            (o[mine], lse[mine], grads[0][mine], grads[1][my_keys], None if mode == "window" else grads[2][my_entries])
        )
    for before, after in zip(*results, strict=True):
        assert before is after is None or torch.equal(before, after)


@pytest.mark.parametrize("mode", MODES)
def test_any_layout_in(look_back: Callable[..., Any], scattered: Callable[[Tensor], Tensor], mode: str) -> None:
    case = look_back([20, 3, 2], [0, 9, 1], 5, 4, 2)
    values, do = operands(case), torch.randn(case.queries, 2, 8)
    results = []
    for layout in (torch.clone, scattered):
        inputs = [layout(value).requires_grad_() for value in values]
        o, lse = attend(case, mode, *inputs)
        results.append((o, lse, *torch.autograd.grad(o, inputs, layout(do), allow_unused=True)))
    for plain, strided in zip(*results, strict=True):
        if plain is not None:
            torch.testing.assert_close(plain, strided, rtol=1e-5, atol=1e-5)


def test_low_precision(look_back: Callable[..., Any]) -> None:
    """bf16 in, bf16 out, FP32 between: within the rounding of the probabilities and of the result."""
    case = look_back([60, 2], [0, 9], 16, 4, 4)
    q, keys, entries, sink = (x.bfloat16() for x in operands(case))
    o, lse = attend(case, "picked", q, keys, entries, sink.float())
    wanted, lse_wanted = expected_of(case, "picked", q, keys, entries, sink)
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(o.double(), wanted, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(lse.double(), lse_wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["entries", "picked"])
def test_linear_memory(look_back: Callable[..., Any], largest_tensor: Any, mode: str) -> None:
    """No tensor grows with queries x entries, forward or backward."""
    tokens = 2048
    position = torch.arange(tokens)
    reach = Reach((tokens,), (position - 31).clamp_min(0), position, torch.zeros_like(position), position + 1)
    picked = None if mode == "entries" else torch.arange(4).expand(tokens, -1)
    q, keys, entries = (torch.randn(shape, requires_grad=True) for shape in ((tokens, 2, 4), (tokens, 4), (tokens, 4)))
    with largest_tensor:
        sparse_attention(q, keys, entries, torch.zeros(2), reach, picked)[0].sum().backward()
    # A tile of 128 queries by two heads against all entries is the most; the full matrix would be 16 times larger.
    assert largest_tensor.elements <= 128 * 2 * tokens
