"""The kernels of quantised products against the reference: Triton's and Gluon's interpreted, all of them on a GPU."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.formats import e8m0, fp4, fp8
from leadline.ops.dispatch import implementation
from leadline.ops.invariance import batch_invariant
from leadline.ops.quantized_linear import (
    FORMATS,
    Dispatched,
    Format,
    Gated,
    QuantizedWeight,
    quantize,
    quantized_grouped_linear,
    quantized_linear,
    quantized_linears,
)
from leadline.ops.token_permutation import expert_order

COUNTS = {
    "one expert": [5],
    "experts without rows": [0, 4, 0, 0, 1, 0],
    "uneven": [21, 1, 2, 0, 34],
    "every expert once": [1] * 9,
    "ends off a multiple of four": [3, 5, 6, 18, 1],
}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy warns where a GPU writes an infinity


def random_weight(format: Format, *shape: int, scale_dtype: torch.dtype = torch.float8_e8m0fnu) -> QuantizedWeight:
    """Columns of very different size, so that blocks and sub-blocks have different scales."""
    return quantize(torch.randn(shape) * torch.logspace(-1, 1, shape[-1]), format, scale_dtype=scale_dtype)


def close(found: Tensor, wanted: Tensor, bound: float = 1e-6) -> bool:
    """In the norm of each row: products in FP32 may add in any order."""
    distance, size = (found - wanted).double().norm(dim=-1), wanted.double().norm(dim=-1)
    return found.dtype == wanted.dtype and bool((distance <= bound * size).all())


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@pytest.mark.parametrize("width", [32, 128, 160, 1000])
def test_activations_become_the_codes_of_the_format(width: int) -> None:
    from leadline.ops.quantized_linear.round_kernel import Operands, round_activations

    x = torch.randn(9, width) * torch.logspace(-9, 6, width)
    x[1, : width // 2] = 0
    x[2, width // 3] = torch.inf
    x[3, 0], x[3, -1] = torch.nan, -torch.inf
    for dtype in (torch.float32, torch.bfloat16):
        codes, scale = fp8.quantize(x.to(dtype), 128)
        rounded = round_activations(Operands(x.to(dtype)), None, 16, False)
        finite = scale.isfinite()
        assert torch.equal(rounded.scale[:, :9].T.isfinite(), finite)
        assert torch.equal(rounded.scale[:, :9].T[finite], scale[finite])
        real = finite.repeat_interleave(128, 1)[:, :width]
        assert torch.equal(rounded.codes[real], codes.view(torch.uint8)[real])


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
def test_every_code_and_tie() -> None:
    """Groups led by 448 have scale 1: all values of the format, and all middles between two of them."""
    from leadline.ops.quantized_linear.round_kernel import Operands, round_activations

    finite = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = torch.stack([finite, (finite + finite.roll(-1)) / 2])
    x[1, -1] = 300.0
    x = torch.cat([torch.full((2, 1), 448.0), x], 1)
    for values in (x, -x):
        codes, _ = fp8.quantize(values, 128)
        assert torch.equal(round_activations(Operands(values), None, 16, False).codes, codes.view(torch.uint8))


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@pytest.mark.parametrize("tokens", [16, 32])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_tiles_cover_every_row_once(counts: list[int], tokens: int) -> None:
    from leadline.ops.quantized_linear.round_kernel import Operands, round_activations

    rounded = round_activations(Operands(torch.randn(sum(counts), 128)), torch.tensor(counts), tokens, False)
    assert rounded.tiles is not None
    number, *_ = rounded.tiles.tolist()
    assert number <= rounded.max_tiles
    expert_of_row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).tolist()
    found = []
    for expert, first, begin, end in rounded.tiles[4 : 4 + 4 * number].view(-1, 4).tolist():
        assert first % 4 == 0
        assert first <= begin < end <= first + tokens
        found += [(row, expert) for row in range(begin, end)]
    assert found == list(enumerate(expert_of_row))


def check_dense(format: Format, tokens: int, rows: int, columns: int, bound: float = 1e-6) -> None:
    for scale_dtype in (torch.float8_e8m0fnu, torch.float32):
        x, weight = torch.randn(tokens, columns), random_weight(format, rows, columns, scale_dtype=scale_dtype)
        with implementation("kernel"):
            assert close(quantized_linear(x, weight), reference(quantized_linear, x, weight), bound)


def check_grouped(format: Format, counts: list[int], rows: tuple[int, ...], columns: int) -> None:
    x, counts_E = torch.randn(sum(counts), columns), torch.tensor(counts)
    weights = [random_weight(format, len(counts), number, columns) for number in rows]
    with implementation("kernel"):
        found = quantized_grouped_linear(x, weights, counts_E)
    for ours, wanted in zip(found, reference(quantized_grouped_linear, x, weights, counts_E), strict=True):
        assert close(ours, wanted)


def reference(function: Callable[..., Any], *arguments: Any) -> Any:
    with implementation("reference"):
        return function(*arguments)


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars", "fixed_order")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 1, 32), (3, 130, 160), (70, 65, 256), (5, 64, 1056)])
def test_interpreted(format: Format, tokens: int, rows: int, columns: int) -> None:
    check_dense(format, tokens, rows, columns)


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars", "fixed_order")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_grouped_interpreted(format: Format, counts: list[int]) -> None:
    check_grouped(format, counts, (5, 70), 160)


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@pytest.mark.parametrize("format", FORMATS)
def test_no_rows_any_layout_and_broken_rows(format: Format, scattered: Callable[[Tensor], Tensor]) -> None:
    x, weight = torch.randn(4, 64), random_weight(format, 6, 64)
    stack, counts = random_weight(format, 2, 6, 64), torch.tensor([1, 3])
    with implementation("kernel"):
        assert quantized_linear(x[:0], weight).shape == (0, 6)
        assert quantized_grouped_linear(x[:0], [stack], torch.tensor([0, 0]))[0].shape == (0, 6)
        y = quantized_linear(x, weight)
        assert torch.equal(quantized_linear(scattered(x), weight), y)
        (grouped,) = quantized_grouped_linear(scattered(x), [stack], scattered(counts))
        assert torch.equal(grouped, quantized_grouped_linear(x, [stack], counts)[0])
        x[2, 5] = torch.inf
        broken = quantized_linear(x, weight)
    assert broken[2].isnan().all()
    assert torch.equal(broken[[0, 1, 3]], y[[0, 1, 3]])


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@pytest.mark.parametrize("format", FORMATS)
def test_compiled_by_torch(format: Format) -> None:
    """The whole function is one graph."""
    x, weight, stack = torch.randn(5, 64), random_weight(format, 6, 64), random_weight(format, 2, 6, 64)
    counts = torch.tensor([2, 3])

    def op(x: Tensor) -> Tensor:
        first, second = quantized_grouped_linear(x, [stack, stack], counts)
        return quantized_linear(x, weight) + first * second

    with implementation("kernel"):
        assert torch.equal(torch.compile(op, fullgraph=True, backend="aot_eager")(x), op(x))


# -- rows that nobody writes down ----------------------------------------------------------------------------------


def rows_of_experts(tokens: int, choices: int, width: int, device: str = "cpu") -> tuple[Dispatched, Gated]:
    """The operands of the products of 5 experts, those of tokens and those of hidden vectors."""
    experts_TA = torch.rand(tokens, 5).argsort(1)[:, :choices].to(device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x, gate, up = (2 * torch.randn(rows, width).to(device, dtype) for rows in (tokens, *[tokens * choices] * 2))
    order = expert_order(experts_TA, 5)
    return Dispatched(x, order), Gated(gate, up, 1.5, torch.rand(tokens * choices).to(device), order.pair_X)


def check_rows(format: Format, tokens: int, choices: int, rows: tuple[int, ...], width: int, device: str) -> None:
    """The same bits as of rows that were written before."""
    weights = [random_weight(format, 5, number, width) for number in rows]
    weights = weights if device == "cpu" else [on_gpu(weight) for weight in weights]
    with implementation("kernel"):
        dispatched, gated = rows_of_experts(tokens, choices, width, device)
        for operands in (dispatched, gated):
            found = quantized_grouped_linear(operands, weights, dispatched.order.counts_E)
            wanted = quantized_grouped_linear(operands.written(), weights, dispatched.order.counts_E)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
        gate = Gated(gated.gate, gated.up, 1.5)
        assert torch.equal(quantized_linear(gate, weights[0][1]), quantized_linear(gate.written(), weights[0][1]))


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("tokens", "choices", "width"), [(1, 3, 160), (2, 2, 288), (7, 2, 128), (3, 1, 1056)])
def test_rows_made_on_the_way(format: Format, tokens: int, choices: int, width: int) -> None:
    check_rows(format, tokens, choices, (5, 70), width, "cpu")


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
def test_rows_made_on_the_way_have_gradients() -> None:
    (x, order), gated = rows_of_experts(3, 2, 32)
    stack = random_weight("fp8", 5, 8, 32)
    with implementation("kernel"):
        for leaf, rows in (
            (x, Dispatched(x.requires_grad_(), order)),
            (gated.up, Gated(gated.gate, gated.up.requires_grad_(), *gated[2:])),
        ):
            found, wanted = (
                torch.autograd.grad(quantized_grouped_linear(made, [stack], order.counts_E)[0].sum(), leaf)[0]
                for made in (rows, rows.written())
            )
            assert torch.equal(found, wanted)


# -- few tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(1, 1, 32), (2, 130, 160), (3, 5, 1056), (4, 9, 2080), (1, 6, 4224)]
)
def test_few_interpreted(few: list[int], tokens: int, rows: int, columns: int) -> None:
    check_dense("fp8", tokens, rows, columns)
    assert few == [tokens] * 2


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@pytest.mark.parametrize("heights", [(9, 130), (16, 3), (5, 8, 20)])
def test_few_tokens_with_several_weights(few: list[int], heights: tuple[int, ...]) -> None:
    weights, x = [random_weight("fp8", rows, 160) for rows in heights], torch.randn(3, 160)
    with implementation("kernel"):
        found = quantized_linears(x, weights)
        for y, weight in zip(found, weights, strict=True):
            assert torch.equal(y, quantized_linear(x, weight))
    assert few == [3] * (1 + len(heights))


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
def test_few_tokens_with_extreme_and_broken_values(few: list[int]) -> None:
    weight, x = random_weight("fp8", 9, 384), torch.randn(4, 384) * torch.logspace(-9, 6, 384)
    x[1, 128:256] = 0
    x[2, 300] = torch.inf
    x[3] *= 1e-30
    with implementation("kernel"):
        y = quantized_linear(x, weight)
    assert y[2].isnan().all()
    good = [0, 1, 3]
    assert close(y[good], reference(quantized_linear, x, weight)[good])
    assert few == [4]


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
def test_what_is_not_for_few_tokens(few: list[int]) -> None:
    check_dense("fp8", 5, 6, 64)
    check_dense("fp4", 1, 6, 64)
    check_grouped("fp8", [1, 0], (6,), 64)
    with batch_invariant():
        check_dense("fp8", 1, 6, 64)
    assert few == []


@pytest.fixture
def fixed_order() -> Iterator[None]:
    """Few tokens run as many do."""
    with batch_invariant():
        yield


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product that ran as one of few tokens."""
    from leadline.ops.quantized_linear import few_kernel

    ran, multiply = [], few_kernel.multiply

    def noted(rows: Any, *arguments: Any) -> None:
        ran.append(rows.num_rows)
        multiply(rows, *arguments)

    monkeypatch.setattr(few_kernel, "multiply", noted)
    return ran


# -- Hopper, interpreted -------------------------------------------------------------------------------------------


def _beside(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def engine() -> Any:
    """The stand-in for the copy engine, and for what else of Hopper an interpreter of Gluon lacks."""
    return _beside("gluon_copy_engine")


@pytest.fixture
def hopper(engine: Any, monkeypatch: pytest.MonkeyPatch, fixed_order: None) -> Iterator[set[tuple[int, ...]]]:
    """The kernel for Hopper runs instead of the other, interpreted, on a GPU of three processors. The set gets tokens,
    warp groups and matrices of each launch."""
    from leadline.ops.quantized_linear import hopper, kernel

    kernels = engine.with_copy_engine(_beside("gluon_interpreter"), Path(hopper.__file__))
    launched: set[tuple[int, ...]] = set()

    class Launcher:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: Any, num_warps: int, maxnreg: int | None, launch_pdl: bool) -> None:
                tokens, groups, _stages, _depth, matrices, early = arguments[-6:]
                assert early is launch_pdl is False
                launched.add((tokens, groups, matrices))
                copied = [engine.Descriptor(x.base, x.block_shape) for x in arguments[:4]]
                kernels.run("quantized_linear_fwd_hopper_kernel", grid, *copied, *arguments[4:])

            return launch

    monkeypatch.setattr(hopper, "quantized_linear_fwd_hopper_kernel", Launcher())
    monkeypatch.setattr(hopper, "_processors", lambda device: 3)
    monkeypatch.setattr(kernel, "_on_hopper", lambda x: True)
    yield launched
    assert launched


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(1, 128, 128), (17, 128, 256), (129, 128, 384), (300, 256, 256)]
)
def test_hopper_interpreted(hopper: set[tuple[int, ...]], format: Format, tokens: int, rows: int, columns: int) -> None:
    check_dense(format, tokens, rows, columns)
    assert {matrices for _, _, matrices in hopper} == {1}


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars", "hopper")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("rows", [(128, 256), (128, 128)], ids=["one by one", "two at once"])
def test_hopper_grouped_interpreted(format: Format, counts: list[int], rows: tuple[int, int]) -> None:
    check_grouped(format, counts, rows, 256)


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
def test_hopper_uses_its_tiles(hopper: set[tuple[int, ...]]) -> None:
    """Small and large tiles, one warp group and two; two matrices at once for few tokens alone."""
    for tokens in (3, 40, 100, 500):
        check_dense("fp8", tokens, 128, 128)
    check_grouped("fp4", [150, 0, 170], (128, 128), 128)
    assert {matrices for _, _, matrices in hopper} == {1}
    check_grouped("fp4", [3, 0, 5], (128, 128), 128)
    assert {tokens for tokens, _, _ in hopper} >= {16, 64, 128}
    assert {groups for _, groups, _ in hopper} == {1, 2}
    assert {matrices for _, _, matrices in hopper} == {1, 2}


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars", "hopper")
@pytest.mark.parametrize("format", FORMATS)
def test_hopper_leaves_other_shapes_to_the_other_kernel(format: Format) -> None:
    from leadline.ops.quantized_linear import hopper

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper, "multiply", None)
        for rows, columns in ((127, 128), (128, 160)):
            check_dense(format, 3, rows, columns)
    check_dense(format, 3, 128, 128)


def test_the_assembly_of_four_bits_in_eight(engine: Any) -> None:
    """All sixteen codes under every difference of scales, against the formats."""
    from leadline.ops.quantized_linear.hopper import LOOK_UP

    codes = torch.arange(16, dtype=torch.uint8).repeat(2).view(-1, 8)
    words = fp4.pack(codes).view(torch.int32).long() & 0xFFFFFFFF
    for difference in range(12):
        low, high = 0x6C686000 - difference * 0x08080800, 0x7C787470 - difference * 0x08080808
        table = {"$3": torch.tensor(low), "$7": torch.tensor(high), "$2": words[:, 0]}
        found = engine.assemble(LOOK_UP.value, table)
        both = torch.stack([found["$0"], found["$1"]], 1)
        signed = torch.where(both >= 2**31, both - 2**32, both).to(torch.int32)
        values = signed.contiguous().view(torch.float8_e4m3fn).float()
        assert torch.equal(values, fp4.decode(codes) * 2.0 ** (6 - difference))


# -- on a GPU ------------------------------------------------------------------------------------------------------


def on_gpu(weight: QuantizedWeight) -> QuantizedWeight:
    parts = (weight.codes, weight.scale, weight.block_scale)
    return QuantizedWeight(*(None if part is None else part.cuda() for part in parts))  # pyright: ignore


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(1, 128, 128), (3, 256, 512), (127, 512, 1024), (4001, 384, 640), (70, 100, 224)]
)
def test_dense(format: Format, dtype: torch.dtype, tokens: int, rows: int, columns: int) -> None:
    x, weight = torch.randn(tokens, columns).to(dtype).cuda(), on_gpu(random_weight(format, rows, columns))
    wanted = reference(quantized_linear, x.double(), weight)
    found, again = quantized_linear(x, weight), quantized_linear(x, weight)
    assert found.dtype == dtype
    assert torch.equal(found, again)
    assert (found.double() - wanted).norm() <= (3e-3 if dtype == torch.bfloat16 else 3e-4) * wanted.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("tokens", "choices", "width"), [(1, 3, 256), (3, 2, 1024), (129, 4, 640), (5, 2, 160)])
def test_rows_on_the_card(format: Format, tokens: int, choices: int, width: int) -> None:
    check_rows(format, tokens, choices, (128, 128), width, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [128, 100])
@pytest.mark.parametrize("counts", [*COUNTS.values(), [400, 0, 3, 129, 1]], ids=[*COUNTS, "long"])
def test_grouped(format: Format, counts: list[int], rows: int) -> None:
    x = torch.randn(sum(counts), 256).bfloat16().cuda()
    weights, counts_E = [on_gpu(random_weight(format, len(counts), rows, 256))] * 2, torch.tensor(counts).cuda()
    wanted = reference(quantized_grouped_linear, x.double(), weights, counts_E)
    for ours, theirs in zip(quantized_grouped_linear(x, weights, counts_E), wanted, strict=True):
        assert (ours.double() - theirs).norm() <= 3e-3 * theirs.norm()


@pytest.mark.gpu
@pytest.mark.usefixtures("fixed_order")
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_is_the_same_in_any_batch(format: Format) -> None:
    """Tiles of all sizes, one warp group and two."""
    x, weight = torch.randn(3000, 1024).bfloat16().cuda(), on_gpu(random_weight(format, 4096, 1024))
    whole = quantized_linear(x, weight)
    for begin, end in ((0, 1), (5, 25), (100, 160), (0, 128), (17, 400), (1, 2000)):
        assert torch.equal(quantized_linear(x[begin:end], weight), whole[begin:end])


@pytest.mark.gpu
@pytest.mark.usefixtures("fixed_order")
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_is_the_same_among_any_experts(format: Format) -> None:
    stack = on_gpu(random_weight(format, 8, 512, 1024))
    x, counts = torch.randn(900, 1024).bfloat16().cuda(), torch.tensor([100, 1, 0, 300, 7, 2, 400, 90])
    (whole,) = quantized_grouped_linear(x, [stack], counts.cuda())
    for expert, (rows, y) in enumerate(zip(x.split(counts.tolist()), whole.split(counts.tolist()), strict=True)):
        for row in (0, len(rows) // 2, len(rows) - 1) if len(rows) else ():
            alone = torch.zeros(8, dtype=torch.int64)
            alone[expert] = 1
            (found,) = quantized_grouped_linear(rows[row : row + 1], [stack], alone.cuda())
            assert torch.equal(found[0], y[row])
            assert torch.equal(quantized_linear(rows[row : row + 1], stack[expert])[0], y[row])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 16, 70])
def test_experts_of_full_width_give_the_same_bits_in_every_run(tokens: int) -> None:
    """Enough copies under way that a buffer filled before its last reader is done shows."""
    stacks = [on_gpu(random_weight("fp4", 32, 2048, 4096)) for _ in range(2)]
    counts_E = torch.bincount(torch.rand(tokens, 32).argsort(1)[:, :6].flatten(), minlength=32).cuda()
    x = torch.randn(6 * tokens, 4096).bfloat16().cuda()
    first = quantized_grouped_linear(x, stacks, counts_E)
    differing = [
        torch.stack([(a != b).any() for a, b in zip(first, quantized_grouped_linear(x, stacks, counts_E), strict=True)])
        for _ in range(600)
    ]
    assert not torch.stack(differing).any()


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_a_captured_graph_follows_counts(format: Format) -> None:
    stack = on_gpu(random_weight(format, 4, 256, 256))
    x, counts = torch.randn(20, 256).bfloat16().cuda(), torch.tensor([5, 5, 5, 5]).cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        quantized_grouped_linear(x, [stack], counts)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (y,) = quantized_grouped_linear(x, [stack], counts)
    for fresh in ([20, 0, 0, 0], [1, 0, 19, 0]):
        x.normal_()
        counts.copy_(torch.tensor(fresh))
        graph.replay()
        assert torch.equal(y, quantized_grouped_linear(x, [stack], counts)[0])


@pytest.mark.gpu
@settings(max_examples=20)
@given(st.data())
def test_any_shape_on_gpu(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(FORMATS))
    rows, columns = 32 * data.draw(st.integers(1, 12)), 32 * data.draw(st.integers(1, 20))
    counts = data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=12))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(sum(counts), columns).bfloat16().cuda()
    stack, counts_E = on_gpu(random_weight(format, len(counts), rows, columns)), torch.tensor(counts).cuda()
    (found,) = quantized_grouped_linear(x, [stack], counts_E)
    (wanted,) = reference(quantized_grouped_linear, x.double(), [stack], counts_E)
    assert (found.double() - wanted).norm() <= 3e-3 * wanted.norm()


def test_scales_as_bytes_are_the_scales() -> None:
    """What the kernels read of an FP4 weight beside its own scales."""
    weight = random_weight("fp4", 130, 160)
    assert weight.block_scale is not None
    assert torch.equal(e8m0.decode(weight.block_scale), fp4.fp8_scale(weight.codes, weight.scale))
