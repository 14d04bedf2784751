"""Rows of a cache in plain PyTorch: what is written comes back, rounded to the format it is kept in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leadline.formats.cache_entry import (
    PackedIndex,
    PackedKeys,
    index_widths,
    key_widths,
    pack_index,
    pack_keys,
    round_keys,
    unpack_index,
)
from leadline.ops.cache_rows import Source, read_rows, write_rows


def empty(kind: str, rows: int, width: int, rotary: int, device: str = "cpu") -> Source:
    """A store whose bytes are none of those that zeros would have."""
    if kind == "floats":
        return torch.full((rows, width), 7.0, dtype=torch.bfloat16, device=device)
    widths = index_widths(width) if kind == "index" else key_widths(width, rotary)
    parts = [torch.full((rows, columns), 7, dtype=torch.uint8, device=device) for columns in widths]
    return PackedIndex(*parts) if kind == "index" else PackedKeys(*parts)


def rounded(kind: str, x: Tensor, rotary: int) -> Tensor:
    if kind == "floats":
        return x.bfloat16().float()
    return unpack_index(pack_index(x), torch.float32) if kind == "index" else round_keys(x, rotary)


KINDS = [("floats", 24, 0), ("keys", 512, 64), ("keys", 80, 16), ("keys", 16, 8), ("index", 32, 0), ("index", 128, 0)]


@pytest.mark.parametrize(("kind", "width", "rotary"), KINDS)
def test_written_rows_come_back(kind: str, width: int, rotary: int) -> None:
    x = torch.randn(6, width) * torch.exp(3 * torch.randn(6, 1))
    x[2] = 0.0
    target = empty(kind, 9, width, rotary)
    rows = torch.tensor([4, -1, 0, 8, -1, 2], dtype=torch.int32)
    write_rows(target, rows, x)
    found = read_rows(target, torch.tensor([8, 4, -1, 0, 2, 2]), width, torch.float32)
    wanted = rounded(kind, x, rotary)[[3, 0, 1, 2, 5, 5]]
    wanted[2] = 0.0
    assert torch.equal(found, wanted)
    untouched = read_rows(empty(kind, 9, width, rotary), torch.tensor([1, 3, 5, 6, 7]), width, torch.float32)
    assert torch.equal(read_rows(target, torch.tensor([1, 3, 5, 6, 7]), width, torch.float32), untouched)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_of_the_reader(dtype: torch.dtype) -> None:
    x = torch.randn(3, 80)
    found = read_rows(pack_keys(x, 16), torch.arange(3), 80, dtype)
    assert found.dtype == dtype
    assert torch.equal(found.float(), round_keys(x, 16))


def test_no_rows() -> None:
    source = pack_keys(torch.randn(3, 80), 16)
    assert read_rows(source, torch.empty(0, dtype=torch.int32), 80, torch.float32).shape == (0, 80)
