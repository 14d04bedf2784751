"""The kernels of sparse attention against its reference: Triton's and Gluon's interpreted in FP32, all on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.ops.dispatch import implementation
from leadline.ops.reach import Reach
from leadline.ops.rehearsal import rehearsal
from leadline.ops.rope import frequencies, rotations
from leadline.ops.sparse_attention import sparse_attention

MODES = ["window", "entries", "picked"]
# name: lengths, past, window, ratio, picks, gap
CASES = {
    "one token": ([1], [0], 4, 4, 1, 0),
    "window filled exactly": ([4], [0], 4, 4, 2, 0),
    "no entry at all": ([3, 2, 20], [0, 0, 0], 8, 128, 2, 0),
    "gathered picks": ([45], [0], 5, 2, 2, 0),
    "decode batch": ([1] * 9, [0, 1, 3, 4, 30, 7, 127, 128, 2], 8, 4, 2, 3),
    "decode after the window": ([1], [300], 16, 4, 40, 0),
    "ragged": ([1, 20, 3, 2, 7, 8, 9], [5, 0, 0, 33, 12, 3, 64], 7, 4, 3, 2),
    "chunk": ([13], [295], 70, 4, 70, 1),
}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy warns where a GPU writes an infinity


def attend(
    case: Any, mode: str, q: Tensor, keys: Tensor, entries: Tensor, sink: Tensor, *, rotary_width: int = 0
) -> tuple[Tensor, Tensor]:
    """rotary_width: of the values that are turned back in the output, if any."""
    rotation = None
    if rotary_width:
        rotation = rotations(torch.arange(len(q), device=q.device) * 7, frequencies(rotary_width, 1e4).to(q.device))
    if mode == "window":
        reach = Reach(case.reach.lengths, case.reach.first_key_T, case.reach.last_key_T)
        return sparse_attention(q, keys, None, sink, reach, None, rotation)
    picked_TM = case.picked_TM if mode == "picked" else None
    return sparse_attention(q, keys, entries, sink, case.reach, picked_TM, rotation)


def operands(case: Any, heads: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    device = case.sees_key_TX.device
    shapes = [(case.queries, heads, width), (case.keys, width), (case.entries, width)]
    vectors = [(torch.randn(shape, device=device) * 1.5).to(dtype) for shape in shapes]
    return [*vectors, torch.randn(heads, device=device)]


def results(case: Any, mode: str, inputs: list[Tensor], do: Tensor, rotary_width: int = 0) -> list[Tensor]:
    """o, lse and the gradients of q, keys, entries (none without entries) and sink."""
    leaves = [x.detach().requires_grad_(not (mode == "window" and place == 2)) for place, x in enumerate(inputs)]
    o, lse = attend(case, mode, leaves[0], leaves[1], leaves[2], leaves[3], rotary_width=rotary_width)
    assert not lse.requires_grad
    return [o.detach(), lse, *torch.autograd.grad(o, [x for x in leaves if x.requires_grad], do.to(o.dtype))]


def kernel_results(case: Any, mode: str, inputs: list[Tensor], do: Tensor, rotary_width: int = 0) -> list[Tensor]:
    with implementation("kernel"):
        return results(case, mode, inputs, do, rotary_width)


def difference(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, or |found| where all that is wanted is zero."""
    scale = wanted.double().norm()
    return float((found.double() - wanted.double()).norm() / torch.where(scale > 0, scale, 1.0))


def check(
    case: Any, mode: str, heads: int, width: int, dtype: torch.dtype = torch.float32, bound: float = 1e-5,
    rotary_width: int = 0,
) -> None:  # fmt: skip
    inputs = operands(case, heads, width, dtype)
    do = torch.randn_like(inputs[0])
    with implementation("reference"):
        wanted = results(case, mode, [x.double() for x in inputs], do.double(), rotary_width)
    found = kernel_results(case, mode, inputs, do, rotary_width)
    names = ["o", "lse", "dq", "dkeys", *(["dentries"] if mode != "window" else []), "dsink"]
    for name, ours, theirs in zip(names, found, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == (torch.float32 if name in ("lse", "dsink") else dtype), name
        assert difference(ours, theirs) <= bound, (name, difference(ours, theirs))


interpreted = pytest.mark.usefixtures("loops_to_scalars")


@interpreted
@pytest.mark.interpret
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_interpreted(look_back: Callable[..., Any], name: str, mode: str) -> None:
    check(look_back(*CASES[name]), mode, heads=2, width=8)


@interpreted
@pytest.mark.interpret
@pytest.mark.parametrize(("heads", "width"), [(1, 16), (3, 48), (8, 20), (20, 8), (40, 96)])
@pytest.mark.parametrize("mode", ["entries", "picked"])
def test_shapes(look_back: Callable[..., Any], heads: int, width: int, mode: str) -> None:
    """Heads fewer than the rows of a product and more than those of a tile; widths that no chunk divides."""
    check(look_back([9, 3, 2], [0, 15, 0], 9, 4, 3), mode, heads, width)


@interpreted
@pytest.mark.interpret
@pytest.mark.parametrize("mode", MODES)
def test_turned_back(look_back: Callable[..., Any], mode: str) -> None:
    check(look_back([9, 3, 2], [0, 15, 0], 9, 4, 3), mode, heads=3, width=16, rotary_width=6)


@interpreted
@pytest.mark.interpret
@settings(max_examples=20)
@given(st.data())
def test_any_segment(look_back: Callable[..., Any], data: st.DataObject) -> None:
    check(*any_segment(look_back, data), heads=2, width=8)


def any_segment(look_back: Callable[..., Any], data: st.DataObject) -> tuple[Any, str]:
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    past = [data.draw(st.integers(0, 90)) for _ in lengths]
    window, ratio = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 6))
    picks, gap, seed = data.draw(st.integers(1, 70)), data.draw(st.integers(0, 3)), data.draw(st.integers(0, 99))
    torch.manual_seed(seed)
    return look_back(lengths, past, window, ratio, picks, gap, seed), data.draw(st.sampled_from(MODES))


@interpreted
@pytest.mark.interpret
@pytest.mark.parametrize("mode", MODES)
def test_any_layout_in(look_back: Callable[..., Any], scattered: Callable[[Tensor], Tensor], mode: str) -> None:
    case = look_back([20, 3, 2], [0, 9, 1], 5, 4, 2)
    inputs = operands(case, 2, 8)
    do = torch.randn_like(inputs[0])
    plain = kernel_results(case, mode, inputs, do)
    for found, wanted in zip(
        kernel_results(case, mode, [scattered(x) for x in inputs], scattered(do)), plain, strict=True
    ):
        assert torch.equal(found, wanted)


@interpreted
@pytest.mark.interpret
@pytest.mark.parametrize("mode", MODES)
def test_rows_that_nobody_sees_may_hold_anything(look_back: Callable[..., Any], mode: str) -> None:
    case = look_back([1] * 5 + [12], [0, 1, 2, 40, 2, 70], 6, 4, 2, gap=3)
    inputs = operands(case, 2, 8)
    do = torch.randn_like(inputs[0])
    expected = kernel_results(case, mode, inputs, do)
    unseen = ~case.sees_entry_TC.any(0)
    assert unseen.any()
    inputs[2][unseen] = float("nan")
    for found, wanted in zip(kernel_results(case, mode, inputs, do), expected, strict=True):
        assert torch.equal(found, wanted)


@interpreted
@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch does, while it traces
@pytest.mark.parametrize("mode", MODES)
def test_compiled_by_torch(look_back: Callable[..., Any], mode: str) -> None:
    """Forward and backward are one graph each."""
    case = look_back([9, 3], [0, 20], 4, 2, 3)
    inputs = operands(case, 2, 8)

    def op(*inputs: Tensor) -> Tensor:
        o, lse = attend(case, mode, inputs[0], inputs[1], inputs[2], inputs[3])
        return o.square() * lse[..., None]

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    gradients = []
    with implementation("kernel"):
        for function in (op, compiled):
            leaves = [
                x.detach().requires_grad_(not (mode == "window" and place == 2)) for place, x in enumerate(inputs)
            ]
            wanted = [x for x in leaves if x.requires_grad]
            gradients.append(torch.autograd.grad(function(*leaves).sum(), wanted))
    for found, wanted in zip(*gradients, strict=True):
        assert torch.equal(found, wanted)


@interpreted
@pytest.mark.interpret
@pytest.mark.parametrize("height", [float("-inf"), 50.0, 1e4])
def test_extreme_sinks(look_back: Callable[..., Any], height: float) -> None:
    """At -inf the sum is a plain softmax; far above the scores the output is zero, and lse is the sink."""
    case = look_back([20, 2], [0, 9], 5, 4, 2)
    inputs = [*operands(case, 2, 8)[:3], torch.full((2,), height)]
    do = torch.randn_like(inputs[0])
    found = kernel_results(case, "picked", inputs, do)
    with implementation("reference"):
        wanted = results(case, "picked", inputs, do)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.interpret
def test_wild_scores_do_not_overflow(look_back: Callable[..., Any]) -> None:
    case = look_back([20, 2], [0, 9], 5, 4, 2)
    q, *rest = operands(case, 2, 8)
    with implementation("kernel"):
        found = attend(case, "picked", q * 1e3, *rest)
    with implementation("reference"):
        wanted = attend(case, "picked", q * 1e3, *rest)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-3)


@interpreted
@pytest.mark.interpret
def test_a_small_workspace_changes_nothing_but_the_order_of_sums(
    look_back: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for three queries at a time: seven chunks, the last of them short."""
    from leadline.ops.sparse_attention import kernel

    case = look_back([16, 4], [0, 9], 5, 2, 3)
    monkeypatch.setattr(kernel, "WORKSPACE_BYTES", 3 * 3 * 8 * 4 + 5)
    check(case, "picked", heads=2, width=8)


@interpreted
@pytest.mark.interpret
def test_a_sequence_without_an_entry_between_two_that_have_some(look_back: Callable[..., Any]) -> None:
    """Its queries name the first entry of the sequence behind it as theirs."""
    for mode in MODES:
        check(look_back([9, 2, 9, 1, 1, 6], [0] * 6, 3, 4, 2), mode, heads=1, width=8)


@pytest.mark.interpret
@settings(max_examples=40)
@given(st.data())
def test_inverse_lists(look_back: Callable[..., Any], data: st.DataObject) -> None:
    """The queries of each key and of each entry, and the picks of each entry, against the full masks."""
    from leadline.ops.sparse_attention import kernel

    case, _ = any_segment(look_back, data)
    t_T = torch.arange(case.queries)[:, None]
    for (start, stop), sees in (
        (kernel.queries_of_keys(case.reach.first_key_T, case.reach.last_key_T, case.keys), case.sees_key_TX),
        (kernel.queries_of_entries(case.reach.first_entry_T, case.reach.visible_T, case.entries), case.sees_entry_TC),
    ):
        assert torch.equal((t_T >= start) & (t_T < stop), sees)
    chunk, num_picks = data.draw(st.integers(1, case.queries)), case.picked_TM.shape[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "PICKS_PER_SORT", data.draw(st.integers(1, 3)) * chunk * num_picks)
        inverses = list(kernel.picks_of_entries(case.reach.first_entry_T, case.picked_TM, case.entries, chunk))
    starts = range(0, case.queries, chunk)
    for start, inverse in zip(starts, inverses, strict=True):
        for entry in range(case.entries):
            picks = inverse.order_P[inverse.first_C[entry] : inverse.first_C[entry + 1]] - inverse.skip
            sees_t = case.sees_picked_TC[start : start + chunk, entry]
            assert torch.equal(picks // num_picks, sees_t.nonzero().flatten())


@interpreted
@pytest.mark.interpret
def test_slots_in_any_order() -> None:
    """Sequences whose entries stand in another order than the sequences, with rows of nobody between."""
    from leadline.ops.sparse_attention.kernel import queries_of_entries

    first = torch.tensor([8, 8, 8, 0, 0, 20, 20, 20])
    visible = torch.tensor([0, 1, 3, 2, 2, 0, 0, 1])
    start, stop = queries_of_entries(first, visible, 24)
    seen = [[t for t in range(8) if first[t] <= c < first[t] + visible[t]] for c in range(24)]
    assert [list(range(int(a), int(b))) for a, b in zip(start, stop, strict=True)] == seen


@pytest.fixture
def hopper(gluon: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels for Hopper run instead of the others, interpreted."""
    from leadline.ops.sparse_attention import hopper, hopper_backward, hopper_forward, kernel

    shared = Path(hopper.__file__)
    forward = gluon.Kernels(shared, Path(hopper_forward.__file__))
    backward = gluon.Kernels(shared, Path(hopper_backward.__file__))
    launched = set()

    class Launcher:
        def __init__(self, kernels: Any, name: str):
            self.kernels, self.name = kernels, name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: Any, num_warps: int, **constants: Any) -> None:
                launched.add(self.name)
                self.kernels.run(self.name, grid, *arguments, **constants)

            return launch

    places = [(hopper_forward, forward, "fwd")]
    places += [(hopper_backward, backward, name) for name in ("bwd_queries", "bwd_columns")]
    for module, kernels, name in places:
        name = f"sparse_attention_{name}_hopper_kernel"
        monkeypatch.setattr(module, name, Launcher(kernels, name))
    monkeypatch.setattr(kernel, "for_hopper", lambda q: True)
    yield
    assert len(launched) == 3


@interpreted
@pytest.mark.interpret
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_hopper_interpreted(look_back: Callable[..., Any], name: str, mode: str) -> None:
    check(look_back(*CASES[name]), mode, heads=40, width=128)


@interpreted
@pytest.mark.interpret
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("heads", "width"), [(70, 256), (33, 512)])
def test_hopper_shapes(look_back: Callable[..., Any], heads: int, width: int, mode: str) -> None:
    """Two blocks of heads, and a block that is not full; several pieces of a row; several steps everywhere."""
    check(look_back([5, 1, 2], [290, 300, 0], 150, 2, 130), mode, heads, width)


@interpreted
@pytest.mark.interpret
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("rotary_width", [64, 32])
@pytest.mark.parametrize("mode", MODES)
def test_hopper_turned_back(look_back: Callable[..., Any], mode: str, rotary_width: int) -> None:
    """By the width that the kernels know, and by one that is turned before them."""
    check(look_back([5, 1, 2], [40, 300, 0], 15, 2, 13), mode, heads=33, width=128, rotary_width=rotary_width)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("hurry", "complaint"),
    [
        ("barrier", "before a barrier behind the last write"),
        ("fence", "no proxy fence"),
        ("copy", "while a copy is under way"),
        ("overwrite", "changed under a product"),
        ("reuse", "before a barrier behind the last read"),
        ("bounds", "out of bounds"),
    ],
)
def test_the_stand_in_notices_haste(gluon: Any, hurry: str, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        multiply_in_haste(gluon, hurry)


def test_the_stand_in_multiplies(gluon: Any) -> None:
    assert torch.equal(multiply_in_haste(gluon, "none"), torch.full((4, 4), 6.0))


def multiply_in_haste(gluon: Any, hurry: str) -> Tensor:
    """Copy [[0, 1, 2, 3]] x 4, store ones, multiply; leave out a step, or write too early."""
    device = gluon.Device()
    a = device.allocate(torch.float32, [4, 4], None)
    b = device.allocate(torch.float32, [4, 4], None)
    source = device.memory.pointer(torch.arange(4.0).repeat(4))
    device.copy(a, source + (torch.arange(16).view(4, 4) + (1 if hurry == "bounds" else 0)))
    device.commit()
    b.store(gluon.block(torch.ones(4, 4)))
    if hurry != "copy":
        device.wait_copies()
    if hurry != "fence":
        device.fence()
    if hurry != "barrier":
        device.barrier()
    product = device.product(a, b, gluon.block(torch.zeros(4, 4)), is_async=True)
    if hurry == "overwrite":
        b.store(gluon.block(torch.zeros(4, 4)))
    result = product.landed()
    if hurry == "reuse":
        b.store(gluon.block(torch.zeros(4, 4)))
    return result


@pytest.mark.interpret
def test_every_kernel_fits_every_gpu() -> None:
    """Compiled at the width of V4-Flash for GPUs that are not there. The kernels for Hopper keep their registers, and
    the assembler lets their products run ahead."""
    script = Path(__file__).with_name("compile_sparse_attention.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == 7 + 9
    for report in reports:
        assert report["shared"] <= report["room"], report
        assert not report["serialized"], report
        assert report["spilled"] <= 320, report


@pytest.mark.parametrize(
    ("hurry", "complaint"),
    [
        ("barrier", "read before a barrier behind the last write"),
        ("reuse", "written before a barrier behind the last read"),
        ("copy", "while a copy is under way"),
        ("arrive", "deadlock: every partition waits"),
        ("twice", "more arrivals than the phase has"),
    ],
)
def test_the_stand_in_notices_haste_between_partitions(gluon: Any, hurry: str, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        hand_over_in_haste(gluon, hurry)


def test_the_stand_in_hands_over(gluon: Any) -> None:
    for _ in range(5):  # the partitions take turns in another order each time
        assert hand_over_in_haste(gluon, "none").tolist() == [[1.0] * 4, [0.0, 1.0, 2.0, 3.0], [2.0] * 4]


def hand_over_in_haste(gluon: Any, hurry: str) -> Tensor:
    """One partition stores ones and copies [0, 1, 2, 3], the other one reads both, and then the first stores twos;
    leave out a step, or do one twice."""
    device = gluon.Device()
    stored, copied = (device.allocate(torch.float32, [4], None) for _ in range(2))
    marks = device.allocate(torch.int64, [3, 1], None)
    for place, count in enumerate((1, gluon.THREADS, 1)):
        device.begin_mbarrier(marks.index(place), count)
    source = device.memory.pointer(torch.arange(4.0)) + torch.arange(4)
    seen = []

    def give() -> None:
        stored.store(gluon.block(torch.ones(4)))
        device.copy(copied, source)
        if hurry != "copy":
            device.arrive_with_copies(marks.index(1), False)
        if hurry != "barrier":
            device.barrier()
        if hurry != "arrive":
            device.arrive(marks.index(0), count=2 if hurry == "twice" else 1)
        device.wait(marks.index(2), 0)
        stored.store(gluon.block(torch.full((4,), 2.0)))
        device.barrier()
        device.arrive(marks.index(0))

    def take() -> None:
        device.wait(marks.index(0), 0)
        if hurry != "copy":
            device.wait(marks.index(1), 0)
        seen.extend([stored.load(None), copied.load(None)])
        if hurry != "reuse":
            device.barrier()
        device.arrive(marks.index(2))
        device.wait(marks.index(0), 1)
        seen.append(stored.load(None))

    device.specialise([(give, ()), (take, ())])
    return torch.stack(seen)


def on_gpu(look_back: Callable[..., Any], *arguments: Any) -> Any:
    case = look_back(*arguments)
    runs = {name: x.cuda() for name, x in vars(case.reach).items() if isinstance(x, Tensor)}
    tensors = {name: x.cuda() for name, x in vars(case).items() if isinstance(x, Tensor)}
    return replace(case, reach=replace(case.reach, **runs), **tensors)


# BF16 is rounded at 2^-9: the probabilities and their gradients before they are multiplied, and every result.
BOUNDS = {torch.bfloat16: 8e-3, torch.float32: 5e-6}
# kernels, dtype, heads, width, modes: those for Hopper where they run at all, and the others with few heads and many.
GPU_SHAPES = [
    ("hopper", torch.bfloat16, 64, 512, MODES),
    ("hopper", torch.bfloat16, 100, 128, MODES),
    ("any GPU", torch.bfloat16, 64, 512, MODES),
    ("any GPU", torch.bfloat16, 5, 64, MODES),
    ("any GPU", torch.float32, 64, 512, ["picked"]),
    ("any GPU", torch.float32, 40, 96, MODES),
]
GPU_CASES = [(*shape[:4], mode) for shape in GPU_SHAPES for mode in shape[4]]
GPU_LENGTHS = (([1], [700]), ([127], [0]), ([61, 1, 130, 2], [5, 300, 0, 77]))  # and past


@contextmanager
def kernels_for(generation: str) -> Iterator[None]:
    """Inside of the block those for Hopper, where they run at all, or the others."""
    from leadline.ops.sparse_attention import kernel

    with pytest.MonkeyPatch.context() as patch:
        if generation == "any GPU":
            patch.setattr(kernel, "for_hopper", lambda q: False)
        yield


@pytest.fixture(scope="module")
def _compiled_ahead(look_back: Callable[..., Any]) -> None:
    """All kernels of the tests below, many at the same time: the compiler tells lists of picks apart by whether their
    length is a multiple of 16."""
    lengths = [on_gpu(look_back, *lengths, 128, 4, 100, 2) for lengths in GPU_LENGTHS]
    aligned = on_gpu(look_back, [700, 1, 90], [0, 300, 40], 128, 4, 64)
    with rehearsal():
        for generation, dtype, heads, width, mode in GPU_CASES:
            for case in [*lengths, aligned] if (dtype, width) == (torch.bfloat16, 512) else lengths:
                inputs = operands(case, heads, width, dtype)
                with kernels_for(generation):
                    kernel_results(case, mode, inputs, torch.randn_like(inputs[0]))


@pytest.mark.gpu
@pytest.mark.usefixtures("_compiled_ahead")
@pytest.mark.parametrize(("generation", "dtype", "heads", "width", "mode"), GPU_CASES, ids=str)
def test_on_gpu(
    look_back: Callable[..., Any], generation: str, dtype: torch.dtype, heads: int, width: int, mode: str
) -> None:
    with kernels_for(generation):
        for lengths, past in GPU_LENGTHS:
            check(on_gpu(look_back, lengths, past, 128, 4, 100, 2), mode, heads, width, dtype, BOUNDS[dtype])


@pytest.mark.gpu
@pytest.mark.usefixtures("_compiled_ahead")
@pytest.mark.parametrize("generation", ["hopper", "any GPU"])
@pytest.mark.parametrize("mode", MODES)
def test_turned_back_on_gpu(look_back: Callable[..., Any], mode: str, generation: str) -> None:
    case = on_gpu(look_back, [61, 1, 130, 2], [5, 300, 0, 77], 128, 4, 100, 2)
    with kernels_for(generation):
        check(case, mode, 64, 512, torch.bfloat16, BOUNDS[torch.bfloat16], rotary_width=64)


@pytest.mark.gpu
@pytest.mark.usefixtures("_compiled_ahead")
@pytest.mark.parametrize("mode", MODES)
def test_4001_tokens_on_gpu(look_back: Callable[..., Any], mode: str) -> None:
    check(on_gpu(look_back, [4001], [0], 128, 4, 512), mode, 64, 512, torch.bfloat16, 8e-3)


@pytest.mark.gpu
@pytest.mark.usefixtures("_compiled_ahead")
@pytest.mark.parametrize("generation", ["hopper", "any GPU"])
@pytest.mark.parametrize("mode", MODES)
def test_two_runs_agree_bitwise_and_wait_for_nobody(look_back: Callable[..., Any], mode: str, generation: str) -> None:
    case = on_gpu(look_back, [700, 1, 90], [0, 300, 40], 128, 4, 64)
    inputs = operands(case, 64, 512, torch.bfloat16)
    do = torch.randn_like(inputs[0])
    with kernels_for(generation):
        first = kernel_results(case, mode, inputs, do)
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = kernel_results(case, mode, inputs, do)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before, after)


@pytest.mark.gpu
@pytest.mark.usefixtures("_compiled_ahead")
@pytest.mark.parametrize("mode", MODES)
def test_captured_in_a_graph(look_back: Callable[..., Any], mode: str) -> None:
    case = on_gpu(look_back, [1] * 7, [0, 300, 40, 7, 127, 128, 9], 128, 4, 64)
    inputs = operands(case, 64, 512, torch.bfloat16)
    with torch.no_grad():
        wanted = attend(case, mode, *inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = attend(case, mode, *inputs)
        graph.replay()
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)
