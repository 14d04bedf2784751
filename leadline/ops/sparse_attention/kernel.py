"""Sparse attention in Triton, forward and backward.

Keys and entries are `columns`: K wide, and shared by all heads, so the H heads of one query are the rows of a matrix
product with them. With 64 heads and K = 512 each column that is read (1 KiB in bf16) feeds 2 x 2 x 64 x 512 FLOPs:
arithmetic is the floor, as long as columns come from the L2 cache and the next ones are under way while the last ones
are multiplied.

Forward. A program holds the q of a tile of rows (queries x heads) and walks over their columns with a running maximum,
first over the window, then over the entries. With picked entries a tile is one query, because every query has columns
of its own; otherwise neighbouring queries share them and a tile fills up with several queries when heads are few.

Backward. Nothing is added atomically, so that two runs agree bitwise.

- `bwd_queries`: tiles as in the forward. Scores are computed again from the saved lse, and dq is summed in registers.
- `bwd_columns`: columns that are seen by a run of queries (window keys, and entries when all visible ones are seen). A
  program holds a block of columns and walks over the queries that see any of them.
- Picked entries are seen by scattered queries. `bwd_queries` writes what each pick of a chunk of queries contributes
  to its entry, one row of K, into a workspace; sorting the picks by entry (stable) inverts the
  lists, and `bwd_picks` adds the rows of each entry, in FP32 and always in the same order. The rows are stored in the
  dtype of q. In bf16 that rounds each contribution once, to 8 bits; the roundings are independent, so the sum of n of
  them is off by about 2^-9 / sqrt(n) of its size, less than the rounding of the result. On Hopper a tenth of the card
  adds the rows of one chunk while the rest multiplies the next one.

Tensors that are K wide are held as tuples of column chunks: a chunk is the widest tile of a sum that fits into the
registers, and float32 products, which have no matrix unit, take small ones.

On Hopper, wide vectors of 16 bits and many heads take the kernels of `hopper_forward.py` and `hopper_backward.py`,
which read and write the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.opaque import opaque
from leadline.ops.rope.kernel import rotate, unrotate

WORKSPACE_BYTES = 384 * 2**20  # for the rows that picks contribute, twice where chunks of queries overlap
PICKS_SHARE = 10  # one of so many multiprocessors adds rows of picks while the others multiply the next chunk's
PICKS_PER_SORT = 2**20  # so many keep a card busy, and the first ones are soon sorted
LOG2_E = math.log2(math.e)


@triton.jit
def _load(vectors, rows_R, real_R, K: tl.constexpr, CHUNK: tl.constexpr):
    """vectors[rows] as a tuple of chunks [R, CHUNK]; zero where a row is not real."""
    tiles = ()
    for at in tl.static_range(0, K, CHUNK):
        column = at + tl.arange(0, CHUNK)
        real = real_R[:, None]
        if K % CHUNK:
            real = real & (column < K)[None, :]
        tiles += (tl.load(vectors + rows_R[:, None] * K + column[None, :], mask=real, other=0.0),)
    return tiles


@triton.jit
def _store(vectors, rows_R, real_R, tiles, K: tl.constexpr, CHUNK: tl.constexpr, SKIP: tl.constexpr = 0):
    """vectors[rows] = tiles, the reverse of `_load`; the tiles are the chunks from SKIP on."""
    for c in tl.static_range(len(tiles)):
        column = (SKIP + c) * CHUNK + tl.arange(0, CHUNK)
        real = real_R[:, None]
        if K % CHUNK:
            real = real & (column < K)[None, :]
        tl.store(vectors + rows_R[:, None] * K + column[None, :], tiles[c].to(vectors.dtype.element_ty), mask=real)


@triton.jit
def _zeros(ROWS: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(0, K, CHUNK):
        tiles += (tl.zeros((ROWS, CHUNK), tl.float32),)
    return tiles


@triton.jit
def _inner_products(a, b):
    """a b^T, summed over the chunks."""
    products = tl.dot(a[0], b[0].T, input_precision="ieee")
    for c in tl.static_range(1, len(a)):
        products = tl.dot(a[c], b[c].T, products, input_precision="ieee")
    return products


@triton.jit
def _add_product(sums, weights, vectors):
    """sums + weights vectors, chunk by chunk."""
    added = ()
    for c in tl.static_range(len(vectors)):
        added += (tl.dot(weights, vectors[c], sums[c], input_precision="ieee"),)
    return added


@triton.jit
def _scaled(tiles, factor_R):
    scaled = ()
    for c in tl.static_range(len(tiles)):
        scaled += (tiles[c] * factor_R[:, None],)
    return scaled


@triton.jit
def _rows(tile, block, T, H, QUERIES: tl.constexpr, HEADS: tl.constexpr):
    """Query, head and flat index [T, H] of each row of a tile, and whether there is such a row."""
    row = tl.arange(0, QUERIES * HEADS)
    t_R = tile + row // HEADS
    h_R = block * HEADS + row % HEADS
    return t_R, h_R, t_R * H + h_R, (t_R < T) & (h_R < H)


@triton.jit
def _run(first, last, t_R, T):
    """The run of columns that the queries of a tile see together: its first row and its length; and of each query the
    ends of its own run, counted from there. A query that does not exist gets an empty run."""
    first_R = tl.load(first + t_R, mask=t_R < T, other=2**62)
    last_R = tl.load(last + t_R, mask=t_R < T, other=-1)
    low = tl.min(first_R)
    length = (tl.max(last_R) + 1 - low).to(tl.int32)
    first_R, last_R = tl.where(t_R < T, first_R - low, 1), tl.where(t_R < T, last_R - low, 0)
    return low, length, first_R.to(tl.int32), last_R.to(tl.int32)


@triton.jit
def _group(first_entry, visible, t_R, tile, i, T):
    """Query i of a tile leads a group when no query before it has the same entries: their first row, how many the group
    sees, and how many each of its queries sees (0 outside of the group). The group is empty if query i is no leader."""
    own = tl.load(first_entry + tile + i, mask=tile + i < T, other=-1)
    first_R = tl.load(first_entry + t_R, mask=t_R < T, other=-1)
    visible_R = tl.load(visible + t_R, mask=(t_R < T) & (first_R == own), other=0).to(tl.int32)
    led = tl.sum(((t_R < tile + i) & (first_R == own)).to(tl.int32)) > 0
    return own, tl.where(led, 0, tl.max(visible_R)), visible_R


@triton.jit
def _picks(picked, M, BLOCK: tl.constexpr):
    """How many places of a list of picks must be looked at: all up to the last pick."""
    length = 0
    for at in range(0, M, BLOCK):
        place = at + tl.arange(0, BLOCK)
        number = tl.load(picked + place, mask=place < M, other=-1)
        length = tl.maximum(length, tl.max(tl.where(number >= 0, place + 1, 0)))
    return length


@triton.jit
def _attend(q, columns, seen, most_R, sum_R, o, scale):
    """One step of the running softmax. most: largest score so far, in units of log 2. o: weighted columns so far."""
    scores = tl.where(seen, _inner_products(q, columns) * scale, float("-inf"))
    new_R = tl.maximum(most_R, tl.max(scores, 1))
    # As long as a row has seen nothing, its maximum is -inf, and -inf - -inf would be NaN.
    base_R = tl.where(new_R == float("-inf"), 0.0, new_R)
    weights = tl.exp2(scores - base_R[:, None])
    shrink_R = tl.exp2(most_R - base_R)
    sum_R = sum_R * shrink_R + tl.sum(weights, 1)
    # The published kernel rounds the probabilities to the dtype of the values before the second product.
    return new_R, sum_R, _add_product(_scaled(o, shrink_R), weights.to(q[0].dtype), columns)


@triton.jit(do_not_specialize=["T"])
def sparse_attention_fwd_kernel(
    q_THK, keys_XK, entries_CK, picked_TM, sink_H, first_key_T, last_key_T, first_entry_T, visible_T,
    o_THK, lse_TH, T, H, M, scale,
    K: tl.constexpr, ENTRIES: tl.constexpr,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """o and lse of one tile of rows. ENTRIES: "none", "visible" or "picked". scale: K^-0.5 log2 e."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(H, HEADS)
    tile = program // blocks * QUERIES
    t_R, h_R, at_R, real_R = _rows(tile, program % blocks, T, H, QUERIES, HEADS)
    q = _load(q_THK, at_R, real_R, K, CHUNK)
    most_R = tl.full((QUERIES * HEADS,), float("-inf"), tl.float32)
    sum_R = tl.zeros((QUERIES * HEADS,), tl.float32)
    o = _zeros(QUERIES * HEADS, K, CHUNK)
    place = tl.arange(0, COLUMNS)

    low, length, first_R, last_R = _run(first_key_T, last_key_T, t_R, T)
    for at in range(0, length, COLUMNS):
        n = at + place
        columns = _load(keys_XK + low * K, n, n < length, K, CHUNK)
        seen = (n[None, :] >= first_R[:, None]) & (n[None, :] <= last_R[:, None])
        most_R, sum_R, o = _attend(q, columns, seen, most_R, sum_R, o, scale)

    if ENTRIES == "visible":
        for i in range(QUERIES):
            low, length, visible_R = _group(first_entry_T, visible_T, t_R, tile, i, T)
            for at in range(0, length, COLUMNS):
                n = at + place
                columns = _load(entries_CK + low * K, n, n < length, K, CHUNK)
                seen = n[None, :] < visible_R[:, None]
                most_R, sum_R, o = _attend(q, columns, seen, most_R, sum_R, o, scale)

    if ENTRIES == "picked":
        entries_CK += tl.load(first_entry_T + tile) * K
        picked_TM += tile * M
        length = _picks(picked_TM, M, COLUMNS)
        # The numbers are loaded one step ahead: the addresses of the columns wait for them.
        number = tl.load(picked_TM + place, mask=place < length, other=-1).to(tl.int32)
        for at in range(0, length, COLUMNS):
            columns = _load(entries_CK, number, number >= 0, K, CHUNK)
            seen = tl.broadcast_to((number >= 0)[None, :], (QUERIES * HEADS, COLUMNS))
            n = at + COLUMNS + place
            number = tl.load(picked_TM + n, mask=n < length, other=-1).to(tl.int32)
            most_R, sum_R, o = _attend(q, columns, seen, most_R, sum_R, o, scale)

    sink_R = tl.load(sink_H + h_R, mask=real_R, other=0.0)
    # A sink far above all scores makes the denominator infinite: the output is rightly 0, but its log must not be
    # taken from there.
    o = _scaled(o, 1.0 / (sum_R + tl.exp2(sink_R * 1.4426950408889634 - most_R)))
    _store(o_THK, at_R, real_R, o, K, CHUNK)
    log_R = (most_R + tl.log2(sum_R)) * 0.6931471805599453
    top_R = tl.maximum(log_R, sink_R)
    tl.store(lse_TH + at_R, top_R + tl.log(tl.exp(log_R - top_R) + tl.exp(sink_R - top_R)), mask=real_R)


@triton.jit
def _score_gradients(products, do_products, seen, lse, inner, scale, DTYPE: tl.constexpr):
    """Probabilities, and gradients of the scores times K^-0.5, both in DTYPE, from q . k and do . k. Zero where nothing
    is seen, whatever stands there."""
    weights = tl.where(seen, tl.exp2(products * scale - lse), 0.0)
    gradients = tl.where(seen, weights * (do_products - inner) * (scale * 0.6931471805599453), 0.0)
    return weights.to(DTYPE), gradients.to(DTYPE)


@triton.jit
def _gradients_of_rows(q, do, columns, seen, lse_R, inner_R, scale):
    """The same for a tile of rows: [R, X]."""
    products, do_products = _inner_products(q, columns), _inner_products(do, columns)
    return _score_gradients(products, do_products, seen, lse_R[:, None], inner_R[:, None], scale, q[0].dtype)


@triton.jit(do_not_specialize=["start", "stop"])
def sparse_attention_bwd_queries_kernel(
    q_THK, do_THK, o_THK, keys_XK, entries_CK, picked_TM, first_key_T, last_key_T, first_entry_T, visible_T, lse_TH,
    dq_THK, inner_TH, rows_tMBK, start, stop, H, M, scale,
    K: tl.constexpr, ENTRIES: tl.constexpr,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dq and inner = do . o of one tile of rows, queries start to stop - 1. With picks also `rows`: what each pick
    contributes to the gradient of its entry, summed over the heads of the tile; B blocks of heads."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(H, HEADS)
    tile = start + program // blocks * QUERIES
    t_R, _h_R, at_R, real_R = _rows(tile, program % blocks, stop, H, QUERIES, HEADS)
    q = _load(q_THK, at_R, real_R, K, CHUNK)
    do = _load(do_THK, at_R, real_R, K, CHUNK)
    inner_R = tl.zeros((QUERIES * HEADS,), tl.float32)
    o = _load(o_THK, at_R, real_R, K, CHUNK)
    for c in tl.static_range(len(o)):
        inner_R += tl.sum(o[c].to(tl.float32) * do[c].to(tl.float32), 1)
    tl.store(inner_TH + at_R, inner_R, mask=real_R)
    lse_R = tl.load(lse_TH + at_R, mask=real_R, other=0.0) * 1.4426950408889634
    dq = _zeros(QUERIES * HEADS, K, CHUNK)
    place = tl.arange(0, COLUMNS)

    low, length, first_R, last_R = _run(first_key_T, last_key_T, t_R, stop)
    for at in range(0, length, COLUMNS):
        n = at + place
        columns = _load(keys_XK + low * K, n, n < length, K, CHUNK)
        seen = (n[None, :] >= first_R[:, None]) & (n[None, :] <= last_R[:, None])
        gradients = _gradients_of_rows(q, do, columns, seen, lse_R, inner_R, scale)[1]
        dq = _add_product(dq, gradients, columns)

    if ENTRIES == "visible":
        for i in range(QUERIES):
            low, length, visible_R = _group(first_entry_T, visible_T, t_R, tile, i, stop)
            for at in range(0, length, COLUMNS):
                n = at + place
                columns = _load(entries_CK + low * K, n, n < length, K, CHUNK)
                seen = n[None, :] < visible_R[:, None]
                gradients = _gradients_of_rows(q, do, columns, seen, lse_R, inner_R, scale)[1]
                dq = _add_product(dq, gradients, columns)

    if ENTRIES == "picked":
        entries_CK += tl.load(first_entry_T + tile) * K
        picked_TM += tile * M
        rows_tMBK += (program // blocks * M * blocks + program % blocks) * K
        length = _picks(picked_TM, M, COLUMNS)
        number = tl.load(picked_TM + place, mask=place < length, other=-1).to(tl.int32)
        for at in range(0, length, COLUMNS):
            picked = number >= 0
            columns = _load(entries_CK, number, picked, K, CHUNK)
            n = at + COLUMNS + place
            number = tl.load(picked_TM + n, mask=n < length, other=-1).to(tl.int32)
            seen = tl.broadcast_to(picked[None, :], (QUERIES * HEADS, COLUMNS))
            weights, gradients = _gradients_of_rows(q, do, columns, seen, lse_R, inner_R, scale)
            dq = _add_product(dq, gradients, columns)
            for c in tl.static_range(len(q)):
                row = tl.dot(gradients.T, q[c], input_precision="ieee")
                row = tl.dot(weights.T, do[c], row, input_precision="ieee")
                _store(rows_tMBK, (at + place) * blocks, picked, (row,), K, CHUNK, c)

    _store(dq_THK, at_R, real_R, dq, K, CHUNK)


@triton.jit(do_not_specialize=["T", "X", "part"])
def sparse_attention_bwd_columns_kernel(
    q_THK, do_THK, vectors_XK, lse_TH, inner_TH, first_T, last_T, start_X, stop_X,
    dvectors_SXK, T, H, X, part, scale,
    K: tl.constexpr,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of columns from queries s part to (s + 1) part - 1, where s is the second program index.

    Query t sees the columns first_T[t] to last_T[t]; column x is seen by none but queries start_X[x] to stop_X[x] - 1.
    """
    s = tl.program_id(1).to(tl.int64)
    x_X = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    columns = _load(vectors_XK, x_X, x_X < X, K, CHUNK)
    start_X = tl.load(start_X + x_X, mask=x_X < X, other=0)
    stop_X = tl.load(stop_X + x_X, mask=x_X < X, other=0)
    empty = start_X >= stop_X
    start = tl.maximum(tl.min(tl.where(empty, T, start_X)), s * part)
    stop = tl.minimum(tl.max(tl.where(empty, 0, stop_X)), (s + 1) * part)
    dvectors = _zeros(COLUMNS, K, CHUNK)
    blocks = tl.cdiv(H, HEADS)
    steps = (tl.cdiv(tl.maximum(stop - start, 0), QUERIES) * blocks).to(tl.int32)
    for step in range(0, steps):
        t_R, _h_R, at_R, real_R = _rows(start + step // blocks * QUERIES, step % blocks, stop, H, QUERIES, HEADS)
        q = _load(q_THK, at_R, real_R, K, CHUNK)
        do = _load(do_THK, at_R, real_R, K, CHUNK)
        lse_R = tl.load(lse_TH + at_R, mask=real_R, other=0.0) * 1.4426950408889634
        inner_R = tl.load(inner_TH + at_R, mask=real_R, other=0.0)
        first_R = tl.load(first_T + t_R, mask=real_R, other=0)
        last_R = tl.load(last_T + t_R, mask=real_R, other=-1)
        seen = (x_X[:, None] >= first_R[None, :]) & (x_X[:, None] <= last_R[None, :])
        products, do_products = _inner_products(columns, q), _inner_products(columns, do)
        weights, gradients = _score_gradients(
            products, do_products, seen, lse_R[None, :], inner_R[None, :], scale, columns[0].dtype
        )
        dvectors = _add_product(_add_product(dvectors, gradients, q), weights, do)
    _store(dvectors_SXK + s * X * K, x_X, x_X < X, dvectors, K, CHUNK)


@triton.jit(do_not_specialize=["skip"])
def sparse_attention_bwd_picks_kernel(
    rows_PBK, order_P, first_C, skip, dentries_CK,
    K: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dentries[c] += the rows of the picks of entry c: order[first[c]] to order[first[c + 1] - 1], less skip. A pick
    has one row for each block of heads."""
    c = tl.program_id(0).to(tl.int64)
    first, last = tl.load(first_C + c) * BLOCKS, tl.load(first_C + c + 1) * BLOCKS
    if first < last:
        column = tl.arange(0, WIDTH)
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        # Some entries are picked by all: their rows are fetched a few steps ahead.
        for at in tl.range(first, last, ROWS, num_stages=STAGES):
            place = at + tl.arange(0, ROWS)
            pick = tl.load(order_P + place // BLOCKS, mask=place < last, other=skip) - skip
            row = pick * BLOCKS + place % BLOCKS
            real = (place < last)[:, None] & (column < K)[None, :]
            total += tl.load(rows_PBK + row[:, None] * K + column[None, :], mask=real, other=0.0).to(tl.float32)
        here = dentries_CK + c * K + column
        tl.store(here, tl.load(here, mask=column < K) + tl.sum(total, 0), mask=column < K)


class Blocks(NamedTuple):
    """Shape of a program: queries x heads rows against some columns, in chunks of K; its warps and load stages."""

    queries: int
    heads: int
    columns: int
    chunk: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        return {
            "QUERIES": self.queries,
            "HEADS": self.heads,
            "COLUMNS": self.columns,
            "CHUNK": self.chunk,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }

    def programs(self, queries: int, heads: int) -> int:
        return triton.cdiv(queries, self.queries) * triton.cdiv(heads, self.heads)


class Shapes(NamedTuple):
    """Shapes for a program: (rows, columns, stages, vectors in shared memory), best first; the first that fits is
    taken. Float32 products run on the ordinary arithmetic units, which want the last. chunk: its widest, of 16-bit
    vectors. eight_warps: from so many values in a sum on; beside a sum, the backward has two tiles of scores in
    registers."""

    choices: tuple[tuple[int, int, int, int], ...]
    chunk: int
    eight_warps: int


FORWARD = Shapes(((128, 64, 3, 320), (64, 64, 2, 192), (64, 32, 2, 128), (32, 32, 1, 64), (16, 16, 1, 32)), 512, 2**15)
BACKWARD_QUERIES = Shapes(((32, 32, 1, 104), (16, 32, 1, 72), (16, 16, 1, 52)), 128, 2**13)
BACKWARD_COLUMNS = Shapes(((64, 32, 1, 176), (32, 32, 1, 104), (16, 32, 1, 68), (16, 16, 1, 52)), 128, 2**13)
SCRATCH_BYTES = 16 * 2**10


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _chunk(width: int, widest: int) -> int:
    """Columns of a chunk: a power of two that divides K, or one that covers it with less than a chunk to spare."""
    divisor = width & -width
    return min(widest, divisor if divisor >= 16 else max(16, _power_of_two(width)))


def _blocks(q_THK: Tensor, shapes: Shapes, queries: int) -> Blocks:
    """The shape for these queries, of which a tile may hold at most `queries`."""
    _, num_heads, width = q_THK.shape
    single = q_THK.dtype == torch.float32
    chunk = _chunk(width, 64 if single else shapes.chunk)
    bytes_of_vector = triton.cdiv(width, chunk) * chunk * q_THK.element_size()
    *larger, smallest = shapes.choices
    room = shared_bytes(q_THK.device) - SCRATCH_BYTES
    fitting = [shape for shape in larger if shape[3] * bytes_of_vector <= room and not single]
    rows, columns, stages, _ = [*fitting, smallest][0]
    heads = min(_power_of_two(num_heads), rows)
    queries = min(_power_of_two(queries + 1) // 2, rows // heads)
    heads = max(heads, 16 // queries)  # a matrix product has at least 16 rows
    sums = max(rows, columns) * bytes_of_vector // q_THK.element_size()
    return Blocks(queries, heads, columns, chunk, 4 if single or sums < shapes.eight_warps else 8, stages)


def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may take; the interpreter gets small programs."""
    if device.type != "cuda":
        return 2**15
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def queries_of_keys(first_key_T: Tensor, last_key_T: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """The run of queries that see each window key: the first, and the one behind the last; int64 [X]."""
    x_X = torch.arange(num_keys, device=last_key_T.device)
    return torch.searchsorted(last_key_T, x_X), torch.searchsorted(first_key_T, x_X, right=True)


@triton.jit(do_not_specialize=["T"])
def sparse_attention_seen_kernel(
    first_entry_T, visible_T, start_C, stop_C, T, QUERIES: tl.constexpr, ENTRIES: tl.constexpr
):  # fmt: skip
    """Each query writes to the entries which it is the first or the last of its run to see; all others have one too."""
    t_T = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    real_T = t_T < T
    own_T, visible = tl.load(first_entry_T + t_T, mask=real_T, other=-1), tl.load(visible_T + t_T, mask=real_T, other=0)
    follows_T = real_T & (t_T > 0)
    follows_T = follows_T & (tl.load(first_entry_T + t_T - 1, mask=follows_T, other=-1) == own_T)
    before_T = tl.load(visible_T + t_T - 1, mask=follows_T, other=0)
    goes_on_T = t_T + 1 < T
    goes_on_T = goes_on_T & (tl.load(first_entry_T + t_T + 1, mask=goes_on_T, other=-1) == own_T)
    number_E = tl.arange(0, ENTRIES)
    t_TE = tl.broadcast_to(t_T[:, None], (QUERIES, ENTRIES))
    for at in range(0, tl.max(visible - before_T), ENTRIES):
        entry_TE = before_T[:, None] + at + number_E[None, :]
        tl.store(start_C + own_T[:, None] + entry_TE, t_TE, mask=entry_TE < visible[:, None])
    visible = tl.where(goes_on_T, 0, visible)
    for at in range(0, tl.max(visible), ENTRIES):
        entry_TE = at + tl.broadcast_to(number_E[None, :], (QUERIES, ENTRIES))
        tl.store(stop_C + own_T[:, None] + entry_TE, t_TE + 1, mask=entry_TE < visible[:, None])


def queries_of_entries(first_entry_T: Tensor, visible_T: Tensor, num_entries: int) -> tuple[Tensor, Tensor]:
    """The run of queries that see each entry when all visible ones are seen; as `queries_of_keys`, empty for an entry
    that none sees.

    Queries with the same first entry form a run, in which ever more entries become visible; the entries of two runs do
    not overlap.
    """
    start_C, stop_C = first_entry_T.new_zeros((2, num_entries))
    queries = 16
    sparse_attention_seen_kernel[(triton.cdiv(len(visible_T), queries),)](
        first_entry_T, visible_T, start_C, stop_C, len(visible_T), QUERIES=queries, ENTRIES=64, num_warps=4
    )
    return start_C, stop_C


class Inverse(NamedTuple):
    """The lists of picks of a chunk of queries, turned around: order_P[first_C[c] : first_C[c + 1]] are the picks of
    entry c by ascending query, each as its number in [queries of the chunk, M] plus `skip`. first_C: [C + 1]."""

    order_P: Tensor
    first_C: Tensor
    skip: int


def picks_of_entries(first_entry_T: Tensor, picked_TM: Tensor, num_entries: int, chunk: int) -> Iterator[Inverse]:
    """The inverse of each chunk of queries in turn. A sort takes many chunks at once, which it tells apart by the
    upper digits of its keys."""
    num_queries, num_picks = picked_TM.shape
    batch = max(1, PICKS_PER_SORT // (chunk * num_picks)) * chunk
    for start in range(0, num_queries, batch):
        picked_tM = picked_TM[start : start + batch].to(torch.int32)
        number_t1 = torch.arange(len(picked_tM), device=picked_TM.device)[:, None] // chunk
        base_t1 = number_t1 * (num_entries + 1)
        first_entry_t1 = (base_t1 + first_entry_T[start : start + batch, None]).to(torch.int32)
        key_tM = torch.where(picked_tM >= 0, first_entry_t1 + picked_tM, (base_t1 + num_entries).to(torch.int32))
        key_P, order_P = torch.sort(key_tM.flatten(), stable=True)
        chunks = triton.cdiv(len(picked_tM), chunk)
        keys = torch.arange(chunks * (num_entries + 1), dtype=torch.int32, device=picked_TM.device)
        first_NC = torch.searchsorted(key_P, keys).view(chunks, num_entries + 1)
        for number, first_C in enumerate(first_NC):
            yield Inverse(order_P, first_C, number * chunk * num_picks)


def add_picks(rows_tMBK: Tensor, inverse: Inverse, sums_CK: Tensor) -> None:
    """Add to each entry's sum, FP32, the rows of its picks: what each of B blocks of heads contributes."""
    _, _, blocks, width = rows_tMBK.shape
    columns = _power_of_two(width)
    rows, stages = (8, 4) if columns >= 512 else (8192 // columns, 3)
    sparse_attention_bwd_picks_kernel[(len(sums_CK),)](
        rows_tMBK, *inverse, sums_CK,
        K=width, BLOCKS=blocks, WIDTH=columns, ROWS=rows, STAGES=stages, num_warps=4,
    )  # fmt: skip


class _Operands(NamedTuple):
    """What every kernel gets; the tensors are contiguous."""

    q_THK: Tensor
    keys_XK: Tensor
    entries_CK: Tensor | None
    sink_H: Tensor
    first_key_T: Tensor
    last_key_T: Tensor
    first_entry_T: Tensor | None
    visible_T: Tensor | None
    num_sequences: int
    picked_TM: Tensor | None
    rotation: tuple[Tensor, Tensor] | None

    @property
    def entries(self) -> str:
        """Which entries are seen: "none", "visible" (all that are) or "picked"."""
        if self.entries_CK is None or not len(self.entries_CK):
            return "none"
        if self.picked_TM is None:
            return "visible"
        return "picked" if self.num_picks else "none"

    @property
    def scale(self) -> float:
        """Between q . k and the score in units of log 2."""
        return self.q_THK.shape[2] ** -0.5 * LOG2_E

    @property
    def num_picks(self) -> int:
        return 0 if self.picked_TM is None else self.picked_TM.shape[1]

    @property
    def most_queries(self) -> int:
        """Per tile: one if every query has columns of its own, and not many more than a short sequence has."""
        return 1 if self.entries == "picked" else max(1, len(self.q_THK) // self.num_sequences)

    @property
    def runs(self) -> tuple[Tensor | None, ...]:
        """What each query sees, as the kernels take it."""
        return self.first_key_T, self.last_key_T, self.first_entry_T, self.visible_T


def for_hopper(q_THK: Tensor) -> bool:
    """Whether the kernels of `hopper.py` run: 16-bit vectors, many wide heads, and a GPU of that generation."""
    _, num_heads, width = q_THK.shape
    suits = q_THK.dtype in (torch.bfloat16, torch.float16) and width in (128, 256, 512) and num_heads >= 32
    return suits and q_THK.is_cuda and torch.cuda.get_device_capability(q_THK.device) == (9, 0)


def _forward(x: _Operands) -> tuple[Tensor, Tensor]:
    num_queries, num_heads, width = x.q_THK.shape
    o_THK = torch.empty_like(x.q_THK)
    lse_TH = x.q_THK.new_empty((num_queries, num_heads), dtype=torch.float32)
    vectors = x.q_THK, x.keys_XK, x.entries_CK, x.picked_TM, x.sink_H
    rest = *x.runs, o_THK, lse_TH
    if for_hopper(x.q_THK):
        from leadline.ops.sparse_attention import hopper_forward

        items = num_queries * triton.cdiv(num_heads, 64)
        hopper_forward.sparse_attention_fwd_hopper_kernel[(min(items, multiprocessors(x.q_THK.device)),)](
            *vectors, *rest, items, num_heads, x.num_picks, x.scale, K=width, ENTRIES=x.entries, num_warps=4
        )
    else:
        blocks = _blocks(x.q_THK, FORWARD, x.most_queries)
        sparse_attention_fwd_kernel[(blocks.programs(num_queries, num_heads),)](
            *vectors, *rest, num_queries, num_heads, x.num_picks, x.scale, K=width, ENTRIES=x.entries, **blocks.options
        )
    return o_THK, lse_TH


class _Ahead:
    """Work that runs ahead of those who use its results: while these read one of `turns` workspaces, the other one is
    written. Both are on streams that are served first. They are two so that the next turn is in line, before the users,
    when the last one ends: users in many small programs would keep it from whole multiprocessors for long. On a CPU
    everything happens in turn."""

    def __init__(self, device: torch.device):
        self.user: torch.cuda.Stream | None = None
        self.streams: list[torch.cuda.Stream] = []
        self.given_back: list[torch.cuda.Event | None] = [None, None]
        if device.type == "cuda":
            self.user = torch.cuda.current_stream(device)
            self.streams = [torch.cuda.Stream(device, priority=-1) for _ in range(2)]
            for stream in self.streams:
                stream.wait_stream(self.user)

    @property
    def turns(self) -> int:
        return max(1, len(self.streams))

    def turn(self, place: int) -> AbstractContextManager[Any]:
        """Where work for the workspace `place` is launched; it begins when that was given back."""
        if self.user is None:
            return nullcontext()
        given_back = self.given_back[place]
        if given_back is not None:
            self.streams[place].wait_event(given_back)
        return torch.cuda.stream(self.streams[place])

    def join(self, place: int) -> None:
        """What is launched from here on uses what is in the workspace."""
        if self.user is not None:
            self.user.wait_stream(self.streams[place])

    def give_back(self, place: int) -> None:
        """What was launched up to here has used it."""
        if self.user is not None:
            self.given_back[place] = self.user.record_event()


class _Results(NamedTuple):
    """What the forward gave, o and lse, and the gradient of o. tail_THR: where the Hopper kernels find the last columns
    of that, at the end of rows of so many values. o and do may both be turned back, which does not change do . o."""

    o_THK: Tensor
    lse_TH: Tensor
    do_THK: Tensor
    tail_THR: Tensor

    @classmethod
    def of(cls, x: _Operands, o_THK: Tensor, lse_TH: Tensor, do_THK: Tensor) -> _Results:
        do_THK, tail_THR = do_THK.contiguous(), None
        if for_hopper(x.q_THK):
            from leadline.ops.sparse_attention import hopper_backward

            tail_THR = hopper_backward.tails(do_THK, x.rotation)
        if tail_THR is None and x.rotation is not None:
            o_THK, do_THK = rotate(o_THK, *x.rotation, False), rotate(do_THK, *x.rotation, False)
        return cls(o_THK, lse_TH, do_THK, do_THK if tail_THR is None else tail_THR)

    @property
    def tail(self) -> tuple[Tensor, int]:
        return self.tail_THR, self.tail_THR.shape[2]


def _backward_queries(x: _Operands, y: _Results) -> tuple[Tensor, Tensor, Tensor | None]:
    """dq, inner = do . o, and of picked entries the gradients, FP32 [C, K]."""
    num_queries, num_heads, width = x.q_THK.shape
    dq_THK, inner_TH = torch.empty_like(x.q_THK), torch.empty_like(y.lse_TH)
    columns = x.keys_XK, x.entries_CK, x.picked_TM
    results = dq_THK, inner_TH
    blocks = None
    if not for_hopper(x.q_THK):
        blocks = _blocks(x.q_THK, BACKWARD_QUERIES, x.most_queries)
    head_blocks = triton.cdiv(num_heads, 64 if blocks is None else blocks.heads)
    programs = multiprocessors(x.q_THK.device)
    if x.entries == "picked" and blocks is None:
        programs -= programs // PICKS_SHARE

    def launch(start: int, stop: int, rows_tMBK: Tensor | None) -> None:
        operands = y.o_THK, *columns, *x.runs, y.lse_TH, *results, rows_tMBK, start
        sizes = num_heads, x.num_picks, x.scale
        if blocks is None:
            from leadline.ops.sparse_attention import hopper_backward

            items = (stop - start) * head_blocks
            hopper_backward.sparse_attention_bwd_queries_hopper_kernel[(min(items, programs),)](
                x.q_THK, y.do_THK, *y.tail, *operands, items, *sizes, K=width, ENTRIES=x.entries, num_warps=4
            )
        else:
            sparse_attention_bwd_queries_kernel[(blocks.programs(stop - start, num_heads),)](
                x.q_THK, y.do_THK, *operands, stop, *sizes, K=width, ENTRIES=x.entries, **blocks.options
            )

    if x.entries != "picked":
        launch(0, num_queries, None)
        return *results, None
    assert x.entries_CK is not None
    assert x.picked_TM is not None
    assert x.first_entry_T is not None
    dentries_CK = torch.zeros_like(x.entries_CK, dtype=torch.float32)
    row_bytes = head_blocks * x.num_picks * width * x.q_THK.element_size()
    chunk = max(1, min(num_queries, WORKSPACE_BYTES // row_bytes))
    rounds = chunk // programs
    if rounds:  # whole rounds of programs, so that none idles at the end of a chunk
        chunk = rounds * programs
    inverses = picks_of_entries(x.first_entry_T, x.picked_TM, len(dentries_CK), chunk)
    ahead = _Ahead(x.q_THK.device if blocks is None else torch.device("cpu"))
    workspaces = x.q_THK.new_empty((ahead.turns, chunk, x.num_picks, head_blocks, width))
    for number, start in enumerate(range(0, num_queries, chunk)):
        place = number % ahead.turns
        with ahead.turn(place):
            launch(start, min(start + chunk, num_queries), workspaces[place])
        inverse = next(inverses)
        ahead.join(place)
        add_picks(workspaces[place], inverse, dentries_CK)
        ahead.give_back(place)
    if blocks is None:
        from leadline.ops.sparse_attention import hopper_backward

        dentries_CK = hopper_backward.in_order(dentries_CK)
    return *results, dentries_CK


def _backward_columns(
    x: _Operands, y: _Results, inner_TH: Tensor,
    vectors_XK: Tensor, runs: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """Gradient of the window keys or of the entries, in their dtype. runs: first and last row that each query sees.
    queries: first query that sees each row, and the one behind the last."""
    num_queries, num_heads, width = x.q_THK.shape
    num_columns = len(vectors_XK)
    blocks = None if for_hopper(x.q_THK) else _blocks(x.q_THK, BACKWARD_COLUMNS, num_queries)
    programs = triton.cdiv(num_columns, 64 if blocks is None else blocks.columns)
    parts = 1 if vectors_XK is x.keys_XK else _parts(x, programs)
    dtype = vectors_XK.dtype if parts == 1 else torch.float32
    dvectors_SXK = vectors_XK.new_empty((parts, num_columns, width), dtype=dtype)
    operands = vectors_XK, y.lse_TH, inner_TH, *runs, *queries, dvectors_SXK
    sizes = num_queries, num_heads, num_columns, triton.cdiv(num_queries, parts), x.scale
    if blocks is None:
        from leadline.ops.sparse_attention import hopper_backward

        hopper_backward.sparse_attention_bwd_columns_hopper_kernel[(programs, parts)](
            x.q_THK, y.do_THK, *y.tail, *operands, *sizes, K=width, num_warps=4
        )
    else:
        sparse_attention_bwd_columns_kernel[(programs, parts)](
            x.q_THK, y.do_THK, *operands, *sizes, K=width, **blocks.options
        )
    return dvectors_SXK[0] if parts == 1 else dvectors_SXK.sum(0).to(vectors_XK.dtype)


def _parts(x: _Operands, programs: int) -> int:
    """Into how many parts the queries that see entries are cut: HCA has few entries, and each is seen by almost all
    queries, so that one program a block of entries would leave most of the device idle."""
    wanted = 8 * multiprocessors(x.q_THK.device) // programs
    return max(1, min(wanted, triton.cdiv(len(x.q_THK), 32)))


def _operands(
    q_THK: Tensor, keys_XK: Tensor, entries_CK: Tensor | None, sink_H: Tensor,
    first_key_T: Tensor, last_key_T: Tensor, first_entry_T: Tensor | None, visible_T: Tensor | None,
    num_sequences: int, picked_TM: Tensor | None, cos_TR: Tensor | None, sin_TR: Tensor | None,
) -> _Operands:  # fmt: skip
    rotation = None if cos_TR is None or sin_TR is None else (cos_TR.contiguous(), sin_TR.contiguous())
    tensors = q_THK, keys_XK, entries_CK, sink_H, first_key_T, last_key_T, first_entry_T, visible_T, picked_TM
    *most, last = (None if x is None else x.contiguous() for x in tensors)
    return _Operands(*most, num_sequences, last, rotation)


def _empty_results(q_THK: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q_THK.new_empty(q_THK.shape), q_THK.new_empty(q_THK.shape[:2], dtype=torch.float32)


@opaque(_empty_results)
def forward(
    q_THK: Tensor, keys_XK: Tensor, entries_CK: Tensor | None, sink_H: Tensor,
    first_key_T: Tensor, last_key_T: Tensor, first_entry_T: Tensor | None, visible_T: Tensor | None,
    num_sequences: int, picked_TM: Tensor | None, cos_TR: Tensor | None, sin_TR: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o, turned back if there is a rotation, and lse."""
    runs = first_key_T, last_key_T, first_entry_T, visible_T
    x = _operands(q_THK, keys_XK, entries_CK, sink_H, *runs, num_sequences, picked_TM, cos_TR, sin_TR)
    o_THK, lse_TH = _forward(x)
    if x.rotation is not None:
        unrotate(o_THK, *x.rotation)
    return o_THK, lse_TH


def _empty_gradients(_do: Tensor, _o: Tensor, _lse: Tensor, *operands: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in operands[:4] if x is not None]


@opaque(_empty_gradients)
def backward(
    do_THK: Tensor, o_THK: Tensor, lse_TH: Tensor,
    q_THK: Tensor, keys_XK: Tensor, entries_CK: Tensor | None, sink_H: Tensor,
    first_key_T: Tensor, last_key_T: Tensor, first_entry_T: Tensor | None, visible_T: Tensor | None,
    num_sequences: int, picked_TM: Tensor | None, cos_TR: Tensor | None, sin_TR: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, keys, entries unless there are none, and sink, each in its dtype."""
    runs = first_key_T, last_key_T, first_entry_T, visible_T
    x = _operands(q_THK, keys_XK, entries_CK, sink_H, *runs, num_sequences, picked_TM, cos_TR, sin_TR)
    y = _Results.of(x, o_THK, lse_TH, do_THK)
    dq_THK, inner_TH, dpicked_CK = _backward_queries(x, y)
    dsink_H = -(torch.exp(x.sink_H - lse_TH) * inner_TH).sum(0)
    window = x.first_key_T, x.last_key_T
    queries = queries_of_keys(*window, len(keys_XK))
    dkeys_XK = _backward_columns(x, y, inner_TH, x.keys_XK, window, queries)
    if x.entries_CK is None:
        return [dq_THK, dkeys_XK, dsink_H]
    dentries_CK = torch.zeros_like(x.entries_CK)
    if dpicked_CK is not None:
        dentries_CK = dpicked_CK.to(x.entries_CK.dtype)
    elif x.entries == "visible":
        assert x.first_entry_T is not None
        assert x.visible_T is not None
        seen = x.first_entry_T, x.first_entry_T + x.visible_T - 1
        queries = queries_of_entries(x.first_entry_T, x.visible_T, len(x.entries_CK))
        dentries_CK = _backward_columns(x, y, inner_TH, x.entries_CK, seen, queries)
    return [dq_THK, dkeys_XK, dentries_CK, dsink_H]


class SparseAttentionKernel(torch.autograd.Function):
    """The operation of `reference.SparseAttention`, for vectors of 16 or 32 bits, with the parts of `Reach`."""

    @staticmethod
    def forward(
        ctx: Any,
        q_THK: Tensor,
        keys_XK: Tensor,
        entries_CK: Tensor | None,
        sink_H: Tensor,
        first_key_T: Tensor,
        last_key_T: Tensor,
        first_entry_T: Tensor | None,
        visible_T: Tensor | None,
        num_sequences: int,
        picked_TM: Tensor | None,
        cos_TR: Tensor | None,
        sin_TR: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        tensors = q_THK, keys_XK, entries_CK, sink_H, first_key_T, last_key_T, first_entry_T, visible_T
        rest = picked_TM, cos_TR, sin_TR
        o_THK, lse_TH = forward(*tensors, num_sequences, *rest)
        ctx.save_for_backward(o_THK, lse_TH, *tensors, *rest)
        ctx.num_sequences = num_sequences
        ctx.mark_non_differentiable(lse_TH)
        return o_THK, lse_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_THK: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
        o_THK, lse_TH, *tensors, picked_TM, cos_TR, sin_TR = ctx.saved_tensors
        dq_THK, dkeys_XK, *dentries_CK, dsink_H = backward(
            do_THK, o_THK, lse_TH, *tensors, ctx.num_sequences, picked_TM, cos_TR, sin_TR
        )
        return dq_THK, dkeys_XK, dentries_CK[0] if dentries_CK else None, dsink_H, *((None,) * 8)
