"""Inside of `batch_invariant` a row's bits do not depend on the rows beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import leadline
from leadline.model.config import TINY
from leadline.model.segment import Segment
from leadline.model.state import State
from leadline.model.transformer import Transformer
from leadline.ops.dispatch import INVARIANT, implementation, use_kernel
from leadline.ops.gated_pool import gated_pool
from leadline.ops.grouped_linear import grouped_linear
from leadline.ops.hyper_connection import mix_head, mix_in, mix_in_norm, mix_out
from leadline.ops.invariance import batch_invariant, is_batch_invariant, rows_times
from leadline.ops.norm_rope import norm_rope
from leadline.ops.quantized_linear import Format, quantize, quantized_grouped_linear, quantized_linear
from leadline.ops.rms_norm import rms_norm
from leadline.ops.rope import rope, rotations, unrotate_
from leadline.ops.route import route
from leadline.ops.swiglu import swiglu
from leadline.ops.token_permutation import combine, dispatch, expert_order

DEVICES = [pytest.param("cpu", marks=pytest.mark.interpret), pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS = {"cpu": 18, "cuda": 8200}
# Sizes around those at which kernels may change their tiles, and rows at other places of a tile.
SPANS = {
    "cpu": ((0, 3), (7, 8)),
    "cuda": (
        *((0, size) for size in (1, 2, 16, 33, 64, 129, 257, 1025, 4097)),
        *((77, 78), (13, 2070), (8155, 8200)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_row_of_a_product_has_the_same_bits_among_any_number(dtype: torch.dtype) -> None:
    x_TN, weight_ON = torch.randn(70, 96).to(dtype), torch.randn(40, 96).to(dtype)
    with batch_invariant():
        whole = rows_times(x_TN, weight_ON)
        for start, stop in ((0, 1), (0, 3), (5, 6), (15, 17), (1, 70), (33, 66)):
            assert torch.equal(rows_times(x_TN[start:stop], weight_ON), whole[start:stop])
        assert rows_times(x_TN[:0], weight_ON).shape == (0, 40)
    torch.testing.assert_close(whole, x_TN @ weight_ON.T)


def test_the_mode_ends_with_its_block() -> None:
    def fail() -> None:
        with batch_invariant():
            assert is_batch_invariant()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert not is_batch_invariant()


@pytest.mark.interpret
def test_inside_of_the_mode_only_the_listed_ops_run_as_kernels() -> None:
    x = torch.zeros(1)
    with implementation("kernel"):
        with batch_invariant():
            assert use_kernel("rope", x)
            assert not use_kernel("sparse_attention", x)
        assert use_kernel("sparse_attention", x)


def test_the_list_names_ops_that_exist() -> None:
    files = (Path(leadline.__file__).parent / "ops").glob("**/*.py")
    asked = {op for file in files for op in re.findall(r'use_kernel\("(\w+)"', file.read_text(encoding="utf-8"))}
    assert asked >= INVARIANT
    assert not INVARIANT & {"sparse_attention", "decode_attention", "lightning_indexer", "decode_pick_entries"}


class Inputs:
    """Random operands of `num_rows` tokens on one device; `dtype` is that of activations and weights."""

    def __init__(self, num_rows: int, device: str):
        self.num_rows, self.device = num_rows, device
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def wide(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device)

    def randn(self, *shape: int) -> Tensor:
        return self.wide(*shape).to(self.dtype)


Op = Callable[[slice], tuple[Tensor, ...]]


def norms(inputs: Inputs) -> Op:
    x, weight = inputs.randn(inputs.num_rows, 3, 70), inputs.randn(70)
    return lambda rows: (rms_norm(x[rows], weight, 1e-6), rms_norm(x[rows], None, 1e-6))


def pointwise(inputs: Inputs) -> Op:
    gate, up, scale = inputs.randn(inputs.num_rows, 70), inputs.randn(inputs.num_rows, 70), inputs.wide(inputs.num_rows)
    x = inputs.randn(inputs.num_rows, 3, 24)
    positions = torch.arange(inputs.num_rows, device=inputs.device)
    cos, sin = rotations(positions, torch.linspace(0.01, 1, 8, device=inputs.device))
    return lambda rows: (swiglu(gate[rows], up[rows], 3.0, scale[rows]), rope(x[rows], cos[rows], sin[rows]))


def cached_vectors(inputs: Inputs) -> Op:
    x, weight = inputs.randn(inputs.num_rows, 2, 128), inputs.randn(128)
    positions = torch.arange(inputs.num_rows, device=inputs.device)
    cos, sin = rotations(positions, torch.linspace(0.01, 1, 16, device=inputs.device))

    def run(rows: slice) -> tuple[Tensor, ...]:
        angles = cos[rows], sin[rows]
        return (
            norm_rope(x[rows], *angles, weight=weight, eps=1e-6, rounding="fp8"),
            norm_rope(x[rows], *angles, eps=1e-6),
            norm_rope(x[rows], *angles, rounding="fp4"),
            unrotate_(x[rows].clone(), *angles),
        )

    return run


def pooling(inputs: Inputs) -> Op:
    values, scores = inputs.wide(inputs.num_rows + 7, 36), inputs.wide(inputs.num_rows + 7, 36)
    rows_CG = torch.arange(inputs.num_rows, device=inputs.device)[:, None] + torch.arange(8, device=inputs.device)
    return lambda rows: (gated_pool(values, scores, rows_CG[rows].contiguous(), 18),)


def streams(inputs: Inputs) -> Op:
    x_TSD, out_TD = inputs.randn(inputs.num_rows, 4, 272), inputs.randn(inputs.num_rows, 272)
    fn, base, scale = inputs.wide(24, 4 * 272) * 0.03, inputs.wide(24), inputs.wide(3)
    weight = inputs.randn(272)

    def run(rows: slice) -> tuple[Tensor, ...]:
        _, y_TD, post_TS, comb_TSS = mix_in(x_TSD[rows], fn, base, scale, 20, 1e-6, 1e-6)
        mixed_TSD = mix_out(x_TSD[rows], out_TD[rows], post_TS, comb_TSS)
        head_TD = mix_head(mixed_TSD, fn[:4], base[:4], scale[:1], 1e-6, 1e-6)
        normed = mix_in_norm(x_TSD[rows], fn, base, scale, weight, 20, 1e-6, 1e-6, 1e-6)
        return y_TD, post_TS, comb_TSS, mixed_TSD, head_TD, *normed[1:]

    return run


def experts(inputs: Inputs) -> Op:
    """Floating experts: their choice, and the tiles of `grouped_linear` between dispatch and combine."""
    x_TD, weight_EFD = inputs.randn(inputs.num_rows, 96), inputs.randn(5, 72, 96)
    logits_TE, bias_E = inputs.wide(inputs.num_rows, 5), inputs.wide(5)

    def run(rows: slice) -> tuple[Tensor, ...]:
        chosen = route(logits_TE[rows], bias_E, None, 3, 1.5)
        y_XF = grouped_linear(dispatch(x_TD[rows], chosen.order), weight_EFD, chosen.order.counts_E)
        return chosen.experts_TA, chosen.weights_TA, chosen.scores_TE, combine(y_XF, chosen.order)

    return run


def quantized(inputs: Inputs, format: Format, width: int) -> Op:
    x_TN, weight = inputs.randn(inputs.num_rows, width), quantize(inputs.wide(width, width), format)
    stack = quantize(inputs.wide(4, width, width), format)
    experts_TA = torch.randint(0, 4, (inputs.num_rows, 2), device=inputs.device)

    def run(rows: slice) -> tuple[Tensor, ...]:
        order = expert_order(experts_TA[rows], 4)
        (y_XO,) = quantized_grouped_linear(dispatch(x_TN[rows], order), [stack], order.counts_E)
        return quantized_linear(x_TN[rows], weight), combine(y_XO, order)

    return run


CASES: dict[str, Callable[[Inputs], Op]] = {
    "norms": norms,
    "pointwise": pointwise,
    "cached vectors": cached_vectors,
    "pooling": pooling,
    "streams": streams,
    "experts": experts,
    "fp8": lambda inputs: quantized(inputs, "fp8", 256),
    "fp4": lambda inputs: quantized(inputs, "fp4", 256),
    "fp8-ragged": lambda inputs: quantized(inputs, "fp8", 160),
    "fp4-ragged": lambda inputs: quantized(inputs, "fp4", 160),
}


@pytest.fixture
def _ordered(request: pytest.FixtureRequest) -> Iterator[None]:
    """On the CPU: the interpreter, as a GPU adds up."""
    if "cpu" not in request.node.name:
        yield
        return
    for fixture in ("dots_in_order", "loops_to_scalars"):
        request.getfixturevalue(fixture)
    with implementation("kernel"):
        yield


@pytest.mark.usefixtures("_ordered")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_kernels_of_the_list_treat_every_row_alike(case: str, device: str) -> None:
    run = CASES[case](Inputs(TOKENS[device], device))
    with batch_invariant():
        whole = run(slice(None))
        assert all(part.isfinite().all() for part in whole)
        for span in SPANS[device]:
            for part, found in zip(whole, run(slice(*span)), strict=True):
                assert torch.equal(found, part[slice(*span)]), span


class Called(TorchDispatchMode):
    """Context manager: the names of torch's operations that ran inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.interpret
@pytest.mark.usefixtures("loops_to_scalars")
def test_where_kernels_run_torch_itself_adds_nothing_up() -> None:
    """In a chunk, in a step, and without a state: what torch does on a GPU in between copies, compares, or computes
    number by number."""
    config = TINY.replace(num_hidden_layers=2, compress_ratios=(4, 128, 0), index_topk=1)
    model = Transformer(config, with_mtp=False)
    for tensor in model.state_dict().values():
        tensor.normal_(0, 0.2) if tensor.is_floating_point() else tensor.random_(0, config.n_routed_experts)
    state = State(config, 1, 128)
    with batch_invariant(), implementation("kernel"), torch.no_grad(), Called() as called:
        for segment, memory in (
            (Segment.of(range(11)), state),
            (Segment.of([11], past=[11]), state),
            (Segment.of(range(12)), None),
        ):
            assert model.logits(model.hidden(model(segment, memory).streams_TSD)).isfinite().all()
    assert {"exp_", "masked_fill_", "amax"} <= called.names
    assert not [name for name in called.names if re.search("mm|dot|sum|mean|norm|softmax|conv|prod|var|std", name)]
