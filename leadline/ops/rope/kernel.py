"""The rotation in Triton.

A tile is a run of rows, where a row is one head of one token: its first K - R values are copied, or not looked at when
the rotation is done in place, the last R are read as R/2 pairs and turned. Floor: every value in once and out once; the
cos and sin of a token are shared by its heads and stay in the cache. The arithmetic is 6 FLOPs for each rotated pair,
so bytes are all that counts.

The backward is the same kernel with the opposite angle.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.ops.early_start import begin, starts_early
from leadline.ops.opaque import opaque

VALUES_PER_TILE = 4096


@triton.jit
def turn_pairs(x, cos, sin):
    """A tile of FP32 rows, x, whose pairs (2k, 2k+1) are turned by the angles of cos and sin [rows, pairs]."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), x.shape)


@triton.jit(do_not_specialize=["num_rows"])
def rope_fwd_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    num_rows,
    H: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    INVERSE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PASS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = (rows < num_rows)[:, None]

    pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
    angles = (rows // H)[:, None] * (R // 2) + pairs
    cos = tl.load(cos_ptr + angles, mask=inside & (pairs < R // 2), other=0.0)
    sin = tl.load(sin_ptr + angles, mask=inside & (pairs < R // 2), other=0.0)
    if INVERSE:
        sin = -sin
    columns = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
    turned = inside & (columns < R)
    offsets = rows[:, None] * K + (K - R) + columns
    x = tl.load(x_ptr + offsets, mask=turned, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, turn_pairs(x, cos, sin).to(y_ptr.dtype.element_ty), mask=turned)

    if K > R and not IN_PLACE:
        columns = tl.arange(0, BLOCK_PASS)[None, :]
        offsets = rows[:, None] * K + columns
        passed = inside & (columns < K - R)
        tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=passed), mask=passed)


@opaque(lambda x, cos, sin, inverse: torch.empty_like(x))
def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """The rotation of a contiguous x."""
    y = torch.empty_like(x)
    _launch(x, cos, sin, y, inverse)
    return y


@opaque(lambda x, cos, sin: None, changes=("x",))
def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turns a contiguous x back where it lies; only its last R values are read and written."""
    _launch(x, cos, sin, x, True)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, inverse: bool) -> None:
    width, pairs = x.shape[-1], cos.shape[-1]
    heads = x.shape[1] if x.ndim == 3 else 1
    num_rows = x.shape[0] * heads
    in_place, early = y is x, starts_early(x.device)
    block_rows = max(1, VALUES_PER_TILE // triton.next_power_of_2(2 * pairs if in_place else width))
    rope_fwd_kernel[(triton.cdiv(num_rows, block_rows),)](
        x,
        cos,
        sin,
        y,
        num_rows,
        heads,
        width,
        2 * pairs,
        inverse,
        in_place,
        block_rows,
        triton.next_power_of_2(max(1, width - 2 * pairs)),
        triton.next_power_of_2(pairs),
        early,
        launch_pdl=early,
        num_warps=4,
    )


class Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.inverse = inverse
        return rotate(x.contiguous(), cos, sin, inverse)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return rotate(dy.contiguous(), cos, sin, not ctx.inverse), None, None, None
