"""The kernels of a cache's step against the reference: bytes where the values are equal, and nothing beside them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leadline.formats.cache_entry import PackedIndex, PackedKeys, index_widths, key_widths
from leadline.ops.cache_rows import Source, operands, read_rows
from leadline.ops.cache_step import Finish, NewTokens, Tails, store_entries, store_keys
from leadline.ops.dispatch import Implementation, implementation
from leadline.ops.norm_rope import Rounding
from leadline.ops.rope import rotations

KINDS: list[tuple[str, Rounding | None]] = [
    ("floats", None), ("floats", "fp8"), ("floats", "fp4"), ("packed", "fp8"), ("packed", "fp4")
]  # fmt: skip
WIDTHS = [(512, 64), (128, 64), (72, 8), (16, 8)]


def suits(rounding: Rounding | None, width: int) -> bool:
    return rounding != "fp4" or (width % 32 == 0 and width & (width - 1) == 0)


def store(kind: str, rounding: Rounding | None, rows: int, width: int, rotary: int, like: Tensor) -> Source:
    """Bytes that are none of those that zeros would have."""
    if kind == "floats":
        return torch.full((rows, width), 7.0, dtype=like.dtype, device=like.device)
    widths = index_widths(width) if rounding == "fp4" else key_widths(width, rotary)
    made = [torch.full((rows, bytes_), 7, dtype=torch.uint8, device=like.device) for bytes_ in widths]
    return PackedIndex(*made) if rounding == "fp4" else PackedKeys(*made)


def finish(count: int, width: int, rotary: int, rounding: Rounding | None, like: Tensor) -> Finish:
    positions = torch.randint(0, 2**20, (count,), device=like.device)
    angles = rotations(positions, torch.rand(rotary // 2, device=like.device))
    return Finish((torch.rand(width, device=like.device) + 0.5).to(like.dtype), 1e-6, *angles, rounding)


def close(found: Source, wanted: Source, width: int, dtype: torch.dtype, rounding: Rounding | None) -> None:
    """Where a sum in another order turned a value's last bit, rounding may make a step of the format of it; rarely."""
    rows = torch.arange(len(operands(found)[0]), device=operands(found)[0].device)
    ours, theirs = (read_rows(source, rows, width, torch.float32) for source in (found, wanted))
    tolerance = {None: 1e-6 if dtype == torch.float32 else 1e-2, "fp8": 0.13, "fp4": 0.51}[rounding]
    scale = theirs.abs().amax(-1, keepdim=True)
    assert ((ours - theirs).abs() <= tolerance * scale).all()
    if rounding is not None:
        assert (ours != theirs).float().mean() < 0.005


def check_keys(kind: str, rounding: Rounding | None, width: int, rotary: int, dtype: torch.dtype, device: str) -> None:
    x_TK = (torch.randn(7, width, device=device) * torch.exp(3 * torch.randn(7, 1, device=device))).to(dtype)
    x_TK[1] = 0.0
    how, rows = finish(7, width, rotary, rounding, x_TK), torch.tensor([8, 2, -1, 0, 5, 4, 1], device=device)
    found, wanted = (store(kind, rounding, 9, width, rotary, x_TK) for _ in range(2))
    with implementation("kernel"):
        store_keys(x_TK, how, rows, found)
    with implementation("reference"):
        store_keys(x_TK, how, rows, wanted)
        close(found, wanted, width, dtype, rounding)
    for ours, theirs in zip(operands(found), operands(wanted), strict=True):
        if ours is not None and theirs is not None:
            assert torch.equal(ours[[3, 6, 7]], theirs[[3, 6, 7]]), "a row of nobody"
            assert ours.dtype != torch.uint8 or (ours[8] != theirs[8]).float().mean() < 0.05


def check_entries(
    kind: str, rounding: Rounding | None, width: int, rotary: int, ratio: int, overlap: bool, new: int,
    dtype: torch.dtype, device: str,
) -> None:  # fmt: skip
    """Two sequences in a ring for three, with entries that are finished, not finished, or have empty slots."""
    columns, needed = (2 * width, 2 * ratio) if overlap else (width, ratio)
    ring, tokens = needed + new - 1, 2 * new
    made = [torch.randn(rows, columns, device=device) for rows in (tokens, tokens, ratio, 3 * ring, 3 * ring)]
    values, scores, ape, old_values, old_scores = made
    first = torch.tensor([ratio - 1, 5 * ratio - 1 - new // 2], device=device)
    positions = (first[:, None] + torch.arange(new, device=device)).flatten()
    slot = torch.tensor([2, 0], device=device).repeat_interleave(new)
    start = torch.tensor([0, new], device=device).repeat_interleave(new)
    behind = positions[:, None] + torch.arange(1 - needed, 1, device=device)
    past = behind - first.repeat_interleave(new)[:, None]
    slots = torch.where(past < 0, slot[:, None] * ring + behind % ring, 3 * ring + start[:, None] + past)
    slots = torch.where(behind < 0, -1, slots)
    rows = torch.where((positions + 1) % ratio == 0, 2 * torch.arange(tokens, device=device), -1)
    like = torch.empty(0, dtype=dtype, device=device)
    how = finish(tokens, width, rotary, rounding, like)
    found, wanted = (store(kind, rounding, 2 * tokens, width, rotary, like) for _ in range(2))
    kept: list[tuple[Tensor, Tensor]] = []
    choices: list[tuple[Implementation, Source]] = [("kernel", found), ("reference", wanted)]
    for name, target in choices:
        kept.append((old_values.clone(), old_scores.clone()))
        with implementation(name):
            tails = Tails(*kept[-1], slot * ring + positions % ring)
            store_entries(NewTokens(values, scores, ape, positions), tails, slots, dtype, how, rows, target)
    for ours, theirs in zip(*kept, strict=True):
        assert torch.equal(ours, theirs)
    with implementation("reference"):
        close(found, wanted, width, dtype, rounding)
    for ours, theirs in zip(operands(found), operands(wanted), strict=True):
        if ours is not None and theirs is not None:
            assert torch.equal(ours[1::2], theirs[1::2]), "a row of nobody"


@pytest.mark.interpret
@pytest.mark.parametrize(("width", "rotary"), WIDTHS)
@pytest.mark.parametrize(("kind", "rounding"), KINDS)
def test_keys_interpreted(kind: str, rounding: Rounding | None, width: int, rotary: int) -> None:
    if suits(rounding, width):
        check_keys(kind, rounding, width, rotary, torch.float32, "cpu")


@pytest.mark.interpret
@pytest.mark.parametrize(("ratio", "overlap", "new"), [(4, True, 1), (4, True, 3), (4, True, 9), (24, False, 2)])
@pytest.mark.parametrize(("kind", "rounding"), [("floats", None), ("packed", "fp8"), ("packed", "fp4")])
def test_entries_interpreted(kind: str, rounding: Rounding | None, ratio: int, overlap: bool, new: int) -> None:
    check_entries(kind, rounding, 32, 16, ratio, overlap, new, torch.float32, "cpu")


@pytest.mark.interpret
def test_no_entry_interpreted() -> None:
    """Where the host knows that no token finishes an entry, the tails take in the tokens all the same."""
    tails = torch.zeros(8, 16), torch.zeros(8, 16)
    values, scores, ape, target = torch.randn(2, 16), torch.randn(2, 16), torch.randn(8, 16), torch.full((2, 16), 3.0)
    nothing = torch.zeros(0, dtype=torch.int64)
    with implementation("kernel"):
        store_entries(
            NewTokens(values, scores, ape, torch.tensor([9, 3])), Tails(*tails, torch.tensor([1, 3])),
            nothing.view(0, 8), torch.float32, finish(0, 16, 4, None, values), nothing, target,
        )  # fmt: skip
    assert torch.equal(tails[0][[1, 3]], values)
    assert torch.equal(tails[1][[1, 3]], scores + ape[[1, 3]])
    assert (target == 3).all()


@pytest.mark.interpret
def test_traced_as_one_operation() -> None:
    x_TK, target = torch.randn(3, 32), torch.zeros(3, 32)
    how = finish(3, 32, 8, None, x_TK)

    def step(rows: Tensor) -> Tensor:
        store_keys(x_TK, how, rows, target)
        return target + 1

    with implementation("kernel"):
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(torch.arange(3))
        wanted = torch.zeros(3, 32)
        store_keys(x_TK, how, torch.arange(3), wanted)
    assert torch.equal(found, wanted + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("width", "rotary"), WIDTHS)
@pytest.mark.parametrize(("kind", "rounding"), KINDS)
def test_keys_compiled(kind: str, rounding: Rounding | None, width: int, rotary: int, dtype: torch.dtype) -> None:
    if suits(rounding, width):
        check_keys(kind, rounding, width, rotary, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("width", "rotary", "ratio", "overlap"), [(512, 64, 4, True), (128, 64, 4, True), (512, 64, 128, False)]
)
@pytest.mark.parametrize("new", [1, 3, 8])
@pytest.mark.parametrize(("kind", "rounding"), KINDS)
def test_entries_compiled(
    kind: str, rounding: Rounding | None, new: int, width: int, rotary: int, ratio: int, overlap: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    check_entries(kind, rounding, width, rotary, ratio, overlap, new, dtype, "cuda")
