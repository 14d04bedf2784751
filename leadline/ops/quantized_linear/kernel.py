"""Quantised products in Triton, on any GPU, and the choice between them and those for Hopper.

The product decodes both operands to BF16, where E4M3 values are exact, as is an E2M1 value times sub-scale / block
scale; each slab is then one product in FP32, scaled and added. Hopper has a kernel of its own (`hopper.py`), with the
eight-bit matrix units and the order of work written out; this one is for every other card, and for the interpreter.
Both add in the same order whatever is beside a token. The product of few tokens (`few_kernel.py`) has an order of its
own, so that inside of `batch_invariant()` it is not used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.formats import e8m0
from leadline.ops.cache_rows.format_kernel import e2m1_to_float, e4m3_to_float
from leadline.ops.dispatch import is_batch_invariant
from leadline.ops.opaque import opaque
from leadline.ops.quantized_linear import few_kernel
from leadline.ops.quantized_linear.few_kernel import scale_value
from leadline.ops.quantized_linear.round_kernel import Activations, Operands, Weight, round_activations
from leadline.ops.quantized_linear.rows import Dispatched, Rows
from leadline.ops.quantized_linear.weight import QuantizedWeight

ROWS_OF_A_TILE = 64  # of the weight


@triton.jit
def quantized_linear_fwd_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, sub_scale_ptr, tiles_ptr, y_ptr, num_rows, stride,
    O: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, BLOCK_O: tl.constexpr, DOT: tl.constexpr,  # noqa: E741
):  # fmt: skip
    """y [T, O] = x W^T of a tile. DOT: dtype of the products, BF16 or, for the interpreter, FP32."""
    blocks = tl.cdiv(O, BLOCK_O)
    tile = tl.program_id(0) // blocks
    o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    first = tile * TOKENS
    begin = first
    end = num_rows
    expert = 0
    if tiles_ptr is not None:
        if tile >= tl.load(tiles_ptr):
            return
        entry = tiles_ptr + 4 + tile * 4
        expert = tl.load(entry)
        first, begin, end = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    t = first + tl.arange(0, TOKENS)
    stored = (t >= begin) & (t < end)
    rows = tl.cast(expert, tl.int64) * O + o
    slabs: tl.constexpr = (N + 127) // 128
    scale_rows = (tl.cast(expert, tl.int64) * ((O + 127) // 128) + o // 128) * slabs
    y = tl.zeros((TOKENS, BLOCK_O), tl.float32)
    for slab in range(slabs):
        n = slab * 128 + tl.arange(0, 128)
        inside = stored[:, None] & (n < N)[None, :]
        x = tl.load(x_ptr + t.to(tl.int64)[:, None] * N + n[None, :], mask=inside, other=0)
        w_scale = scale_value(tl.load(w_scale_ptr + scale_rows + slab, mask=o < O, other=1))
        if sub_scale_ptr is None:
            w = tl.load(w_ptr + rows[:, None] * N + n[None, :], mask=(o < O)[:, None] & (n < N)[None, :], other=0)
            w = e4m3_to_float(w)
        else:
            byte = slab * 64 + tl.arange(0, 64)
            here = (o < O)[:, None] & (2 * byte < N)[None, :]
            pairs = tl.load(w_ptr + rows[:, None] * (N // 2) + byte[None, :], mask=here, other=0).to(tl.int32)
            sub = tl.load(sub_scale_ptr + rows[:, None] * (N // 32) + (byte // 16)[None, :], mask=here, other=0)
            relative = scale_value(sub) / w_scale[:, None]
            low, high = e2m1_to_float(pairs & 15) * relative, e2m1_to_float(pairs >> 4) * relative
            w = tl.join(low, high).reshape(BLOCK_O, 128)
        products = tl.dot(e4m3_to_float(x).to(DOT), w.to(DOT).trans(1, 0), input_precision="ieee")
        x_scale = tl.load(x_scale_ptr + tl.cast(slab, tl.int64) * stride + t, mask=stored, other=0.0)
        y += products * (x_scale[:, None] * w_scale[None, :])
    pointers = y_ptr + t.to(tl.int64)[:, None] * O + o[None, :]
    tl.store(pointers, y.to(y_ptr.dtype.element_ty), mask=stored[:, None] & (o < O)[None, :])


def _multiply(rounded: Activations, weight: Weight, y_TO: Tensor) -> None:
    """y = x W^T on any GPU."""
    (num_rows, rows), width = y_TO.shape, rounded.codes.shape[1]
    quantized_linear_fwd_kernel[(rounded.max_tiles * triton.cdiv(rows, ROWS_OF_A_TILE),)](
        rounded.codes, rounded.scale, *weight, rounded.tiles, y_TO, num_rows, rounded.scale.shape[1],
        rows, width, rounded.tokens, ROWS_OF_A_TILE, tl.bfloat16 if y_TO.is_cuda else tl.float32,
        num_warps=4, num_stages=3,
    )  # fmt: skip


def _on_hopper(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


def _results(
    x: Tensor, up: Tensor | None, weight: Tensor | None, place: Tensor | None, limit: float, choices: int,
    codes: list[Tensor], block_scales: list[Tensor], sub_scales: list[Tensor], counts_E: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    num_rows = Operands(x, up, weight, place, limit, choices).num_rows
    return [x.new_empty(num_rows, one.shape[-2]) for one in codes]


@opaque(_results)
def launch(
    x: Tensor, up: Tensor | None, weight: Tensor | None, place: Tensor | None, limit: float, choices: int,
    codes: list[Tensor], block_scales: list[Tensor], sub_scales: list[Tensor], counts_E: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Rows times W^T for each weight. The first six are those of `Operands`; the parts of `Weight` are contiguous,
    sub_scales are none for FP8."""
    results = _results(x, up, weight, place, limit, choices, codes, block_scales, sub_scales, counts_E)
    rows = Operands(x, up, weight, place, limit, choices)
    if rows.num_rows == 0:
        return results
    weights = list(map(Weight, codes, block_scales, sub_scales or [None] * len(codes)))
    if not is_batch_invariant() and all(few_kernel.takes(rows, weight, counts_E) for weight in weights):
        few_kernel.multiply(rows, weights, results)
        return results
    experts = 0 if counts_E is None else len(counts_E)
    if _on_hopper(x):
        from leadline.ops.quantized_linear import hopper

        if all(hopper.takes(y_TO.shape[1], x.shape[1]) for y_TO in results):
            tokens = hopper.tokens_of_a_tile(rows.num_rows, experts)
            rounded = round_activations(rows, counts_E, tokens, permuted=bool(sub_scales))
            hopper.multiply(rounded, weights, results)
            return results
    tokens = min(max(triton.next_power_of_2(rows.num_rows // max(experts, 1)), 16), 64)
    if is_batch_invariant():
        tokens = 16  # with more of them the matrix units may be others, which add up differently
    rounded = round_activations(rows, counts_E, tokens, permuted=False)
    for weight, y_TO in zip(weights, results, strict=True):
        _multiply(rounded, weight, y_TO)
    return results


def products(rows: Rows, weights: Sequence[QuantizedWeight], counts_E: Tensor | None) -> tuple[Tensor, ...]:
    """The contract of `reference.products`."""
    codes = [_bytes(weight.codes) for weight in weights]
    block_scales = [_bytes(weight.scale if weight.block_scale is None else weight.block_scale) for weight in weights]
    sub_scales = [_exponents(weight.scale) for weight in weights if weight.block_scale is not None]
    counts_E = None if counts_E is None else counts_E.contiguous()
    return tuple(launch(*_operands(rows), codes, block_scales, sub_scales, counts_E))


def _operands(rows: Rows) -> Operands:
    if isinstance(rows, Tensor):
        return Operands(rows.contiguous())
    if isinstance(rows, Dispatched):
        pair_X, row_TA, _ = rows.order
        return Operands(rows.x_TN.contiguous(), place=pair_X.contiguous(), choices=row_TA.shape[1])
    scale, place_X = (None if x is None else x.contiguous() for x in (rows.scale, rows.place_X))
    return Operands(rows.gate.contiguous(), rows.up.contiguous(), scale, place_X, rows.limit)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous() if x.dtype == torch.float32 else x.contiguous().view(torch.uint8)


def _exponents(scale: Tensor) -> Tensor:
    """Powers of two as E8M0 bytes; they are that already in a released model."""
    return e8m0.encode(scale) if scale.dtype == torch.float32 else _bytes(scale)
