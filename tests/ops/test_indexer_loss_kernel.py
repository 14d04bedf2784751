"""The kernels of the indexer's loss against the reference in float64: interpreted in FP32, and on a GPU."""

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
from leadline.ops.indexer_loss import indexer_loss
from leadline.ops.reach import Reach

# name: lengths, past, ratio, picks, gap
CASES = {
    "one token": ([1], [0], 1, 1, 0),
    "no entry at all": ([3, 2], [0, 0], 4, 2, 0),
    "127": ([127], [0], 4, 3, 0),
    "ragged": ([1, 20, 3, 2, 7, 8, 9], [5, 0, 0, 33, 12, 3, 64], 4, 3, 2),
    "short sequences": ([1] * 6, [0, 3, 90, 17, 128, 4], 4, 20, 1),
    "chunk": ([13], [95], 1, 50, 1),
}
MODES = pytest.mark.parametrize("picked", [False, True], ids=["dense", "picked"])
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy warns where a GPU writes a NaN


def operands(case: Any, sizes: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, weight and keys of the index; q, entries and lse of the attention. sizes: J, I, H, K."""
    index_heads, index_width, heads, width = sizes
    device = case.sees_key_TX.device
    shapes = [
        (case.queries, index_heads, index_width),
        (case.entries, index_width),
        (case.queries, heads, width),
        (case.entries, width),
    ]
    q, keys, attention_q, entries = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    weight = torch.randn(case.queries, index_heads, device=device) * (index_heads * index_width) ** -0.5
    lse = torch.randn(case.queries, heads, device=device) + 5
    return [q, weight, keys, attention_q, entries, lse]


def results(case: Any, picked: bool, inputs: list[Tensor], name: Any) -> list[Tensor]:
    """kl, and gradients of the index's q, weight and keys."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    dkl = torch.linspace(-1, 2, case.queries, device=inputs[0].device)
    with implementation(name):
        kl = indexer_loss(
            leaves[0], leaves[1], leaves[2], inputs[3], inputs[4], inputs[5],
            case.reach, case.picked_TM if picked else None,
        )  # fmt: skip
        return [kl.detach(), *torch.autograd.grad(kl, leaves, dkl.to(kl.dtype))]


def check(
    case: Any, picked: bool, sizes: tuple[int, int, int, int] = (3, 5, 2, 12),
    dtype: torch.dtype = torch.float32, bound: float = 2e-6, fp32_bound: float = 2e-6,
) -> None:  # fmt: skip
    inputs = operands(case, sizes, dtype)
    wanted = results(case, picked, [x.double() for x in inputs], "reference")
    found = results(case, picked, inputs, "kernel")
    for name, ours, theirs in zip(("kl", "dq", "dweight", "dkeys"), found, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == (torch.float32 if name in ("kl", "dweight") else dtype)
        distance, size = float((ours.double() - theirs).norm()), float(theirs.norm())
        allowed = bound if name in ("dq", "dkeys") else fp32_bound
        assert distance <= allowed * (size or 1.0), (name, distance, size)


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@MODES
@pytest.mark.parametrize("name", CASES)
def test_interpreted(look_back: Callable[..., Any], name: str, picked: bool) -> None:
    lengths, past, ratio, picks, gap = CASES[name]
    check(look_back(lengths, past, 4, ratio, picks, gap), picked)


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@MODES
@pytest.mark.parametrize("sizes", [(1, 16, 1, 16), (20, 3, 40, 4), (40, 17, 5, 33)], ids=str)
def test_shapes(look_back: Callable[..., Any], sizes: tuple[int, int, int, int], picked: bool) -> None:
    """Several blocks of heads in one part of the loss or in both; widths that are no power of two."""
    check(look_back([9, 3], [0, 15], 4, 3, 5), picked, sizes)


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@settings(max_examples=10)
@given(st.data())
def test_any_segment(look_back: Callable[..., Any], data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    past = [data.draw(st.integers(0, 40)) for _ in lengths]
    picks, gap, seed = data.draw(st.integers(1, 30)), data.draw(st.integers(0, 3)), data.draw(st.integers(0, 99))
    torch.manual_seed(seed)
    check(look_back(lengths, past, 4, data.draw(st.integers(1, 6)), picks, gap, seed), data.draw(st.booleans()))


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@MODES
def test_a_small_workspace_changes_nothing_but_the_order_of_sums(
    look_back: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, picked: bool
) -> None:
    """Room for two or three queries at a time."""
    from leadline.ops.indexer_loss import kernel

    case = look_back([16, 4], [0, 9], 4, 2, 5)
    for rows_bytes in (3 * 16 * 8, 2 * 5 * 5 * 4):
        monkeypatch.setattr(kernel, "WORKSPACE_BYTES", rows_bytes)
        check(case, picked)


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@MODES
def test_rows_that_nobody_sees_may_hold_anything(look_back: Callable[..., Any], picked: bool) -> None:
    case = look_back([1] * 5 + [12], [0, 1, 2, 40, 2, 70], 6, 4, 2, gap=3)
    inputs = operands(case, (3, 5, 2, 12))
    expected = results(case, picked, inputs, "kernel")
    unseen = ~case.sees_entry_TC.any(0)
    assert unseen.any()
    for keys in (inputs[2], inputs[4]):
        keys[unseen] = float("nan")
    for found, wanted in zip(results(case, picked, inputs, "kernel"), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@MODES
def test_wild_scores_do_not_overflow(look_back: Callable[..., Any], picked: bool) -> None:
    """Index scores of thousands: the guess is all but certain of one entry, and the loss as large as their spread."""
    case = look_back([20, 2], [0, 9], 4, 2, 3)
    inputs = operands(case, (3, 5, 2, 12))
    inputs[1] *= 1e4
    wanted = results(case, picked, [x.double() for x in inputs], "reference")
    for found, exact in zip(results(case, picked, inputs, "kernel"), wanted, strict=True):
        assert found.isfinite().all()
        assert float((found - exact).norm()) <= 1e-5 * float(exact.norm())


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@MODES
def test_a_nan_is_not_hidden(look_back: Callable[..., Any], picked: bool) -> None:
    case = look_back([30], [0], 4, 1, 30)
    for operand in (0, 3):
        inputs = operands(case, (3, 5, 2, 12))
        inputs[operand][20] = float("nan")
        kl = results(case, picked, inputs, "kernel")[0]
        sees = case.sees_picked_TC if picked else case.sees_entry_TC
        assert kl.isnan().nonzero().tolist() == [[20]] * bool(sees[20].any())


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@MODES
def test_any_layout_in(look_back: Callable[..., Any], scattered: Callable[[Tensor], Tensor], picked: bool) -> None:
    case = look_back([12, 2], [0, 9], 4, 2, 3)
    inputs = operands(case, (3, 5, 2, 12))
    plain = results(case, picked, inputs, "kernel")
    for found, wanted in zip(results(case, picked, [scattered(x) for x in inputs], "kernel"), plain, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch does, while it traces
@MODES
def test_compiled_by_torch(look_back: Callable[..., Any], picked: bool) -> None:
    """Forward and backward are one graph each."""
    case = look_back([9, 3], [0, 20], 4, 2, 3)
    inputs = operands(case, (3, 5, 2, 12))
    picks = case.picked_TM if picked else None

    def op(q: Tensor, weight: Tensor, keys: Tensor, attention_q: Tensor, entries: Tensor, lse: Tensor) -> Tensor:
        return indexer_loss(q, weight, keys, attention_q, entries, lse, case.reach, picks).square()

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    gradients = []
    with implementation("kernel"):
        for function in (op, compiled):
            leaves = [x.detach().requires_grad_() for x in inputs[:3]]
            gradients.append(torch.autograd.grad(function(*leaves, *inputs[3:]).sum(), leaves))
    for found, wanted in zip(*gradients, strict=True):
        assert torch.equal(found, wanted)


def on_gpu(case: Any) -> Any:
    seen = {name: x.cuda() for name, x in vars(case.reach).items() if isinstance(x, Tensor)}
    rest = {name: x.cuda() for name, x in vars(case).items() if isinstance(x, Tensor)}
    return replace(case, reach=replace(case.reach, **seen), **rest)


# BF16 is rounded at 2^-9: the gradients of the products before they are multiplied, and every result. In FP32 a product
# within rounding of zero may be on the other side of the ReLU, which moves the gradients of q and keys by a whole term.
@pytest.mark.gpu
@MODES
@pytest.mark.parametrize(
    ("dtype", "bounds"), [(torch.bfloat16, (6e-3, 1e-5)), (torch.float32, (1e-4, 5e-6))], ids=["bf16", "fp32"]
)
@pytest.mark.parametrize("sizes", [(64, 128, 64, 512), (5, 64, 8, 96), (100, 32, 128, 64)], ids=str)
def test_on_gpu(
    look_back: Callable[..., Any], sizes: tuple[int, int, int, int], dtype: torch.dtype,
    bounds: tuple[float, float], picked: bool,
) -> None:  # fmt: skip
    for lengths, past in (([1], [700]), ([127], [0]), ([61, 1, 130, 2], [5, 300, 0, 77])):
        check(on_gpu(look_back(lengths, past, 128, 2, 100, 2)), picked, sizes, dtype, *bounds)


@pytest.mark.gpu
@MODES
def test_4001_tokens_on_gpu(look_back: Callable[..., Any], picked: bool) -> None:
    check(on_gpu(look_back([4001], [0], 128, 4, 512)), picked, (64, 128, 16, 512), torch.bfloat16, 6e-3, 1e-5)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@MODES
def test_two_runs_agree_bitwise_and_wait_for_nobody(look_back: Callable[..., Any], picked: bool) -> None:
    case = on_gpu(look_back([700, 1, 90], [0, 300, 40], 128, 4, 64))
    inputs = operands(case, (64, 128, 64, 512), torch.bfloat16)
    first = results(case, picked, inputs, "kernel")
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = results(case, picked, inputs, "kernel")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before, after)


@pytest.mark.gpu
@MODES
def test_captured_in_a_graph(look_back: Callable[..., Any], picked: bool) -> None:
    case = on_gpu(look_back([300, 1], [0, 900], 128, 4, 64))
    inputs = operands(case, (64, 128, 64, 512), torch.bfloat16)
    wanted = results(case, picked, inputs, "kernel")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(case, picked, inputs, "kernel")
    graph.replay()
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@MODES
def test_linear_memory_on_gpu(picked: bool) -> None:
    """16,384 queries by 4,096 entries would be 256 MiB for each matrix; with twice as many tokens nothing but the
    tensors that the op returns may grow, once the workspace is full."""
    peaks = []
    for tokens in (16384, 32768):
        position = torch.arange(tokens, device="cuda")
        visible = (position + 1) // 4
        reach = Reach((tokens,), position, position, torch.zeros_like(position), visible, tokens // 4)
        shapes = (tokens, 64, 128), (tokens, 64), (tokens // 4, 128), (tokens, 2, 64), (tokens // 4, 64)
        inputs = [torch.randn(shape, device="cuda").bfloat16() for shape in shapes]
        q, weight, keys = (x.requires_grad_() for x in inputs[:3])
        lse, number = torch.full((tokens, 2), 9.0, device="cuda"), torch.arange(512, device="cuda")
        picks = torch.where(number < visible[:, None], number, -1) if picked else None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with implementation("kernel"):
            kl = indexer_loss(q, weight.float(), keys, inputs[3], inputs[4], lse, reach, picks)
            kl.sum().backward()
        kept = sum(x.nbytes for x in (q, weight, keys)) + (tokens * 512 * 4 if picked else 0)
        peaks.append(torch.cuda.max_memory_allocated() - before - kept)
    assert max(peaks) <= 640 * 2**20
