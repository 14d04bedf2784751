"""RMS norm in Triton.

A tile is one or a few whole rows, so a row is read once: its sum of squares, the division and the weight all happen
while it is in registers. The forward moves 2 values for every x (x in, y out), the backward 3 (x and dy in, dx out),
for a handful of FLOPs each: bytes are the floor on any card, and there is nothing to win beyond touching each of them
once.

The gradient of the weight is a sum over all rows. A fixed number of programs walk over runs of rows, each leaves one
partial sum, and those are added in order: the same bits in every run, with no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.early_start import let_next_start, starts_early, wait_for_earlier
from leadline.ops.opaque import opaque

VALUES_PER_TILE = 4096
VALUES_PER_THREAD = 16
PARTIAL_SUMS = 512  # about four programs for each multiprocessor of a large card


@triton.jit
def load_weight(weight_ptr, columns, D: tl.constexpr):
    """A norm's weight in FP32, as one row; None where there is none."""
    if weight_ptr is None:
        weight = None
    else:
        weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    return weight


@triton.jit
def norm_rows(x, weight, eps, D: tl.constexpr, dtype: tl.constexpr):
    """`rms_norm` of a tile of whole rows in FP32, x, that hold values of `dtype` and zeros behind column D; FP32, to be
    rounded to `dtype`."""
    if weight is None:
        # Every step is rounded to the dtype of x, as in the published code.
        mean_square = (tl.sum((x * x).to(dtype).to(tl.float32), axis=1) / D).to(dtype).to(tl.float32)
        y = x * tl.rsqrt((mean_square + eps).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)[:, None]
    else:
        y = x * tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None] * weight
    return y


@triton.jit
def norm_rows_gradient(x, dy, weight, eps, D: tl.constexpr):
    """Gradients of `norm_rows`, where dy is that of its result: of x, and of the weight, from each row alone."""
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
    normed = x * scale
    dweight = dy * normed
    if weight is not None:
        dy *= weight
    return scale * (dy - normed * (tl.sum(dy * normed, axis=1) / D)[:, None]), dweight


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_fwd_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    num_rows,
    eps,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    let_next_start(EARLY)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_D)
    weight = load_weight(weight_ptr, columns, D)
    wait_for_earlier(EARLY)
    offsets = rows[:, None] * D + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < D)[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y = norm_rows(x, weight, eps, D, x_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "blocks_per_program"])
def rms_norm_bwd_kernel(
    x_ptr,
    weight_ptr,
    dy_ptr,
    dx_ptr,
    dweight_ptr,
    num_rows,
    blocks_per_program,
    eps,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_D)
    weight = load_weight(weight_ptr, columns, D)
    if weight_ptr is not None:
        dweight = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    first = tl.program_id(0) * blocks_per_program
    for block in range(first, first + blocks_per_program):
        rows = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        offsets = rows[:, None] * D + columns[None, :]
        inside = (rows < num_rows)[:, None] & (columns < D)[None, :]
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        dx, dweight_of_rows = norm_rows_gradient(x, dy, weight, eps, D)
        if weight_ptr is not None:
            dweight += dweight_of_rows
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if weight_ptr is not None:
        partial = dweight_ptr + tl.program_id(0) * D + columns
        tl.store(partial, tl.sum(dweight, axis=0), mask=columns < D)


def tile(width: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile."""
    columns = triton.next_power_of_2(width)
    rows = max(1, VALUES_PER_TILE // columns)
    return rows, columns, min(16, max(1, rows * columns // (32 * VALUES_PER_THREAD)))


@opaque(lambda x, weight, eps: torch.empty_like(x))
def forward(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """y for a contiguous x."""
    y, width = torch.empty_like(x), x.shape[-1]
    block_rows, block_columns, warps = tile(width)
    num_rows = x.numel() // width
    early = starts_early(x.device)
    rms_norm_fwd_kernel[(triton.cdiv(num_rows, block_rows),)](
        x, weight, y, num_rows, eps, width, block_rows, block_columns, early, launch_pdl=early, num_warps=warps
    )
    return y


@opaque(lambda x, weight, dy, eps: [torch.empty_like(part) for part in (x, weight) if part is not None])
def backward(x: Tensor, weight: Tensor | None, dy: Tensor, eps: float) -> list[Tensor]:
    """[dx] or [dx, dweight] for contiguous x, weight and dy."""
    dx, width = torch.empty_like(x), x.shape[-1]
    block_rows, block_columns, warps = tile(width)
    num_rows = x.numel() // width
    blocks_per_program = triton.cdiv(triton.cdiv(num_rows, block_rows), PARTIAL_SUMS)
    programs = triton.cdiv(num_rows, block_rows * max(1, blocks_per_program))
    partial = None if weight is None else torch.empty(programs, width, dtype=torch.float32, device=x.device)
    rms_norm_bwd_kernel[(programs,)](
        x, weight, dy, dx, partial, num_rows, blocks_per_program, eps, width, block_rows, block_columns, num_warps=warps
    )
    return [dx] if weight is None or partial is None else [dx, partial.sum(0).to(weight.dtype)]


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        x, weight = x.contiguous(), None if weight is None else weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return forward(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, *dweight = backward(x, weight, dy.contiguous(), ctx.eps)
        return dx, *(dweight or [None]), None
