"""Norm, rotation and rounding in Triton.

A tile is one or a few whole rows, where a row is one head of one token, and everything that is done to a row happens
while it is in registers. Floor: every value in once and out once, in the backward twice in and once out; cos and sin of
a token are shared by its heads and stay in the cache. One after the other, the same operations would move each value
two to twenty times, and for one token be as many launches.

In the forward a program is one warp: a tile of one row and a tile of two add up a row in the same order, so a vector
does not depend on how many come with it, and no program waits at a barrier. Pairs (2k, 2k+1) and blocks of scales are
neighbours, so the rotation costs no exchange between threads and the largest magnitude of a block costs three at most.
The Hadamard rotation adds and subtracts, for each bit of a column's number, the values of the two columns that differ
in it. A thread gets its partner's value as the exclusive or of the pair's bits with its own: the exclusive or over an
axis of two is a reduction, which needs no shared memory, and the sums are those of `formats.hadamard` to the last bit.

The gradient passes the rounding unchanged; then the Hadamard rotation, which is its own inverse, the rotation back, and
the norm, whose scale is computed again. That of the weight is a sum over all rows: each program leaves one partial sum
over a run of rows, and those are added in order, with no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.formats import fp4, fp8
from leadline.formats.cache_entry import KEY_BLOCK
from leadline.ops.cache_rows.format_kernel import (
    e8m0_inverse,
    e8m0_to_float,
    largest_magnitude,
    round_to_bfloat16,
    round_to_e2m1,
    round_to_e4m3,
    scale_codes,
)
from leadline.ops.early_start import begin, starts_early
from leadline.ops.opaque import opaque
from leadline.ops.rms_norm.kernel import PARTIAL_SUMS, load_weight, norm_rows, norm_rows_gradient
from leadline.ops.rope.kernel import turn_pairs

VALUES_PER_WARP = 512
FEW_WARPS = 2048  # up to so many, each takes one row at once, so that all multiprocessors have some
BACKWARD_WARPS = 4


@triton.jit
def rotate_rows(x, cos_ptr, sin_ptr, tokens, real, K: tl.constexpr, R: tl.constexpr, INVERSE: tl.constexpr):
    """`rope` of a tile of whole rows in FP32, x [rows, columns], at the angles of `tokens` [rows]; where a row is not
    real, no angle is read."""
    pairs = tl.arange(0, x.shape[1] // 2)[None, :] - (K - R) // 2
    angles = tokens[:, None] * (R // 2) + pairs
    turned = real[:, None] & (pairs >= 0) & (pairs < R // 2)
    cos = tl.load(cos_ptr + angles, mask=turned, other=1.0)
    sin = tl.load(sin_ptr + angles, mask=turned, other=0.0)
    if INVERSE:
        sin = -sin
    columns = tl.arange(0, x.shape[1])[None, :]
    # Where nothing turns, x passes untouched: the product with 0 would spread an infinity.
    return tl.where(columns >= K - R, turn_pairs(x, cos, sin), x)


@triton.jit
def hadamard_rows(x, LOG_WIDTH: tl.constexpr):
    """The orthonormal Hadamard transform of a tile of whole rows in FP32, x [rows, 2^LOG_WIDTH]."""
    columns = tl.arange(0, x.shape[1])[None, :]
    for bit in tl.static_range(LOG_WIDTH):
        own = x.to(tl.int32, bitcast=True)
        pairs = tl.reshape(own, (x.shape[0], x.shape[1] >> (bit + 1), 2, 1 << bit))
        both = tl.broadcast_to(tl.expand_dims(tl.xor_sum(pairs, 2), 2), pairs.shape)
        partner = (tl.reshape(both, x.shape) ^ own).to(tl.float32, bitcast=True)
        x = partner + x * (1 - 2 * ((columns >> bit) & 1)).to(tl.float32)
    return x * (2.0 ** (-LOG_WIDTH / 2))


@triton.jit
def round_key_rows(
    x, K: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, FLOOR: tl.constexpr
):
    """`formats.cache_entry.round_keys` of a tile of whole rows in FP32, x [rows, columns]; BLOCK divides columns."""
    coded = tl.arange(0, x.shape[1])[None, :] < K - R
    blocks = tl.reshape(tl.where(coded, x, 0.0), (x.shape[0], x.shape[1] // BLOCK, BLOCK))
    scale = scale_codes(largest_magnitude(blocks), LARGEST, FLOOR)
    scale = tl.expand_dims(scale, 2)
    blocks = round_to_e4m3(blocks * e8m0_inverse(scale)) * e8m0_to_float(scale)
    return tl.where(coded, tl.reshape(blocks, x.shape), round_to_bfloat16(x))


@triton.jit
def round_index_rows(x, BLOCK: tl.constexpr, LARGEST: tl.constexpr, FLOOR: tl.constexpr):
    """`formats.fp4.fake_quantize` of a tile of whole rows in FP32, x [rows, columns]; BLOCK divides columns."""
    blocks = tl.reshape(x, (x.shape[0], x.shape[1] // BLOCK, BLOCK))
    scale = tl.expand_dims(scale_codes(largest_magnitude(blocks), LARGEST, FLOOR), 2)
    return tl.reshape(round_to_e2m1(blocks * e8m0_inverse(scale)) * e8m0_to_float(scale), x.shape)


@triton.jit(do_not_specialize=["num_rows"])
def norm_rope_fwd_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, y_ptr, num_rows, eps,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr, LARGEST: tl.constexpr, FLOOR: tl.constexpr, LOG_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK, LARGEST, FLOOR: of the format that ROUNDING names."""
    begin(EARLY)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_K)
    offsets = rows[:, None] * K + columns[None, :]
    real = rows < num_rows
    inside = real[:, None] & (columns < K)[None, :]
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        x = norm_rows(x, load_weight(weight_ptr, columns, K), eps, K, dtype).to(dtype).to(tl.float32)
    x = rotate_rows(x, cos_ptr, sin_ptr, rows // H, real, K, R, False).to(dtype).to(tl.float32)
    if ROUNDING == "fp8":
        x = round_key_rows(x, K, R, BLOCK, LARGEST, FLOOR)
    elif ROUNDING == "fp4":
        x = hadamard_rows(x, LOG_WIDTH).to(dtype).to(tl.float32)
        x = round_index_rows(x, BLOCK, LARGEST, FLOOR)
    tl.store(y_ptr + offsets, x.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "blocks_per_program"])
def norm_rope_bwd_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, dy_ptr, dx_ptr, dweight_ptr, num_rows, blocks_per_program, eps,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, ROUNDING: tl.constexpr,
    LOG_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx of some tiles, and the sum of their rows' gradients of the weight."""
    columns = tl.arange(0, BLOCK_K)
    weight = load_weight(weight_ptr, columns, K)
    if weight_ptr is not None:
        dweight = tl.zeros((BLOCK_ROWS, BLOCK_K), tl.float32)
    first = tl.program_id(0) * blocks_per_program
    for block in range(first, first + blocks_per_program):
        rows = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        offsets = rows[:, None] * K + columns[None, :]
        real = rows < num_rows
        inside = real[:, None] & (columns < K)[None, :]
        dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if ROUNDING == "fp4":
            dy = hadamard_rows(dy, LOG_WIDTH)
        dx = rotate_rows(dy, cos_ptr, sin_ptr, rows // H, real, K, R, True)
        if NORM:
            x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            dx, dweight_of_rows = norm_rows_gradient(x, dx, weight, eps, K)
            if weight_ptr is not None:
                dweight += dweight_of_rows
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if weight_ptr is not None:
        partial = dweight_ptr + tl.program_id(0) * K + columns
        tl.store(partial, tl.sum(dweight, axis=0), mask=columns < K)


def _tile(x: Tensor, values_per_warp: int, warps: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program."""
    columns = max(KEY_BLOCK, triton.next_power_of_2(x.shape[-1]))
    warps = max(warps, columns // (2 * VALUES_PER_WARP))
    return max(1, warps * values_per_warp // columns), columns, warps


def _shape(x: Tensor, cos: Tensor, eps: float | None, rounding: str | None) -> dict[str, Any]:
    heads, width = x.shape[1] if x.ndim == 3 else 1, x.shape[-1]
    return {
        "H": heads, "K": width, "R": 2 * cos.shape[-1], "NORM": eps is not None, "ROUNDING": rounding,
        "LOG_WIDTH": width.bit_length() - 1,
    }  # fmt: skip


def _like_x(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float | None, rounding: str | None
) -> Tensor:
    return torch.empty_like(x)


@opaque(_like_x)
def forward(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float | None, rounding: str | None
) -> Tensor:
    """y for contiguous tensors."""
    y, num_rows = torch.empty_like(x), x.numel() // x.shape[-1]
    few = x.numel() <= FEW_WARPS * VALUES_PER_WARP
    rows, columns, warps = _tile(x, VALUES_PER_WARP if few else 2 * VALUES_PER_WARP, 1)
    block, number_format = (fp4.BLOCK, fp4) if rounding == "fp4" else (KEY_BLOCK, fp8)
    early = starts_early(x.device)
    norm_rope_fwd_kernel[(triton.cdiv(num_rows, rows),)](
        x, weight, cos, sin, y, num_rows, eps or 0.0,
        **_shape(x, cos, eps, rounding),
        BLOCK=block, LARGEST=number_format.LARGEST, FLOOR=number_format.AMAX_FLOOR,
        BLOCK_ROWS=rows, BLOCK_K=columns, EARLY=early, launch_pdl=early, num_warps=warps,
    )  # fmt: skip
    return y


def _like_gradients(
    x: Tensor | None, weight: Tensor | None, cos: Tensor, sin: Tensor, dy: Tensor, eps: float | None,
    rounding: str | None,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(part) for part in (dy, weight) if part is not None]


@opaque(_like_gradients)
def backward(
    x: Tensor | None, weight: Tensor | None, cos: Tensor, sin: Tensor, dy: Tensor, eps: float | None,
    rounding: str | None,
) -> list[Tensor]:  # fmt: skip
    """[dx] or [dx, dweight] for contiguous tensors; without a norm x is not needed."""
    dx, width = torch.empty_like(dy), dy.shape[-1]
    num_rows = dy.numel() // width
    rows, columns, warps = _tile(dy, VALUES_PER_WARP, BACKWARD_WARPS)
    blocks = triton.cdiv(num_rows, rows)
    # Only sums over rows ask for few programs.
    blocks_per_program = 1 if weight is None else triton.cdiv(blocks, PARTIAL_SUMS)
    programs = triton.cdiv(blocks, max(1, blocks_per_program))
    partial = None if weight is None else torch.empty(programs, width, dtype=torch.float32, device=dy.device)
    norm_rope_bwd_kernel[(programs,)](
        x, weight, cos, sin, dy, dx, partial, num_rows, blocks_per_program, eps or 0.0,
        **_shape(dy, cos, eps, rounding),
        BLOCK_ROWS=rows, BLOCK_K=columns, num_warps=warps,
    )  # fmt: skip
    return [dx] if weight is None or partial is None else [dx, partial.sum(0).to(weight.dtype)]


class NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        eps: float | None,
        rounding: str | None,
    ) -> Tensor:
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        weight = None if weight is None else weight.contiguous()
        ctx.save_for_backward(None if eps is None else x, weight, cos, sin)
        ctx.eps, ctx.rounding = eps, rounding
        return forward(x, weight, cos, sin, eps, rounding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        dx, *dweight = backward(x, weight, cos, sin, dy.contiguous(), ctx.eps, ctx.rounding)
        return dx, *(dweight or [None]), None, None, None, None
