"""The top-k kernel against the reference: equal in every case, since both only compare."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.ops.dispatch import implementation
from leadline.ops.select_topk import select_topk


def check(scores: Tensor, visible: Tensor, k: int) -> None:
    with implementation("kernel"):
        found = select_topk(scores, visible, k)
    with implementation("reference"):
        wanted = select_topk(scores, visible, k)
    assert found.dtype == torch.int64
    assert torch.equal(found, wanted)


def three_kinds(rows: int, columns: int, device: str = "cpu") -> list[Tensor]:
    """All scores different, many equal, all equal."""
    shape = rows, columns
    few = torch.randint(-2, 3, shape, device=device).float()
    return [torch.randn(shape, device=device), few, torch.zeros(shape, device=device)]


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 128 columns, so that short rows take several rounds."""
    from leadline.ops.select_topk import kernel

    monkeypatch.setattr(kernel, "part_of", lambda num_rows, length, k: kernel.Part(128, 4))


@pytest.mark.interpret
@settings(max_examples=40)
@given(st.data())
def test_any_scores(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    values = st.sampled_from([-1.0, 0.0, -0.0, 2.5, 1e-45, -1e-45, 3e38, float("-inf"), float("inf")])
    scores = torch.tensor([[data.draw(values) for _ in range(columns)] for _ in range(rows)])
    visible = torch.tensor([data.draw(st.integers(0, columns)) for _ in range(rows)])
    check(scores, visible, data.draw(st.integers(1, 45)))


@pytest.mark.interpret
@pytest.mark.parametrize("columns", [1, 3, 4, 5, 127, 128, 129, 1000])
@pytest.mark.parametrize("k", [1, 4, 128])
def test_awkward_sizes(columns: int, k: int) -> None:
    for scores in three_kinds(5, columns):
        check(scores, torch.randint(0, columns + 1, (5,)), k)


@pytest.mark.interpret
@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("columns", [128, 129, 700])
@pytest.mark.parametrize("k", [1, 40])
def test_several_rounds(columns: int, k: int) -> None:
    for scores in three_kinds(4, columns):
        check(scores, torch.tensor([columns, columns // 2, 128, 0]), k)


@given(st.integers(1, 2**17), st.integers(1, 2**18), st.integers(1, 2048))
def test_rounds_end(rows: int, columns: int, k: int) -> None:
    """Each round leaves at most half of the columns, and five are enough for any row."""
    from leadline.ops.select_topk.kernel import part_of

    length, rounds, parts = columns, 0, 0
    while parts != 1:
        part = part_of(rows, length, k)
        assert 1 <= part.warps <= 32
        assert part.columns == 32 * part.warps * part.run
        parts = -(-length // part.columns)
        assert parts == 1 or part.columns >= 2 * k
        length, rounds = parts * k, rounds + 1
    assert rounds <= 5


@pytest.mark.interpret
def test_what_is_invisible_counts_for_nothing() -> None:
    scores = torch.tensor([[1.0, 2.0, float("nan"), float("inf")], [float("nan")] * 4])
    check(scores, torch.tensor([2, 0]), 3)
    check(scores, torch.tensor([2, 0]), 1)


@pytest.mark.interpret
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, -0x400000, -1])
def test_nan_is_never_picked(bits: int) -> None:
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    scores = torch.tensor([[0.0, 3.0, 1.0, 5.0, float("-inf"), float("inf"), -0.0]])
    scores[0, 2] = nan
    visible = torch.tensor([7])
    with implementation("kernel"):
        found = [select_topk(scores, visible, k).tolist()[0] for k in range(1, 7)]
        few = select_topk(torch.full((1, 9), float("nan")).index_fill(1, torch.tensor([4, 6]), 1.0), visible + 2, 3)
        none = select_topk(torch.full((1, 9), float("nan")), visible + 2, 3)
    assert found == [sorted([5, 3, 1, 0, 6, 4][:k]) for k in range(1, 7)]
    assert few.tolist() == [[4, 6, -1]]
    assert none.tolist() == [[-1, -1, -1]]


@pytest.mark.interpret
@pytest.mark.usefixtures("short_parts")
def test_a_part_full_of_nan_leaves_a_gap() -> None:
    """Lists of parts with places that hold no column; what stands there must not be taken for one."""
    scores = torch.randn(3, 300)
    scores[:, 3:200] = float("nan")
    scores[1, 200:] = float("nan")
    scores[2, 210] = float("inf")
    visible = (300, 300, 299)
    with implementation("kernel"):
        found = select_topk(scores, torch.tensor(visible), 8)
    for row, count, picked in zip(scores, visible, found, strict=True):
        numbers = int((~row[:count].isnan()).sum())
        best = row[:count].nan_to_num(nan=-1e9, posinf=1e9).topk(min(8, numbers)).indices
        assert picked.tolist() == best.sort().values.tolist() + [-1] * (8 - len(best))


@pytest.mark.interpret
def test_no_row_and_any_layout(scattered: Callable[[Tensor], Tensor]) -> None:
    check(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), 3)
    scores, visible = torch.randn(4, 9), torch.tensor([0, 3, 9, 5])
    check(scattered(scores), scattered(visible), 4)


@pytest.mark.interpret
def test_compiled_by_torch() -> None:
    scores, visible = torch.randn(4, 9), torch.tensor([0, 3, 9, 5])
    with implementation("kernel"):
        compiled = torch.compile(lambda x: select_topk(x, visible, 2) + 1, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(scores), select_topk(scores, visible, 2) + 1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "columns", "k"),
    [(1, 262144, 512), (3, 262144, 2048), (300, 16384, 512), (2, 65537, 1024), (4001, 2048, 512), (127, 1000, 1)],
)
def test_on_gpu(rows: int, columns: int, k: int) -> None:
    visible = torch.randint(0, columns + 1, (rows,), device="cuda")
    visible[0] = columns
    for scores in three_kinds(rows, columns, "cuda"):
        check(scores, visible, k)
    check(torch.randn(rows, columns, device="cuda").exp2_().bfloat16().float(), visible, k)


@pytest.mark.gpu
def test_nan_on_gpu() -> None:
    scores = torch.randn(64, 20000, device="cuda")
    scores[torch.rand_like(scores) < 0.01] = float("nan")
    with implementation("kernel"):
        found = select_topk(scores, torch.full((64,), 20000, device="cuda"), 512)
    wanted = scores.nan_to_num(nan=float("-inf")).topk(512).indices.sort(1).values
    assert torch.equal(found, wanted)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_captured_in_a_graph_and_waits_for_nobody() -> None:
    scores, visible = torch.randn(2, 262144, device="cuda"), torch.tensor([262144, 3000], device="cuda")
    with implementation("kernel"):
        select_topk(scores, visible, 512)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = select_topk(scores, visible, 512)
        scores.normal_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            wanted = select_topk(scores, visible, 512)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph.replay()
    assert torch.equal(found, wanted)
