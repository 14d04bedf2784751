"""Grouped linear as tiles, for what the library's grouped product does not take: float32, and rows that are not
aligned.

A program makes one tile of rows of one expert. How many rows an expert has only the device knows, so there are as many
programs as there could be tiles, and each finds its own: the tiles of an expert lie behind those of the experts before
it, and a program beyond the last ends at once. The gradient of x is the same product with the matrices turned round;
that of the weights has one program for each tile of each matrix, which walks down the rows of its expert.

It is here to be right and to keep the host out of it, not to be fast: products of float32 stay in float32 ("ieee"),
which the matrix units of a GPU do not do.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS, COLUMNS, DEPTH = 16, 64, 32  # of a tile: rows, columns, and summands at a time


@triton.jit
def grouped_linear_rows_kernel(
    x, weight, y, counts, D, F, stride_e, stride_f, stride_d, E,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y [X, F] = x [X, D] W^T: tile `program 0` of the rows of all experts, tile `program 1` of the columns."""
    expert_E = tl.arange(0, EXPERTS)
    count_E = tl.load(counts + expert_E, expert_E < E, 0)
    tiles_E = (count_E + ROWS - 1) // ROWS
    ends_E = tl.cumsum(tiles_E, 0)
    tile = tl.program_id(0)
    if tile < tl.sum(tiles_E, 0):
        before_E = ends_E <= tile
        expert = tl.sum(before_E.to(tl.int32), 0)
        first = tl.sum(tl.where(before_E, count_E, 0), 0) + (tile - tl.sum(tl.where(before_E, tiles_E, 0), 0)) * ROWS
        end = tl.sum(tl.where(expert_E <= expert, count_E, 0), 0)
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        f = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
        matrix = weight + expert.to(tl.int64) * stride_e
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, D, DEPTH):
            d = start + tl.arange(0, DEPTH)
            a = tl.load(x + row[:, None] * D + d[None, :], (row < end)[:, None] & (d < D)[None, :], 0.0)
            b_at = matrix + f[None, :] * stride_f + d[:, None].to(tl.int64) * stride_d
            b = tl.load(b_at, (d < D)[:, None] & (f < F)[None, :], 0.0)
            sums = tl.dot(a, b, sums, input_precision="ieee")
        tl.store(y + row[:, None] * F + f[None, :], sums, (row < end)[:, None] & (f < F)[None, :])


@triton.jit
def grouped_linear_weight_kernel(
    dy, x, dweight, counts, D, F, E,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dW [E, F, D] = dy^T x over the rows of each expert: tile (`program 1`, `program 2`) of expert `program 0`."""
    expert = tl.program_id(0)
    expert_E = tl.arange(0, EXPERTS)
    count_E = tl.load(counts + expert_E, expert_E < E, 0)
    end = tl.sum(tl.where(expert_E <= expert, count_E, 0), 0)
    first = tl.sum(tl.where(expert_E < expert, count_E, 0), 0)
    f = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = (tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, end, DEPTH):
        row = (start + tl.arange(0, DEPTH)).to(tl.int64)
        a = tl.load(dy + row[None, :] * F + f[:, None], (row < end)[None, :] & (f < F)[:, None], 0.0)
        b = tl.load(x + row[:, None] * D + d[None, :], (row < end)[:, None] & (d < D)[None, :], 0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    place = expert.to(tl.int64) * F * D + f[:, None] * D + d[None, :]
    tl.store(dweight + place, sums, (f < F)[:, None] & (d < D)[None, :])


def rows_product(x_XD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """y [X, F] of x [X, D], rows sorted by expert, and a weight [E, F, D] of any strides."""
    (rows, width), (experts, columns, _) = x_XD.shape, weight_EFD.shape
    y_XF = x_XD.new_empty(rows, columns)
    if rows:
        tiles = min(triton.cdiv(rows, ROWS) + experts, rows)
        grouped_linear_rows_kernel[(tiles, triton.cdiv(columns, COLUMNS))](
            x_XD, weight_EFD, y_XF, counts_E, width, columns, *weight_EFD.stride(), experts,
            triton.next_power_of_2(experts), ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
    return y_XF


def weight_gradient(dy_XF: Tensor, x_XD: Tensor, counts_E: Tensor) -> Tensor:
    experts, columns, width = len(counts_E), dy_XF.shape[1], x_XD.shape[1]
    dweight_EFD = x_XD.new_empty(experts, columns, width)
    grouped_linear_weight_kernel[(experts, triton.cdiv(columns, ROWS), triton.cdiv(width, COLUMNS))](
        dy_XF, x_XD, dweight_EFD, counts_E, width, columns, experts,
        triton.next_power_of_2(experts), ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    return dweight_EFD


class GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
        x_XD = x_XD.contiguous()
        ctx.save_for_backward(x_XD, weight_EFD, counts_E)
        return rows_product(x_XD, weight_EFD, counts_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_XF: Tensor) -> tuple[Tensor | None, ...]:
        x_XD, weight_EFD, counts_E = ctx.saved_tensors
        dy_XF = dy_XF.contiguous()
        dx_XD = rows_product(dy_XF, weight_EFD.mT, counts_E) if ctx.needs_input_grad[0] else None
        dweight_EFD = weight_gradient(dy_XF, x_XD, counts_E) if ctx.needs_input_grad[1] else None
        return dx_XD, dweight_EFD, None
