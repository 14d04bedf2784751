"""Index scores for Hopper, in Gluon: `head_sums` of `kernel.py` with its pipeline spelled out.

Eight warps, two warp groups, hold 128 keys against two pieces of 128 columns, a column being a head of a query. The
matrix units need 1,024 cycles for a piece, ReLU, weights and the sum over the heads about half of that on the ordinary
units. Plain Triton does one after the other in every program, and leaves it to a second program on the same
multiprocessor to fill the gap. Here the two pieces of one program take turns: while one is multiplied, the other is
summed, and the matrix units have the next product before they have finished the last one. Keys arrive two steps ahead,
by `cp.async`, into four buffers.

What keeps this correct: a buffer that is filled again was read by products that all warps have waited for, before the
last barrier; what copies have written is read after a wait, a barrier and a proxy fence; and accumulators in flight are
touched by nothing.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # as Triton 3.6 calls it

KEYS = 128  # of a step
COLUMNS = 128  # of a piece: queries x heads
NUM_WARPS = 8
KEEP_NAN = gl.constexpr(tl.PropagateNan.ALL)

SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16))
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0]))
COPY_ROWS = gl.constexpr(gl.SliceLayout(1, COPY.value))
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 16]))


@gluon.jit
def _copy(target, vectors, rows, real, I: gl.constexpr):
    """Begin to copy vectors[rows] to shared memory; a row that is not real becomes zero. Its group is committed."""
    column = gl.arange(0, I, gl.SliceLayout(0, COPY))
    async_copy.async_copy_global_to_shared(target, vectors + (rows * I)[:, None] + column[None, :], mask=real[:, None])
    async_copy.commit_group()


@gluon.jit
def _load_weights(target, weight_TJ, tile, stop, J, HEADS: gl.constexpr):
    """Weights of the columns of a piece to shared memory; 0 where there is no such query or head."""
    column = gl.arange(0, 128, gl.SliceLayout(0, PRODUCT))
    t, head = tile + column // HEADS, column % HEADS
    target.store(gl.load(weight_TJ + t * J + head, mask=(t < stop) & (head < J), other=0.0))


@gluon.jit
def _sums(products, weights, HEADS: gl.constexpr):
    """The scores of a piece, [keys, queries]; weights: in shared memory."""
    weight = weights.load(gl.SliceLayout(0, PRODUCT))
    passed = gl.maximum(products, 0.0, propagate_nan=KEEP_NAN) * weight[None, :]
    return gl.sum(passed.reshape([128, 128 // HEADS, HEADS]), 2)


@gluon.jit
def _store(scores_QX, X, begin, sums, visible_Q):
    """Store the scores of 128 entries from `begin` on, as far as they are visible to the queries."""
    query = gl.arange(0, sums.shape[1], gl.SliceLayout(0, sums.type.layout))
    entry = begin + gl.arange(0, 128, gl.SliceLayout(1, sums.type.layout))
    seen = (entry >= 0)[:, None] & (entry[:, None] < visible_Q[None, :])
    gl.store(scores_QX + (query.to(gl.int64) * X)[None, :] + entry[:, None], sums, mask=seen)


@gluon.jit
def _visible(first_entry_T, visible_T, tile, first, stop, QUERIES: gl.constexpr, LAYOUT: gl.constexpr):
    """How many entries the queries of a piece see; 0 for a query whose entries do not begin at row `first`."""
    t = tile + gl.arange(0, QUERIES, LAYOUT)
    theirs = gl.load(first_entry_T + t, mask=t < stop, other=-1) == first
    return gl.load(visible_T + t, mask=theirs, other=0).to(gl.int32)


@gluon.jit(do_not_specialize=["start", "stop", "enough", "part"])
def index_scores_hopper_kernel(
    q_TJI, weight_TJ, keys_CI, first_entry_T, visible_T, scores_tX,
    start, stop, J, X, enough, part,
    I: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """scores[t - start, c] of two pieces of queries and `part` entries; as `head_sums_kernel`."""
    QUERIES: gl.constexpr = 128 // HEADS
    dtype: gl.constexpr = q_TJI.dtype.element_ty
    program = gl.program_id(0).to(gl.int64)
    tiles = gl.cdiv(stop - start, 2 * QUERIES)
    tile = start + program % tiles * (2 * QUERIES)
    begin = (program // tiles).to(gl.int32) * part
    t = tile + gl.arange(0, 2 * QUERIES, gl.SliceLayout(0, COPY))
    first_Q = gl.load(first_entry_T + t, mask=t < stop, other=-1)
    visible_Q = gl.load(visible_T + t, mask=t < stop, other=0).to(gl.int32)
    if gl.max(visible_Q, 0) > gl.maximum(begin, enough):
        q = gl.allocate_shared_memory(dtype, [2, 128, I], SHARED)
        keys = gl.allocate_shared_memory(dtype, [4, 128, I], SHARED)
        weights = gl.allocate_shared_memory(gl.float32, [2, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        place = gl.arange(0, 128, COPY_ROWS)
        for piece in gl.static_range(2):
            row, head = tile + piece * QUERIES + place // HEADS, place % HEADS
            _copy(q.index(piece), q_TJI, row * J + head, (row < stop) & (head < J), I)
            _load_weights(weights.index(piece), weight_TJ, tile + piece * QUERIES, stop, J, HEADS)
        zeros = gl.zeros([128, 128], gl.float32, PRODUCT)
        SUMS: gl.constexpr = gl.sum(zeros.reshape([128, QUERIES, HEADS]), 2).type.layout
        scores_0 = scores_tX + (tile - start) * X
        scores_1 = scores_0 + QUERIES * X
        for i in range(2 * QUERIES):
            # Query i leads the queries with the same entries, when none before it has them.
            first = gl.load(first_entry_T + tile + i, mask=tile + i < stop, other=-1)
            theirs = first_Q == first
            led = gl.max(gl.where(theirs & (t < tile + i), 1, 0), 0)
            end = gl.minimum(gl.max(gl.where(theirs, visible_Q, 0), 0), begin + part)
            if (led == 0) & (end > begin):
                visible_0 = _visible(first_entry_T, visible_T, tile, first, stop, QUERIES, gl.SliceLayout(0, SUMS))
                visible_1 = _visible(
                    first_entry_T, visible_T, tile + QUERIES, first, stop, QUERIES, gl.SliceLayout(0, SUMS)
                )
                vectors = keys_CI + first * I
                _copy(keys.index(0), vectors, begin + place, begin + place < end, I)
                _copy(keys.index(1), vectors, begin + 128 + place, begin + 128 + place < end, I)
                flying_1 = warpgroup_mma_init(zeros)
                # At least one step; said aloud, so that there is no path around the loop.
                steps = gl.maximum(gl.cdiv(end - begin, 128), 1)
                for step in range(0, steps):
                    at = begin + step * 128
                    async_copy.wait_group(1)
                    barrier()
                    fence_async_shared()
                    here = keys.index(step % 4)
                    products = warpgroup_mma_wait(0, [flying_1])
                    flying_0 = warpgroup_mma(here, q.index(0).permute([1, 0]), zeros, use_acc=False, is_async=True)
                    after = at + 256 + place
                    _copy(keys.index((step + 2) % 4), vectors, after, after < end, I)
                    # Of the step before; before the first one, no entry is seen.
                    before = gl.where(step > 0, at - 128, -128)
                    _store(scores_1, X, before, _sums(products, weights.index(1), HEADS), visible_1)
                    flying_1 = warpgroup_mma(here, q.index(1).permute([1, 0]), zeros, use_acc=False, is_async=True)
                    products = warpgroup_mma_wait(1, [flying_0])
                    _store(scores_0, X, at, _sums(products, weights.index(0), HEADS), visible_0)
                products = warpgroup_mma_wait(0, [flying_1])
                _store(scores_1, X, begin + (steps - 1) * 128, _sums(products, weights.index(1), HEADS), visible_1)
                async_copy.wait_group(0)
                barrier()
