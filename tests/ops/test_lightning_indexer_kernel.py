"""The indexer's kernels against the reference. Operands are small whole numbers, so that scores are exact in any order
of summation, ties are frequent, and the picks must be equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.ops.dispatch import implementation
from leadline.ops.lightning_indexer import pick_entries
from leadline.ops.lightning_indexer.reference import index_scores
from leadline.ops.reach import Reach

# name: lengths, past, ratio, heads, width, picks, gap
CASES = {
    "one token": ([1], [0], 1, 2, 4, 3, 0),
    "no entry at all": ([3, 2], [0, 0], 4, 2, 4, 5, 0),
    "127": ([127], [0], 4, 3, 5, 8, 0),
    "129, every entry scored": ([129], [0], 1, 2, 4, 1, 0),
    "decode batch": ([1] * 9, [0, 1, 3, 4, 30, 7, 127, 128, 2], 4, 64, 16, 5, 3),
    "speculation": ([2, 2, 2], [100, 7, 0], 2, 8, 16, 4, 1),
    "ragged": ([1, 20, 3, 2, 7, 8, 9], [5, 0, 0, 33, 12, 3, 64], 2, 16, 8, 4, 2),
    "chunk": ([13], [295], 1, 20, 4, 9, 1),
    "more heads than rows of a tile": ([24], [3], 2, 100, 4, 5, 0),
}
OPERANDS = tuple[Tensor, Tensor, Tensor]


def whole_numbers(case: Any, heads: int, width: int, most: int = 4, dtype: torch.dtype = torch.float32) -> OPERANDS:
    device = case.sees_key_TX.device
    shapes = [(case.queries, heads, width), (case.queries, heads), (case.entries, width)]
    q, weight, keys = (torch.randint(-most, most + 1, shape).to(device) for shape in shapes)
    return q.to(dtype), weight.float(), keys.to(dtype)


def kernel_picks(operands: OPERANDS, reach: Reach, k: int) -> Tensor:
    with implementation("kernel"):
        return pick_entries(*operands, reach, k)


def check(case: Any, operands: OPERANDS, k: int) -> None:
    with implementation("reference"):
        q, weight, keys = (x.float() for x in operands)
        wanted = pick_entries(q, weight, keys, case.reach, k)
    assert torch.equal(kernel_picks(operands, case.reach, k), wanted)


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@pytest.mark.parametrize("name", CASES)
def test_interpreted(look_back: Callable[..., Any], name: str) -> None:
    lengths, past, ratio, heads, width, k, gap = CASES[name]
    case = look_back(lengths, past, 4, ratio, 1, gap)
    check(case, whole_numbers(case, heads, width), k)


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@settings(max_examples=10)
@given(st.data())
def test_any_segment(look_back: Callable[..., Any], data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    past = [data.draw(st.integers(0, 90)) for _ in lengths]
    ratio, gap, seed = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 3)), data.draw(st.integers(0, 99))
    torch.manual_seed(seed)
    case = look_back(lengths, past, 4, ratio, 1, gap, seed)
    operands = whole_numbers(case, data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20)))
    check(case, operands, data.draw(st.integers(1, 12)))


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
def test_a_small_workspace_changes_nothing(look_back: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the scores of three queries: seven runs, the last of them short."""
    from leadline.ops.lightning_indexer import kernel

    case = look_back([16, 4], [0, 9], 4, 1, 1)
    monkeypatch.setattr(kernel, "WORKSPACE_BYTES", 3 * 16 * 4 + 5)
    check(case, whole_numbers(case, 3, 4), 4)


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@pytest.mark.parametrize(("lengths", "past"), [([40], [30]), ([1, 1], [60, 3])])
def test_entries_in_several_parts(
    look_back: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, lengths: list[int], past: list[int]
) -> None:
    from leadline.ops.lightning_indexer import kernel

    monkeypatch.setattr(kernel, "part_of", lambda length, tiles, device: 16)
    case = look_back(lengths, past, 4, 1, 1, 1)
    check(case, whole_numbers(case, 3, 4), 4)


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
def test_most_visible_may_be_more_than_there_is(look_back: Callable[..., Any]) -> None:
    """As in a captured graph: the same picks, with -1 behind them."""
    case = look_back([5, 1], [20, 9], 4, 4, 1)
    operands, longer = whole_numbers(case, 3, 4), replace(case.reach, most_visible=100)
    exact, found = kernel_picks(operands, case.reach, 8), kernel_picks(operands, longer, 8)
    assert exact.shape == (6, 6)
    assert torch.equal(found[:, :6], exact)
    assert (found[:, 6:] == -1).all()
    with implementation("reference"):
        assert torch.equal(pick_entries(*operands, longer, 8), found)


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
def test_what_nobody_sees_may_be_nan(look_back: Callable[..., Any]) -> None:
    case = look_back([1, 1, 30, 1], [0, 40, 9, 90], 4, 4, 1, gap=2)
    q, weight, keys = whole_numbers(case, 3, 4)
    expected = kernel_picks((q, weight, keys), case.reach, 3)
    unseen = ~case.sees_entry_TC.any(0)
    assert unseen.any()
    keys[unseen] = float("nan")
    assert torch.equal(kernel_picks((q, weight, keys), case.reach, 3), expected)


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("operand", range(3))
def test_a_nan_stays_in_its_row(look_back: Callable[..., Any], operand: int) -> None:
    """Where there is a choice, an entry whose score is NaN is not picked: a ReLU does not make a zero of it. The picks
    of other queries do not move."""
    case = look_back([40], [0], 4, 4, 1)
    operands = whole_numbers(case, 3, 4)
    expected = kernel_picks(operands, case.reach, 3)
    query = 39 if operand == 2 else 19
    operands[operand][9 if operand == 2 else 19] = float("nan")  # the last query alone sees entry 9
    found = kernel_picks(operands, case.reach, 3)
    if operand == 2:
        assert 9 not in found[query].tolist()
        assert (found[query] >= 0).all()
    else:
        assert (found[query] == -1).all()
    rest = torch.arange(40) != query
    assert torch.equal(found[rest], expected[rest])


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
def test_any_layout_in(look_back: Callable[..., Any], scattered: Callable[[Tensor], Tensor]) -> None:
    case = look_back([30, 2], [0, 50], 4, 2, 1)
    q, weight, keys = whole_numbers(case, 3, 4)
    check(case, (scattered(q), scattered(weight), scattered(keys)), 3)


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
def test_compiled_by_torch(look_back: Callable[..., Any]) -> None:
    """The whole function is one graph, also when gradients flow around the picks."""
    case = look_back([9, 3], [0, 20], 4, 2, 1)
    q, weight, keys = whole_numbers(case, 3, 4)
    q.requires_grad_()
    compiled = torch.compile(
        lambda q: (pick_entries(q, weight, keys, case.reach, 3) + 1, q.sum()), fullgraph=True, backend="aot_eager"
    )
    with implementation("kernel"):
        found, total = compiled(q)
        total.backward()
    assert torch.equal(found - 1, kernel_picks((q, weight, keys), case.reach, 3))
    assert q.grad is not None


def on_gpu(case: Any) -> Any:
    tensors = {name: x.cuda() for name, x in vars(case.reach).items() if isinstance(x, Tensor)}
    return replace(case, reach=replace(case.reach, **tensors), sees_key_TX=case.sees_key_TX.cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("heads", "width"), [(64, 128), (20, 128), (100, 128), (5, 64), (8, 96)])
def test_on_gpu(look_back: Callable[..., Any], heads: int, width: int, dtype: torch.dtype) -> None:
    for lengths, past, ratio in (
        ([1], [7000], 1), ([127], [0], 1), ([61, 1, 130, 2, 900], [5, 300, 0, 777, 0], 2), ([1] * 5, [3000] * 5, 4)
    ):  # fmt: skip
        case = on_gpu(look_back(lengths, past, 128, ratio, 1, 2))
        check(case, whole_numbers(case, heads, width, 4, dtype), 100)


@pytest.mark.gpu
def test_4001_tokens_on_gpu(look_back: Callable[..., Any]) -> None:
    case = on_gpu(look_back([4001], [0], 1, 1, 1))
    check(case, whole_numbers(case, 64, 128, 8, torch.bfloat16), 512)


@pytest.mark.gpu
def test_rounded_scores_lose_almost_nothing(look_back: Callable[..., Any]) -> None:
    """Real numbers: whatever the order of the sums, the picks have the largest scores up to FP32 rounding."""
    case = on_gpu(look_back([900], [3000], 1, 1, 1))
    q, weight, keys = torch.randn(900, 64, 128), torch.randn(900, 64), torch.randn(case.entries, 128)
    operands = q.cuda().bfloat16(), weight.cuda(), keys.cuda().bfloat16()
    scores = index_scores(operands[0].double(), operands[1].double(), operands[2].double())
    scores[torch.arange(case.entries, device="cuda") >= case.reach.visible_T[:, None]] = float("-inf")
    found = kernel_picks(operands, case.reach, 512)
    assert (found.diff(dim=1) > 0).all()
    best = scores.topk(512).values
    assert float((best - scores.gather(1, found).sort(1, descending=True).values).abs().max()) < 1e-4 * float(
        best.max()
    )


def long_sequence(tokens: int, entries: int, device: str = "cuda") -> tuple[OPERANDS, Reach]:
    """The last `tokens` of a sequence that has made `entries`, one for each token."""
    position = torch.arange(entries - tokens, entries, device=device)
    reach = Reach((tokens,), position, position, torch.zeros_like(position), position + 1, entries)
    q, keys = torch.randn(tokens, 64, 128, device=device), torch.randn(entries, 128, device=device)
    return (q.bfloat16(), torch.randn(tokens, 64, device=device), keys.bfloat16()), reach


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "entries", "k"), [(16384, 16384, 512), (1000, 262144, 2048), (1, 262144, 1024)])
def test_the_workspace_is_bounded(tokens: int, entries: int, k: int) -> None:
    operands, reach = long_sequence(tokens, entries)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = kernel_picks(operands, reach, k)
    assert torch.cuda.max_memory_allocated() - before - found.nbytes <= 512 * 2**20


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("tokens", [1, 700])
def test_captured_in_a_graph_and_waits_for_nobody(tokens: int) -> None:
    operands, reach = long_sequence(tokens, 5000)
    kernel_picks(operands, reach, 512)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernel_picks(operands, reach, 512)
    operands[0].normal_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        wanted = kernel_picks(operands, reach, 512)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    assert torch.equal(found, wanted)
