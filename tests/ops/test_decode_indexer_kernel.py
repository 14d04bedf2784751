"""The kernels of the indexer for single queries. Operands are small whole numbers, so that scores are exact in any
order of summation, ties are frequent, and the picks must be equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.formats.cache_entry import PackedIndex, pack_index
from leadline.ops.decode_indexer import PAGE_KEYS, decode_pick_entries
from leadline.ops.dispatch import implementation

pytestmark = pytest.mark.usefixtures("loops_to_scalars")

Operands = tuple[Tensor, Tensor, Tensor | PackedIndex, Tensor, Tensor, Tensor]
# queries, heads, width, pages, picks
SHAPES = {
    "one page": (1, 1, 32, 1, 3),
    "more picks than entries": (2, 2, 32, 2, 100),
    "beside a tile": (3, 3, 64, 5, 20),
    "many pages": (2, 2, 32, 70, 33),
    "more heads than rows of a tile": (2, 20, 32, 3, 9),
}
GPU_SHAPES = [(3, 64, 128, 40, 100), (2, 64, 128, 8192, 512), (9, 64, 128, 1025, 1024), (1, 64, 128, 8192, 2048)]


def operands(
    shape: tuple[int, int, int, int, int], packed: bool, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Operands:
    """The first query sees all of its entries, a second one none, others any number."""
    queries, heads, width, pages, _ = shape
    sequences = queries + 1
    rows = sequences * pages * PAGE_KEYS
    keys = torch.randint(-2, 3, (rows, width), device=device).to(dtype)
    q = torch.randint(-2, 3, (queries, heads, width), device=device).to(dtype)
    weight = torch.randint(-2, 3, (queries, heads), device=device).float()
    table = torch.randperm(sequences * pages, device=device).view(sequences, pages).int()
    sequence = torch.randperm(sequences, device=device)[:queries].int()
    visible = torch.randint(0, pages * PAGE_KEYS + 1, (queries,), device=device)
    visible[0], visible[1:2] = pages * PAGE_KEYS, 0
    return q, weight, pack_index(keys) if packed else keys, table, sequence, visible


def kernel(arguments: Operands, k: int) -> tuple[Tensor, Tensor]:
    with implementation("kernel"):
        return decode_pick_entries(*arguments, k)


def check(arguments: Operands, k: int) -> None:
    with implementation("reference"):
        wanted = decode_pick_entries(*arguments, k)
    for ours, theirs in zip(kernel(arguments, k), wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.interpret
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "floats"])
@pytest.mark.parametrize("name", SHAPES)
def test_interpreted(name: str, packed: bool) -> None:
    check(operands(SHAPES[name], packed), SHAPES[name][4])


@pytest.mark.interpret
@settings(max_examples=5)
@given(st.data())
def test_any_pages(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    pages, k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 60))
    check(operands((data.draw(st.integers(1, 3)), 2, 32, pages, k), data.draw(st.booleans())), k)


@pytest.mark.interpret
@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_all_equal(weight: float) -> None:
    """Also when zeros come with either sign."""
    q, _, keys, table, sequence, visible = operands((1, 2, 32, 6, 20), True)
    picked, _ = kernel((q * 0, torch.full((1, 2), weight), keys, table, sequence, visible), 20)
    assert picked[0].tolist() == list(range(20))


def spread_scores(pages: int, width: int, dtype: torch.dtype, device: str = "cpu") -> Operands:
    """In each 16 keys one stands out, so that the best of all groups are few and high."""
    q, weight, keys, table, sequence, visible = operands((1, 2, width, pages, 1), False, dtype, device)
    assert isinstance(keys, Tensor)
    keys[::16] = 3 * q[0].sum(0).sign()
    return q, weight.abs() + 1, keys, table, sequence, visible


@pytest.mark.interpret
@pytest.mark.parametrize("k", [8, 15, 16, 17, 100, 255])
def test_more_picks_than_groups(k: int) -> None:
    check(spread_scores(8, 32, torch.float32), k)


@pytest.mark.interpret
def test_crowded_scores() -> None:
    """The best keys side by side: more of them in one region than a block of candidates holds."""
    q, weight, keys, table, sequence, visible = operands((1, 2, 32, 200, 90), False)
    assert isinstance(keys, Tensor)
    weight = weight.abs() + 1
    crowd = table[int(sequence[0]), 50:53].long()
    keys.view(-1, PAGE_KEYS, 32)[crowd] = 3 * q[0].sum(0).sign()
    check((q, weight, keys, table, sequence, visible), 90)


@pytest.mark.interpret
def test_scores_that_are_not_numbers_lead_nowhere() -> None:
    q, weight, keys, table, sequence, visible = operands((2, 2, 32, 8, 30), False)
    weight[0, 0] = float("nan")
    visible[:] = 8 * PAGE_KEYS - 5
    table[:, 7] = table[:, 7].clone()
    picked, rows = kernel((q, weight, keys, table, sequence, visible), 30)
    assert ((picked >= 0) & (picked < visible[:, None])).all()
    assert torch.equal(
        rows[0], table[int(sequence[0])][picked[0].long() // PAGE_KEYS] * PAGE_KEYS + picked[0] % PAGE_KEYS
    )


@pytest.mark.interpret
def test_alone_or_not() -> None:
    arguments = operands((3, 2, 32, 6, 20), True)
    together = kernel(arguments, 20)
    q, weight, keys, table, sequence, visible = arguments
    for t in range(3):
        here = slice(t, t + 1)
        alone = kernel((q[here], weight[here], keys, table, sequence[here], visible[here]), 20)
        for ours, theirs in zip(alone, together, strict=True):
            assert torch.equal(ours[0], theirs[t])


@pytest.mark.interpret
def test_traced_as_one_operation() -> None:
    first, weight, keys, table, sequence, visible = operands((1, 2, 32, 2, 5), True)

    def step(q: Tensor) -> Tensor:
        return decode_pick_entries(q, weight, keys, table, sequence, visible, 5)[0] + 1

    with implementation("kernel"):
        assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(first), step(first))


@pytest.mark.interpret
@pytest.mark.parametrize("pages", [1, 5, 8])
def test_hopper_interpreted(interpreted_gluon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, pages: int) -> None:
    from leadline.ops.decode_indexer import hopper, kernel

    launcher = interpreted_gluon(hopper, "decode_index_scores_hopper_kernel")
    monkeypatch.setattr(kernel, "for_hopper", lambda q, scales: True)
    check(operands((2, 64, 128, pages, 20), True, torch.bfloat16), 20)
    assert launcher.launches == 1


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "floats"])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_compiled(shape: tuple[int, int, int, int, int], packed: bool) -> None:
    check(operands(shape, packed, torch.bfloat16, "cuda"), shape[4])


@pytest.mark.gpu
def test_compiled_fp32() -> None:
    check(operands((3, 20, 64, 130, 70), True, torch.float32, "cuda"), 70)


@pytest.mark.gpu
def test_a_graph_follows_its_tensors() -> None:
    arguments = operands((2, 64, 128, 300, 512), True, torch.bfloat16, "cuda")
    kernel(arguments, 512)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernel(arguments, 512)
    for _ in range(2):
        arguments[5].copy_(torch.randint(0, 9601, (2,), device="cuda"))
        arguments[0].copy_(torch.randint(-2, 3, (2, 64, 128), device="cuda"))
        graph.replay()
        for ours, theirs in zip(found, kernel(arguments, 512), strict=True):
            assert torch.equal(ours, theirs)
