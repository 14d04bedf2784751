"""The indexer for single queries in plain PyTorch: pages in any order, and what the indexer of segments picks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.formats.cache_entry import pack_index, unpack_index
from leadline.ops.decode_indexer import PAGE_KEYS, decode_pick_entries
from leadline.ops.lightning_indexer import pick_entries
from leadline.ops.reach import Reach

PAGES = 3


def queries(number: int, width: int = 32) -> tuple[Tensor, Tensor]:
    """Small whole numbers: scores are exact, and ties are frequent."""
    return torch.randint(-2, 3, (number, 2, width)).float(), torch.randint(-2, 3, (number, 2)).float()


def pool(sequences: int, width: int = 32) -> tuple[Tensor, Tensor]:
    """Keys in pages of random order, and the table."""
    keys = torch.randint(-2, 3, (sequences * PAGES * PAGE_KEYS, width)).float()
    return keys, torch.randperm(sequences * PAGES).view(sequences, PAGES).int()


def picked_alone(q: Tensor, weight: Tensor, keys: Tensor, pages: Tensor, visible: int, k: int) -> Tensor:
    """What the indexer of segments picks from the same keys laid one behind the other."""
    if visible == 0:
        return torch.empty(0, dtype=torch.int64)
    rows = (pages[:, None] * PAGE_KEYS + torch.arange(PAGE_KEYS)).flatten()[:visible]
    nothing = torch.zeros(1, dtype=torch.int64)
    reach = Reach((1,), nothing, nothing, nothing, torch.tensor([visible]), visible)
    return pick_entries(q[None], weight[None], keys[rows], reach, k)[0]


@settings(max_examples=30)
@given(st.lists(st.integers(0, PAGES * PAGE_KEYS), min_size=1, max_size=4), st.integers(1, 120), st.integers(0, 99))
def test_like_the_indexer_of_segments(visible: Sequence[int], k: int, seed: int) -> None:
    torch.manual_seed(seed)
    keys, table = pool(len(visible) + 1)
    q, weight = queries(len(visible))
    sequence = torch.randint(0, len(table), (len(visible),), dtype=torch.int32)
    picked, rows = decode_pick_entries(q, weight, keys, table, sequence, torch.tensor(visible), k)
    assert picked.shape == rows.shape == (len(visible), min(k, PAGES * PAGE_KEYS))
    assert picked.dtype == rows.dtype == torch.int32
    for t, count in enumerate(visible):
        pages = table[int(sequence[t])]
        wanted = picked_alone(q[t], weight[t], keys, pages, count, k)
        assert picked[t, : len(wanted)].tolist() == wanted.tolist()
        assert (picked[t, len(wanted) :] == -1).all()
        number = picked[t, : len(wanted)].long()
        assert rows[t, : len(wanted)].tolist() == (pages[number // PAGE_KEYS] * PAGE_KEYS + number % PAGE_KEYS).tolist()
        assert (rows[t, len(wanted) :] == -1).all()


def test_packed_keys_are_the_rounded_ones() -> None:
    keys, table = pool(2)
    packed = pack_index(keys * 0.7)
    q, weight = queries(3)
    rest = table, torch.tensor([0, 1, 1]), torch.tensor([90, 80, 0], dtype=torch.int32), 9
    found = decode_pick_entries(q, weight, packed, *rest)
    wanted = decode_pick_entries(q, weight, unpack_index(packed, torch.float32), *rest)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


def test_what_stands_behind_the_pages_is_not_read() -> None:
    keys, table = pool(1)
    q, weight = queries(1)
    wanted = decode_pick_entries(q, weight, keys, table, torch.tensor([0]), torch.tensor([40]), 9)
    table[0, 2] = 10**6
    found = decode_pick_entries(q, weight, keys, table, torch.tensor([0]), torch.tensor([40]), 9)
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("behind", [True, False])
def test_pages_one_behind_the_other(behind: bool) -> None:
    """Floats in consecutive pages are read in place; the picks do not tell."""
    keys, _ = pool(2)
    q, weight = queries(1)
    ordered = torch.tensor([[1, 2, 3]] if behind else [[1, 3, 2]], dtype=torch.int32)
    shuffled = torch.empty_like(keys)
    for old, new in zip(ordered[0].tolist(), (4, 0, 5), strict=True):
        shuffled[new * PAGE_KEYS : (new + 1) * PAGE_KEYS] = keys[old * PAGE_KEYS : (old + 1) * PAGE_KEYS]
    rest = torch.tensor([0]), torch.tensor([77]), 9
    found = decode_pick_entries(q, weight, keys, ordered, *rest)[0]
    moved = torch.tensor([[4, 0, 5]], dtype=torch.int32)
    assert torch.equal(found, decode_pick_entries(q, weight, shuffled, moved, *rest)[0])
