"""The kernels that read and write rows of a cache give the bytes of the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leadline.formats.cache_entry import PackedKeys, pack_index, pack_keys
from leadline.ops.cache_rows import Source, operands, read_rows, write_rows
from leadline.ops.dispatch import implementation

KINDS = [
    ("floats", 24, 0),
    ("keys", 512, 64),
    ("keys", 80, 16),
    ("keys", 16, 8),
    ("keys", 72, 8),
    ("index", 32, 0),
    ("index", 128, 0),
]


def packed(kind: str, x: torch.Tensor, rotary: int) -> Source:
    if kind == "floats":
        return x
    return pack_index(x) if kind == "index" else pack_keys(x, rotary)


def like(source: Source) -> Source:
    """A store of the same kind, whose bytes are none of those that zeros would have."""
    if isinstance(source, torch.Tensor):
        return torch.full_like(source, 7)
    return type(source)(*(torch.full_like(part, 7) for part in source))


def hostile(rows: int, width: int, rotary: int, device: str = "cpu") -> torch.Tensor:
    """Blocks of zeros, tiny and huge ones, ties between codes; rotary values that bfloat16 can hold."""
    x = torch.randn(rows, width, device=device) * torch.exp(4 * torch.randn(rows, 1, device=device))
    x[0] = 0.0
    x[1:3] = torch.randint(-16, 17, (2, width), device=device) / 4
    x[3] *= 1e-30
    x[4] *= 1e25
    x[:, width - rotary :] = x[:, width - rotary :].bfloat16().float()
    return x


def check(kind: str, width: int, rotary: int, dtype: torch.dtype, device: str = "cpu") -> None:
    x = hostile(37, width, rotary, device).to(dtype)
    wanted = packed(kind, x, rotary)
    target = like(wanted)
    order = torch.randperm(37, device=device)
    with implementation("kernel"):
        write_rows(target, order, x[order])
    assert torch.equal(operands(target)[0], operands(wanted)[0])
    if kind != "floats":
        assert torch.equal(target[1], wanted[1])
    rows = torch.randint(-1, 37, (50,), dtype=torch.int32, device=device)
    with implementation("kernel"):
        found = read_rows(wanted, rows, width, dtype)
    with implementation("reference"):
        assert torch.equal(found, read_rows(wanted, rows, width, dtype))


@pytest.mark.interpret
@pytest.mark.parametrize(("kind", "width", "rotary"), KINDS)
def test_interpreted(kind: str, width: int, rotary: int) -> None:
    check(kind, width, rotary, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind", "width", "rotary"), KINDS)
def test_compiled(kind: str, width: int, rotary: int, dtype: torch.dtype) -> None:
    check(kind, width, rotary, dtype, "cuda")


@pytest.mark.interpret
@settings(max_examples=10)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=64, max_size=64))
def test_any_values(values: list[float]) -> None:
    """Every code is that of the reference, at any magnitude."""
    x = torch.tensor(values).view(1, 64)
    for kind, rotary in (("keys", 0), ("index", 0)):
        wanted = pack_index(x) if kind == "index" else pack_keys(torch.cat([x, torch.zeros(1, 16)], 1), 16)
        target = type(wanted)(*(torch.zeros_like(part) for part in wanted))
        with implementation("kernel"):
            write_rows(
                target, torch.zeros(1, dtype=torch.int32), torch.nn.functional.pad(x, (0, 16 * (kind == "keys")))
            )
        for ours, theirs in zip(target, wanted, strict=True):
            assert torch.equal(ours, theirs), (kind, rotary)


@pytest.mark.interpret
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_block_stays_broken(broken: float) -> None:
    x = torch.ones(1, 80)
    x[0, 3] = broken
    target = pack_keys(torch.zeros(1, 80), 16)
    with implementation("kernel"):
        write_rows(target, torch.zeros(1, dtype=torch.int32), x)
        assert read_rows(target, torch.zeros(1, dtype=torch.int32), 80, torch.float32)[0, :64].isnan().all()


@pytest.mark.interpret
def test_missing_rows_are_skipped() -> None:
    x = torch.randn(4, 80)
    target = pack_keys(torch.zeros(5, 80), 16)
    before = PackedKeys(*(part.clone() for part in target))
    with implementation("kernel"):
        write_rows(target, torch.tensor([-1, 3, -1, -1]), x)
    assert torch.equal(target.payload[[0, 1, 2, 4]], before.payload[[0, 1, 2, 4]])
    assert torch.equal(target.scales[3], pack_keys(x[1:2], 16).scales[0])


@pytest.mark.interpret
def test_traced_as_one_operation() -> None:
    x = torch.randn(3, 32)
    target = pack_index(torch.zeros(3, 32))

    def step(rows: torch.Tensor) -> torch.Tensor:
        write_rows(target, rows, x)
        return read_rows(target, rows, 32, torch.float32) + 1

    with implementation("kernel"):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        found = compiled(torch.arange(3))
    assert torch.equal(target.codes, pack_index(x).codes)
    assert torch.equal(found, read_rows(pack_index(x), torch.arange(3), 32, torch.float32) + 1)
