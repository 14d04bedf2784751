"""Stores: what goes in comes out, as floats or packed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.formats import fp4
from leadline.formats.cache_entry import round_keys
from leadline.model.store import Store

Make = Callable[[int, torch.dtype], Store]
KINDS: dict[str, tuple[Make, Callable[[Tensor], Tensor], set[str]]] = {
    "floats": (lambda rows, dtype: Store.floats(rows, 96, dtype, "cpu"), lambda x: x, {"rows"}),
    "keys": (
        lambda rows, dtype: Store.packed_keys(rows, 96, 16, dtype, "cpu"),
        lambda x: round_keys(x, 16),
        {"payload", "scales"},
    ),
    "index": (
        lambda rows, dtype: Store.packed_index(rows, 96, dtype, "cpu"), fp4.fake_quantize, {"codes", "scales"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(KINDS))
def test_rows_come_out_rounded_once(kind: str, dtype: torch.dtype) -> None:
    make, rounded, names = KINDS[kind]
    store, x = make(7, dtype), torch.randn(3, 96).to(dtype)
    assert set(store.tensors()) == names
    store.write(torch.tensor([5, -1, 2]), x)
    found = store.read(torch.tensor([2, 5, -1, 0, 2]))
    assert found.dtype == dtype
    zeros = torch.zeros(96, dtype=dtype)
    assert torch.equal(found, torch.stack([rounded(x[2]), rounded(x[0]), zeros, zeros, rounded(x[2])]))
    store.write(torch.tensor([5, 2]), rounded(x[[0, 2]]))
    assert torch.equal(store.read(torch.tensor([2, 5, -1, 0, 2])), found)


@pytest.mark.parametrize("kind", list(KINDS))
def test_growth_keeps_the_beginning_of_every_run(kind: str) -> None:
    make, rounded, _ = KINDS[kind]
    store, x = make(6, torch.float32), torch.randn(6, 96)
    store.write(torch.arange(6), x)
    store.grow(3, 4)
    assert torch.equal(store.read(torch.tensor([0, 1, 4, 5, 8, 9])), rounded(x))
    assert not store.read(torch.tensor([2, 3, 6, 7, 10, 11])).any()
    assert all(len(tensor) == 12 for tensor in store.tensors().values())
