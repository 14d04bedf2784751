"""The step of a cache in plain PyTorch against what prefill does with the same tokens, position by position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leadline.formats.cache_entry import PackedIndex, PackedKeys, index_widths, key_widths
from leadline.ops.cache_rows import Source, read_rows
from leadline.ops.cache_step import Finish, NewTokens, Tails, store_entries, store_keys
from leadline.ops.gated_pool import gated_pool
from leadline.ops.norm_rope import Rounding, norm_rope
from leadline.ops.rope import rotations

KINDS: list[tuple[str, Rounding | None]] = [
    ("floats", None), ("floats", "fp8"), ("floats", "fp4"), ("packed", "fp8"), ("packed", "fp4")
]  # fmt: skip


def store(kind: str, rounding: Rounding | None, rows: int, width: int, rotary: int) -> Source:
    if kind == "floats":
        return torch.full((rows, width), 7.0)
    widths = index_widths(width) if rounding == "fp4" else key_widths(width, rotary)
    made = [torch.full((rows, bytes_), 7, dtype=torch.uint8) for bytes_ in widths]
    return PackedIndex(*made) if rounding == "fp4" else PackedKeys(*made)


def finish(count: int, width: int, rotary: int, rounding: Rounding | None) -> Finish:
    angles = rotations(torch.randint(0, 2**20, (count,)), torch.rand(rotary // 2))
    return Finish(torch.rand(width) + 0.5, 1e-6, *angles, rounding)


def read(source: Source, rows: Tensor, width: int) -> Tensor:
    return read_rows(source, rows, width, torch.float32)


@pytest.mark.parametrize(("kind", "rounding"), KINDS)
def test_keys(kind: str, rounding: Rounding | None) -> None:
    x_TK, how = torch.randn(3, 64), finish(3, 64, 16, rounding)
    target = store(kind, rounding, 5, 64, 16)
    untouched = read(target, torch.tensor([0, 2, 3]), 64)
    store_keys(x_TK, how, torch.tensor([4, -1, 1]), target)
    wanted = norm_rope(x_TK, how.cos_XP, how.sin_XP, weight=how.weight_K, eps=how.eps, rounding=rounding)
    assert torch.equal(read(target, torch.tensor([4, 1]), 64), wanted[[0, 2]])
    assert torch.equal(read(target, torch.tensor([0, 2, 3]), 64), untouched)


@pytest.mark.parametrize("new", [1, 3, 4, 9])
@pytest.mark.parametrize("overlap", [False, True])
def test_entries_token_by_token(overlap: bool, new: int) -> None:
    """A sequence that comes in steps of some tokens has the entries of the whole, and a ring as long as needed."""
    ratio, width, length = 4, 32, 36
    columns, needed = (2 * width, 2 * ratio) if overlap else (width, ratio)
    ring = needed + new - 1
    values, scores, ape = torch.randn(length, columns), torch.randn(length, columns), torch.randn(ratio, columns)
    positions = torch.arange(length)
    slots = torch.arange(ratio - 1, length, ratio)[:, None] + torch.arange(1 - needed, 1)
    pooled = gated_pool(values, scores + ape[positions % ratio], slots.clamp_min(-1), width)
    angles = rotations(torch.arange(length // ratio) * ratio, torch.rand(4))
    weight = torch.rand(width)
    wanted = norm_rope(pooled, *angles, weight=weight, eps=1e-6)

    kept_values, kept_scores = (torch.full((2 * ring, columns), float("nan")) for _ in range(2))
    target = torch.zeros(length // ratio, width)
    for first in range(0, length, new):
        token = torch.arange(first, first + new)
        behind = token[:, None] + torch.arange(1 - needed, 1)
        rows = torch.where(behind < first, ring + behind % ring, 2 * ring + behind - first)
        finished = (token + 1) % ratio == 0
        store_entries(
            NewTokens(values[token], scores[token], ape, token), Tails(kept_values, kept_scores, ring + token % ring),
            torch.where(behind < 0, -1, rows), torch.float32,
            Finish(weight, 1e-6, angles[0][token // ratio], angles[1][token // ratio], None),
            torch.where(finished, token // ratio, -1), target,
        )  # fmt: skip
    torch.testing.assert_close(target, wanted, rtol=0, atol=1e-6)


def test_a_step_without_an_entry_keeps_its_tokens() -> None:
    tails, target = (torch.zeros(8, 16), torch.zeros(8, 16)), torch.full((2, 16), 3.0)
    values, scores, ape = torch.randn(2, 16), torch.randn(2, 16), torch.randn(8, 16)
    store_entries(
        NewTokens(values, scores, ape, torch.tensor([9, 3])), Tails(*tails, torch.tensor([1, 3])),
        torch.zeros(0, 8, dtype=torch.int64), torch.float32, finish(0, 16, 4, None),
        torch.zeros(0, dtype=torch.int64), target,
    )  # fmt: skip
    assert torch.equal(tails[0][[1, 3]], values)
    assert torch.equal(tails[1][[1, 3]], scores + ape[[1, 3]])
    assert (target == 3).all()
