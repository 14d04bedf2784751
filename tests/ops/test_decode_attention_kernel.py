"""The kernels of attention of single queries: Triton's interpreted in FP32, Triton's and Gluon's on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.formats.cache_entry import pack_keys
from leadline.ops.decode_attention import decode_attention
from leadline.ops.dispatch import implementation
from leadline.ops.rope import frequencies, rotations, unrotate_

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy warns where a GPU writes an infinity
    pytest.mark.usefixtures("loops_to_scalars"),
]

# queries, heads, width, rotary part, window, picks
SHAPES = {
    "one key": (1, 1, 16, 8, 1, 1),
    "no entries": (2, 3, 32, 8, 5, None),
    "several splits": (3, 4, 16, 8, 20, 600),
    "widths beside a block": (4, 20, 80, 16, 5, 70),
    "wide": (2, 3, 512, 64, 8, 40),
}
HOPPER_SHAPES = [
    (2, 20, 128, 64, 70, 150),
    (3, 40, 256, 64, 5, 129),
    (1, 3, 512, 64, 128, None),
    (1, 16, 128, 64, 64, 4300),
]
GPU_SHAPES = [
    (1, 64, 512, 64, 128, 512),
    (5, 64, 512, 64, 128, 8192),
    (40, 128, 512, 64, 128, 1024),
    (64, 64, 512, 64, 128, 512),
    (64, 64, 512, 64, 128, 64),
    (4, 20, 512, 64, 70, None),
    (3, 40, 256, 64, 100, 3000),
    (3, 16, 128, 64, 127, 129),
    (3, 4, 64, 16, 20, 4001),
]


def operands(
    shape: tuple[int, int, int, int, int, int | None], packed: bool, dtype: torch.dtype, device: str = "cpu"
) -> list[Any]:
    """Lists with holes anywhere. Of several queries, 1 has no row, and 2 none behind the first third of its entries."""
    queries, heads, width, rotary, window, picks = shape
    q = torch.randn(queries, heads, width, device=device).to(dtype)
    keys, entries = (torch.randn(rows, width, device=device).to(dtype) for rows in (300, 9000))
    window_rows = torch.randint(-1, 300, (queries, window), dtype=torch.int32, device=device)
    window_rows[0, 0] = 5
    entry_rows = None
    if picks is not None:
        entry_rows = torch.randint(-1, 9000, (queries, picks), dtype=torch.int32, device=device)
        entry_rows[1:2] = -1
        entry_rows[2:3, picks // 3 :] = -1
    window_rows[1:2] = -1
    sources = (pack_keys(keys, rotary), pack_keys(entries, rotary)) if packed else (keys, entries)
    source = None if picks is None else sources[1]
    return [q, sources[0], window_rows, source, entry_rows, torch.randn(heads, device=device)]


def kernel(arguments: list[Any]) -> tuple[Tensor, Tensor]:
    with implementation("kernel"):
        return decode_attention(*arguments)


def check(arguments: list[Any], tolerance: float) -> None:
    with implementation("reference"):
        wanted = decode_attention(arguments[0].double(), *arguments[1:])
    found, again = kernel(arguments), kernel(arguments)
    for ours, twice, theirs, bound in zip(found, again, wanted, (tolerance, 1e-6), strict=True):
        assert torch.equal(ours, twice)
        assert float((ours.double() - theirs).norm()) <= bound * float(theirs.norm())


def rows_of(arguments: list[Any], rows: slice) -> list[Any]:
    q, keys, window_rows, entries, entry_rows, sink = arguments
    return [q[rows], keys, window_rows[rows], entries, None if entry_rows is None else entry_rows[rows], sink]


def check_alone(arguments: list[Any]) -> None:
    """A query's bits are the same in any batch."""
    together = kernel(arguments)
    for t in range(len(arguments[0])):
        for ours, theirs in zip(kernel(rows_of(arguments, slice(t, t + 1))), together, strict=True):
            assert torch.equal(ours[0], theirs[t])


@pytest.mark.interpret
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "floats"])
@pytest.mark.parametrize("name", SHAPES)
def test_interpreted(name: str, packed: bool) -> None:
    check(operands(SHAPES[name], packed, torch.float32), 1e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "floats"])
def test_alone_or_not(packed: bool) -> None:
    check_alone(operands((3, 4, 16, 8, 20, 100), packed, torch.float32))


def check_turned_back(arguments: list[Any], tolerance: float) -> None:
    """The rotation in the kernel is that of `unrotate_`, of an output that was rounded."""
    queries, rotary = len(arguments[0]), 64 if arguments[0].shape[2] > 64 else 8
    rotation = rotations(
        torch.arange(queries, device=arguments[0].device) + 7, frequencies(rotary, 1e4).to(arguments[0].device)
    )
    o, lse = kernel(arguments)
    with implementation("reference"):
        wanted = unrotate_(o.clone(), *rotation)
    found = kernel([*arguments, rotation])
    assert torch.equal(found[0][..., :-rotary], o[..., :-rotary])
    assert torch.allclose(found[0], wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(found[1], lse)


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["several splits", "widths beside a block", "wide"])
def test_turned_back(name: str) -> None:
    check_turned_back(operands(SHAPES[name], True, torch.float32), 1e-6)


@pytest.mark.interpret
@settings(max_examples=5)
@given(st.data())
def test_any_lists(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    window, picks = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 90))
    arguments = operands((2, data.draw(st.integers(1, 20)), 16, 8, window, picks), True, torch.float32)
    for place, width in ((2, window), (4, picks)):
        kept = data.draw(st.lists(st.integers(0, width - 1), max_size=5))
        arguments[place][0, [n for n in range(width) if n not in kept]] = -1
    arguments[2][0, 0] = 7
    check(arguments, 1e-6)
    check_alone(arguments)


def test_splits() -> None:
    """Every place of both lists is in one split, whatever the number of queries; and many queries have few splits."""
    from leadline.ops.decode_attention.kernel import (
        ENOUGH_PROGRAMS,
        FP32_TILES,
        HOPPER_TILES,
        MOST_SPLITS,
        TILES,
        Split,
    )

    for shapes in (FP32_TILES, TILES, HOPPER_TILES):
        for window, entries in ((1, 0), (128, 0), (128, 64), (128, 512), (127, 8192)):
            counts = []
            for blocks in (1, 2, 7, 8, 24, 32, 64, 128, 1000):
                split = Split.of(window, entries, shapes, blocks)
                tiles = -(-window // split.columns) + -(-entries // split.columns)
                assert (split.splits - 1) * split.tiles < tiles <= split.splits * split.tiles
                assert split.splits <= MOST_SPLITS
                assert split.splits == 1 or split.splits * blocks <= ENOUGH_PROGRAMS
                counts.append(split.splits)
            assert counts == sorted(counts, reverse=True)
            assert counts[-1] == 1
    assert Split.of(128, 512, HOPPER_TILES, 2) == Split.of(128, 512, HOPPER_TILES, 12) == Split(64, 1, 10, 4)
    assert Split.of(128, 512, HOPPER_TILES, 128) == Split(128, 5, 1, 8)
    assert Split.of(128, 8192, HOPPER_TILES, 2) == Split(128, 1, 65, 8)
    assert Split.of(128, 8192, HOPPER_TILES, 4) == Split(128, 2, 33, 8)


@pytest.mark.interpret
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "floats"])
def test_many_queries_interpreted(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as make lists few splits, without as many."""
    from leadline.ops.decode_attention import kernel as module

    monkeypatch.setattr(module, "ENOUGH_PROGRAMS", 4)
    check(operands((3, 4, 16, 8, 20, 100), packed, torch.float32), 1e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("sink", [-1000.0, 1000.0])
def test_a_query_without_rows(sink: float) -> None:
    arguments = operands((2, 3, 16, 8, 20, 40), True, torch.float32)
    arguments[5][:] = sink
    o, lse = kernel(arguments)
    assert torch.equal(o[1], torch.zeros(3, 16))
    assert torch.equal(lse[1], arguments[5])


@pytest.mark.interpret
def test_what_is_not_a_number_is_seen() -> None:
    arguments = operands((1, 2, 16, 8, 20, 40), False, torch.float32)
    arguments[0][0, 1] = float("nan")
    o, _ = kernel(arguments)
    assert o[0, 0].isfinite().all()
    assert o[0, 1].isnan().all()


@pytest.mark.interpret
def test_traced_as_one_operation() -> None:
    arguments = operands((1, 2, 16, 8, 4, 6), True, torch.float32)
    with implementation("kernel"):
        compiled = torch.compile(
            lambda q: decode_attention(q, *arguments[1:])[0] * 2, fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(compiled(arguments[0]), kernel(arguments)[0] * 2)


@pytest.fixture
def hopper(interpreted_gluon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel for Hopper runs instead of the other, interpreted."""
    from leadline.ops.decode_attention import hopper, kernel

    launcher = interpreted_gluon(hopper, "decode_attention_fwd_hopper_kernel")
    monkeypatch.setattr(kernel, "for_hopper", lambda q, rotary_width: True)
    yield
    assert launcher.launches


@pytest.mark.interpret
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "floats"])
@pytest.mark.parametrize("shape", HOPPER_SHAPES, ids=str)
def test_hopper_interpreted(shape: tuple[int, int, int, int, int, int | None], packed: bool) -> None:
    # Twice the rounding of bfloat16, which Triton's interpreter cuts off when the splits are added up.
    check(operands(shape, packed, torch.bfloat16), 6e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "floats"])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_compiled(shape: tuple[int, int, int, int, int, int | None], packed: bool) -> None:
    check(operands(shape, packed, torch.bfloat16, "cuda"), 3e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 64, 512, 64, 128, 512), (40, 20, 256, 64, 70, None)], ids=str)
def test_compiled_turned_back(shape: tuple[int, int, int, int, int, int | None]) -> None:
    check_turned_back(operands(shape, True, torch.bfloat16, "cuda"), 8e-3)


@pytest.mark.gpu
def test_compiled_fp32() -> None:
    check(operands((3, 20, 512, 64, 128, 512), True, torch.float32, "cuda"), 1e-5)


@pytest.mark.gpu
def test_compiled_alone_or_not() -> None:
    """Up to so many queries, lists are split as for one."""
    check_alone(operands((6, 64, 512, 64, 128, 512), True, torch.bfloat16, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [5, 40])
def test_compiled_beside_others(queries: int) -> None:
    """Among as many others, it does not matter which, nor in which place."""
    arguments = operands((queries, 64, 512, 64, 128, 3000), True, torch.bfloat16, "cuda")
    turned = [
        arguments[0].flip(0),
        arguments[1],
        arguments[2].flip(0),
        arguments[3],
        arguments[4].flip(0),
        arguments[5],
    ]
    turned[0][1:], turned[2][1:], turned[4][1:] = turned[0][:1], turned[2][:1], turned[4][:1]
    for ours, theirs in zip(kernel(turned), kernel(arguments), strict=True):
        assert torch.equal(ours, theirs[-1:].expand_as(ours))


@pytest.mark.gpu
def test_a_graph_follows_its_tensors(poisoned_memory: None) -> None:
    arguments = operands((2, 64, 512, 64, 128, 512), True, torch.bfloat16, "cuda")
    kernel(arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = kernel(arguments)
    other = operands((2, 64, 512, 64, 128, 512), True, torch.bfloat16, "cuda")
    for place in (0, 2, 4, 5):
        arguments[place].copy_(other[place])
    graph.replay()
    wanted = kernel(arguments)
    assert torch.equal(o, wanted[0])
    assert torch.equal(lse, wanted[1])
