"""Attention of single queries in plain PyTorch against a softmax written out, and against attention over segments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leadline.formats.cache_entry import pack_keys, round_keys
from leadline.ops.decode_attention import decode_attention
from leadline.ops.reach import Reach
from leadline.ops.rope import frequencies, rope, rotations
from leadline.ops.sparse_attention import sparse_attention

Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def operands(
    queries: int, window: int, picks: int, heads: int = 3, width: int = 16, dtype: torch.dtype = torch.float64
) -> Operands:
    """Lists with holes anywhere; query 1 has no row at all, query 2 none in the window."""
    q = torch.randn(queries, heads, width, dtype=dtype)
    keys, entries = (torch.randn(rows, width, dtype=dtype) for rows in (40, 30))
    window_rows = torch.randint(-1, 40, (queries, window), dtype=torch.int32)
    entry_rows = torch.randint(-1, 30, (queries, picks), dtype=torch.int32)
    window_rows[1:3], entry_rows[1:2] = -1, -1
    return q, keys, window_rows, entries, entry_rows, torch.randn(heads)


def test_softmax_written_out() -> None:
    q, keys, window_rows, entries, entry_rows, sink = operands(4, 7, 5)
    o, lse = decode_attention(q, keys, window_rows, entries, entry_rows, sink)
    for t in range(4):
        seen = [*keys[window_rows[t][window_rows[t] >= 0]], *entries[entry_rows[t][entry_rows[t] >= 0]]]
        for h in range(3):
            scores = torch.tensor([float(q[t, h] @ k) / 4 for k in seen], dtype=torch.float64)
            total = scores.exp().sum() + sink[h].double().exp()
            wanted = sum((s.exp() / total * k for s, k in zip(scores, seen, strict=True)), torch.zeros(16))
            assert torch.allclose(o[t, h], wanted.double())
            assert torch.allclose(lse[t, h], total.log())


def test_like_attention_over_a_segment() -> None:
    """One token of one sequence: a window of 5 keys, the entries 3 and 1 of 4."""
    q, keys, entries, sink = torch.randn(1, 2, 8), torch.randn(9, 8), torch.randn(4, 8), torch.randn(2)
    reach = Reach((1,), torch.tensor([4]), torch.tensor([8]), torch.tensor([0]), torch.tensor([4]), 4)
    wanted = sparse_attention(q, keys, entries, sink, reach, torch.tensor([[1, 3, -1]]))
    rows = torch.arange(4, 9, dtype=torch.int32)[None]
    found = decode_attention(q, keys, rows, entries, torch.tensor([[3, -1, 1]], dtype=torch.int32), sink)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_packed_rows_are_the_rounded_ones() -> None:
    q, keys, window_rows, entries, entry_rows, sink = operands(4, 7, 5, width=80, dtype=torch.float32)
    packed = decode_attention(q, pack_keys(keys, 16), window_rows, pack_keys(entries, 16), entry_rows, sink)
    floats = decode_attention(q, round_keys(keys, 16), window_rows, round_keys(entries, 16), entry_rows, sink)
    assert torch.equal(packed[0], floats[0])
    assert torch.equal(packed[1], floats[1])


@pytest.mark.parametrize("sink", [-1000.0, float("-inf"), 1000.0])
def test_a_query_without_rows(sink: float) -> None:
    q, keys, window_rows, entries, entry_rows, sink_H = operands(3, 4, 4)
    sink_H[:] = sink
    o, lse = decode_attention(q, keys, window_rows, entries, entry_rows, sink_H)
    assert torch.equal(o[1], torch.zeros(3, 16, dtype=torch.float64))
    assert torch.equal(lse[1], sink_H.double())


def test_without_entries() -> None:
    q, keys, window_rows, _, entry_rows, sink = operands(4, 7, 5)
    nothing = torch.full_like(entry_rows, -1)
    wanted = decode_attention(q, keys, window_rows, keys, nothing, sink)
    found = decode_attention(q, keys, window_rows, None, None, sink)
    # The lists differ in length, and so may the order of a sum.
    assert torch.allclose(found[0], wanted[0], rtol=1e-14, atol=1e-15)
    assert torch.allclose(found[1], wanted[1], rtol=1e-14, atol=1e-15)


def test_turned_back() -> None:
    arguments = operands(4, 7, 5)
    rotation = rotations(torch.arange(4) + 7, frequencies(8, 1e4))
    o, lse = decode_attention(*arguments)
    found = decode_attention(*arguments, rotation)
    assert torch.equal(found[0], rope(o, *rotation, inverse=True))
    assert torch.equal(found[1], lse)
