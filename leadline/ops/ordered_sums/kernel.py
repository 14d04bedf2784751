"""Ordered sums in Triton: one size of tile, and one program for all summands of a number.

A program of the product makes a tile of 16 rows and walks over all N summands, `DEPTH` at a time and in ascending
order. Sixteen rows are the fewest that matrix units take, so a single row wastes little, and a hundred rows are seven
tiles that know nothing of each other. The size of a tile follows from O, N and the dtype, which belong to the weight;
the number of rows is not known to the compiler, so one row and thousands run the same instructions. Splitting N
over programs would help a single row, and would need another rule for many: there is none.

Within a tile a row's numbers are the same wherever it stands: matrix units treat their rows alike, and FP32 products
("ieee") are chains of fused multiply-adds, one for each number of the result.

Floors: 2 b X N O FLOPs for many rows, of which small tiles reach a fraction; the bytes of w for few. The tiles of one
piece of w are neighbours, so that it comes from memory once.

A sum along a row is one program, which adds pieces of `BLOCK` columns number by number and then sums the last piece
as a tree. Both shapes follow from the length of the row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.opaque import opaque

ROWS = 16  # of a tile, the fewest that matrix units take
COLUMNS = 64
BYTES_OF_SUMMANDS = 128  # of a row of a, at a time
BLOCK = 1024


@triton.jit(do_not_specialize=["matrices", "X"])
def ordered_bmm_fwd_kernel(
    a_bXN, w_bNO, y_bXO, matrices, X, a_matrix, a_row, a_column, w_matrix, w_row, w_column,
    N, O, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,  # noqa: E741
):  # fmt: skip
    """A tile of y: program = (tile of columns, tile of rows, matrix), the last running fastest. a_ and w_ numbers are
    strides."""
    program, row_tiles = tl.program_id(0), tl.cdiv(X, ROWS)
    matrix = (program % matrices).to(tl.int64)
    row = (program // matrices % row_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program // matrices // row_tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    a_rows = a_bXN + matrix * a_matrix + row[:, None] * a_row
    w_columns = w_bNO + matrix * w_matrix + column[None, :] * w_column
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, N, DEPTH):
        n = (start + tl.arange(0, DEPTH)).to(tl.int64)
        a = tl.load(a_rows + n[None, :] * a_column, (row < X)[:, None] & (n < N)[None, :], 0.0)
        w = tl.load(w_columns + n[:, None] * w_row, (n < N)[:, None] & (column < O)[None, :], 0.0)
        sums = tl.dot(a, w, sums, input_precision="ieee")
    y = y_bXO + (matrix * X + row[:, None]) * O + column[None, :]
    tl.store(y, sums.to(y_bXO.dtype.element_ty), (row < X)[:, None] & (column < O)[None, :])


@triton.jit
def ordered_sum_fwd_kernel(x_XN, y_X, N: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of row `program 0`."""
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        sums += tl.load(x_XN + row * N + n, n < N, 0.0).to(tl.float32)
    tl.store(y_X + row, tl.sum(sums, 0).to(y_X.dtype.element_ty))


def _power(number: int, least: int, most: int) -> int:
    """A power of two from `least` to `most`, enough for a number where it may be."""
    return min(max(triton.next_power_of_2(number), least), most)


@opaque(lambda a_bXN, w_bNO, dtype: a_bXN.new_empty(*a_bXN.shape[:2], w_bNO.shape[2], dtype=dtype))
def product(a_bXN: Tensor, w_bNO: Tensor, dtype: torch.dtype) -> Tensor:
    """y_bXO for operands of one dtype and any strides."""
    (matrices, rows, width), columns = a_bXN.shape, w_bNO.shape[2]
    y_bXO = a_bXN.new_empty(matrices, rows, columns, dtype=dtype)
    tile = _power(columns, ROWS, COLUMNS)
    programs = matrices * triton.cdiv(rows, ROWS) * triton.cdiv(columns, tile)
    if programs:
        ordered_bmm_fwd_kernel[(programs,)](
            a_bXN, w_bNO, y_bXO, matrices, rows, *a_bXN.stride(), *w_bNO.stride(), width, columns, ROWS, tile,
            _power(width, 16, BYTES_OF_SUMMANDS // a_bXN.element_size()), num_warps=4, num_stages=3,
        )  # fmt: skip
    return y_bXO


@opaque(lambda x: x.new_empty(x.shape[:-1]))
def sums(x: Tensor) -> Tensor:
    """The sum of each row of a contiguous x."""
    y, width = x.new_empty(x.shape[:-1]), x.shape[-1]
    if y.numel():
        block = _power(width, 1, BLOCK)
        ordered_sum_fwd_kernel[(y.numel(),)](x, y, width, block, num_warps=max(1, block // 256))
    return y


class OrderedProduct(torch.autograd.Function):
    """The gradients are the library's products: nothing that is compared bit by bit comes after them."""

    @staticmethod
    def forward(ctx: Any, a_bXN: Tensor, w_bNO: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(a_bXN, w_bNO)
        return product(a_bXN, w_bNO, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_bXO: Tensor) -> tuple[Tensor | None, ...]:
        a_bXN, w_bNO = ctx.saved_tensors
        dy_bXO = dy_bXO.to(a_bXN.dtype)
        da_bXN = torch.bmm(dy_bXO, w_bNO.mT) if ctx.needs_input_grad[0] else None
        dw_bNO = torch.bmm(a_bXN.mT, dy_bXO) if ctx.needs_input_grad[1] else None
        return da_bXN, dw_bNO, None


class OrderedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.width = x.shape[-1]
        return sums(x.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy[..., None].expand(*dy.shape, ctx.width)
