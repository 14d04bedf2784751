"""Newton-Schulz in Triton.

A step is three products of N x M matrices with N <= M,

    A = X X^T,    P = b A + c A A,    X <- a X + P X

and 2 N^2 M + N^3 multiplications with their additions are its floor in FLOPs: A and P are symmetric, so half of the
first product and half of the second need not be computed. At N = 2048, M = 4096 that is 300 times what the tensor cores
do while the same numbers cross the memory bus, and all three matrices stay in the cache: FLOPs are all that counts.

- One kernel makes both symmetric products: B B^T for the tiles on and below the diagonal, each of them written a second
  time, mirrored. A is symmetric, so A A is A A^T. Tiles are square, so that none lies on both sides of the diagonal.
- One kernel makes the third, with X itself added at the end, in FP32.

Tiles move through tensor descriptors (on Hopper one thread asks the copy engine for a whole tile). A descriptor reads
zeros beyond an edge and writes nothing there, so sizes are free; rows begin at multiples of 16 bytes, for which columns
are padded with zeros, that every product keeps.

Sums are FP32; A, P and X are rounded to bfloat16 once each, as in the reference. No sum is split, so a matrix gives the
same bits in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from leadline.ops.newton_schulz.reference import COEFFICIENTS
from leadline.ops.opaque import opaque

ALIGNMENT = 8  # columns: rows begin at multiples of 16 bytes
VALUES_PER_PART = 16384  # of a matrix, in one partial sum of its norm
NORM_BLOCK = 4096
SCALE_BLOCK = 64


@dataclass(frozen=True)
class Tile:
    """rows x columns of a result, `depth` of the sum at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# Two programs share a multiprocessor: one computes while the other begins or ends.
SYMMETRIC = Tile(128, 128, 64, num_warps=4, num_stages=3)
GENERAL = Tile(128, 256, 64, num_warps=8, num_stages=4)


# -- products ------------------------------------------------------------------------------------------------------


@triton.jit
def newton_schulz_symmetric_fwd_kernel(
    b_tiles,
    addend_tiles,
    out_tiles,
    depth,
    scale,
    addend_scale,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """out = scale B B^T + addend_scale addend for one tile on or below the diagonal, and for its mirror image."""
    number = tl.program_id(0)
    # Tile `number` in the order (0, 0), (1, 0), (1, 1), (2, 0), ...: the root may be off by one, no more.
    row = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > number, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= number, row + 1, row)
    column = number - row * (row + 1) // 2
    matrix = tl.program_id(1)

    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, depth, BLOCK_DEPTH):
        left = b_tiles.load([matrix, row * BLOCK, start]).reshape(BLOCK, BLOCK_DEPTH)
        right = b_tiles.load([matrix, column * BLOCK, start]).reshape(BLOCK, BLOCK_DEPTH)
        total = tl.dot(left, right.T, total, input_precision="ieee")
    total *= scale
    if ADD:
        addend = addend_tiles.load([matrix, row * BLOCK, column * BLOCK]).reshape(BLOCK, BLOCK)
        total += addend_scale * addend.to(tl.float32)
    result = total.to(out_tiles.dtype)
    out_tiles.store([matrix, row * BLOCK, column * BLOCK], result.reshape(1, BLOCK, BLOCK))
    if row != column:
        out_tiles.store([matrix, column * BLOCK, row * BLOCK], result.T.reshape(1, BLOCK, BLOCK))


@triton.jit
def newton_schulz_general_fwd_kernel(
    p_tiles,
    x_tiles,
    addend_tiles,
    out_tiles,
    depth,
    addend_scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """out = P X + addend_scale addend for one tile."""
    row, column, matrix = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1) * BLOCK_COLUMNS, tl.program_id(2)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, depth, BLOCK_DEPTH):
        left = p_tiles.load([matrix, row, start]).reshape(BLOCK_ROWS, BLOCK_DEPTH)
        right = x_tiles.load([matrix, start, column]).reshape(BLOCK_DEPTH, BLOCK_COLUMNS)
        total = tl.dot(left, right, total, input_precision="ieee")
    addend = addend_tiles.load([matrix, row, column]).reshape(BLOCK_ROWS, BLOCK_COLUMNS)
    total += addend_scale * addend.to(tl.float32)
    out_tiles.store([matrix, row, column], total.to(out_tiles.dtype).reshape(1, BLOCK_ROWS, BLOCK_COLUMNS))


def _tiles(x_BNM: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x_BNM, [1, rows, columns])


def symmetric_product(
    b_BNM: Tensor, out_BNN: Tensor, scale: float, addend_BNN: Tensor | None = None, addend_scale: float = 0.0
) -> None:
    """out = scale B B^T + addend_scale addend, where the addend is symmetric too."""
    block, depth = SYMMETRIC.rows, b_BNM.shape[2]
    edge = triton.cdiv(b_BNM.shape[1], block)
    out_tiles = _tiles(out_BNN, block, block)
    newton_schulz_symmetric_fwd_kernel[(edge * (edge + 1) // 2, len(b_BNM))](
        _tiles(b_BNM, block, SYMMETRIC.depth),
        out_tiles if addend_BNN is None else _tiles(addend_BNN, block, block),
        out_tiles, depth, scale, addend_scale, addend_BNN is not None, block, SYMMETRIC.depth,
        num_warps=SYMMETRIC.num_warps, num_stages=SYMMETRIC.num_stages,
    )  # fmt: skip


def general_product(p_BNN: Tensor, x_BNM: Tensor, out_BNM: Tensor, addend_scale: float) -> None:
    """out = P X + addend_scale X."""
    (matrices, rows, columns), tile = x_BNM.shape, GENERAL
    newton_schulz_general_fwd_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns), matrices)](
        _tiles(p_BNN, tile.rows, tile.depth), _tiles(x_BNM, tile.depth, tile.columns),
        _tiles(x_BNM, tile.rows, tile.columns), _tiles(out_BNM, tile.rows, tile.columns), rows, addend_scale,
        tile.rows, tile.columns, tile.depth, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


# -- the norm ------------------------------------------------------------------------------------------------------


@triton.jit
def newton_schulz_norm_fwd_kernel(
    x_ptr,
    largest_ptr,
    squares_ptr,
    size,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one part of a matrix: the largest magnitude m, and the sum of (x / m)^2, which neither over- nor underflows.
    NaN is in the second."""
    first = tl.program_id(0) * PART
    x_ptr += tl.program_id(1).to(tl.int64) * size
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PART, BLOCK):
        places = first + start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + places, mask=places < size, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    largest = tl.max(largest, axis=0)
    divisor = tl.where(largest == 0.0, 1.0, largest)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PART, BLOCK):
        places = first + start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + places, mask=places < size, other=0.0).to(tl.float32) / divisor
        squares += x * x
    part = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(largest_ptr + part, largest)
    tl.store(squares_ptr + part, tl.sum(squares, axis=0))


@triton.jit
def newton_schulz_scale_fwd_kernel(
    x_ptr,
    largest_ptr,
    norm_ptr,
    y_ptr,
    num_rows,
    num_columns,
    y_columns,
    TRANSPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = x / largest / norm of one matrix, rounded to the dtype of y, transposed on demand."""
    matrix = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    x_ptr += matrix * num_rows * num_columns
    x = tl.load(x_ptr + rows.to(tl.int64) * num_columns + columns, mask=inside, other=0.0).to(tl.float32)
    y = (x / tl.load(largest_ptr + matrix) / tl.load(norm_ptr + matrix)).to(y_ptr.dtype.element_ty)
    if TRANSPOSE:
        y_ptr += matrix * num_columns * y_columns
        tl.store(y_ptr + columns.to(tl.int64) * y_columns + rows, y, mask=inside)
    else:
        y_ptr += matrix * num_rows * y_columns
        tl.store(y_ptr + rows.to(tl.int64) * y_columns + columns, y, mask=inside)


def unit_norm(x_BNM: Tensor, dtype: torch.dtype) -> Tensor:
    """Each matrix of a contiguous x divided by its Frobenius norm, with its shorter side in front, and zeros behind
    its columns where those are not aligned."""
    (matrices, rows, columns), device = x_BNM.shape, x_BNM.device
    parts = triton.cdiv(rows * columns, VALUES_PER_PART)
    largest, squares = torch.empty(2, matrices, parts, device=device).unbind()
    newton_schulz_norm_fwd_kernel[(parts, matrices)](
        x_BNM, largest, squares, rows * columns, VALUES_PER_PART, NORM_BLOCK, num_warps=8
    )
    largest_B = largest.amax(1)
    largest_B = torch.where(largest_B == 0, 1.0, largest_B)
    norm_B = ((largest / largest_B[:, None]).square() * squares).sum(1).sqrt()
    norm_B = torch.where(norm_B == 0, 1.0, norm_B)
    short, long = sorted((rows, columns))
    y_BNM = torch.zeros(matrices, short, triton.cdiv(long, ALIGNMENT) * ALIGNMENT, dtype=dtype, device=device)
    newton_schulz_scale_fwd_kernel[(triton.cdiv(rows, SCALE_BLOCK), triton.cdiv(columns, SCALE_BLOCK), matrices)](
        x_BNM, largest_B, norm_B, y_BNM, rows, columns, y_BNM.shape[2], rows > columns, SCALE_BLOCK, num_warps=4
    )
    return y_BNM


# -- all steps -----------------------------------------------------------------------------------------------------


def takes(x_BNM: Tensor, dtype: torch.dtype) -> bool:
    """Whether this kernel is for these: bfloat16 from Hopper on, float32 under the interpreter, not for no matrices.
    Without a copy engine, descriptors cost more than the symmetric halves save."""
    if not x_BNM.is_cuda:
        return dtype == torch.float32 and len(x_BNM) > 0
    has_copy_engine = torch.cuda.get_device_capability(x_BNM.device)[0] >= 9
    return has_copy_engine and dtype == torch.bfloat16 and len(x_BNM) > 0


@opaque(lambda x_BNM, dtype: x_BNM.new_empty(x_BNM.shape))
def newton_schulz(x_BNM: Tensor, dtype: torch.dtype) -> Tensor:
    """The contract of the public function, with the dtype of the multiplications given."""
    rows, columns = x_BNM.shape[1:]
    x = unit_norm(x_BNM.contiguous(), dtype)
    short = x.shape[1]
    aligned = triton.cdiv(short, ALIGNMENT) * ALIGNMENT
    gram, polynomial = x.new_empty(2, len(x), short, aligned)[..., :short].unbind()
    other = torch.empty_like(x)
    for a, b, c in COEFFICIENTS:
        symmetric_product(x, gram, 1.0)
        symmetric_product(gram, polynomial, c, gram, b)
        general_product(polynomial, x, other, a)
        x, other = other, x
    x = x[..., : max(rows, columns)]
    return x_BNM.new_empty(x_BNM.shape).copy_(x.mT if rows > columns else x)
