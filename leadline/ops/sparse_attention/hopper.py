"""Sparse attention for Hopper, in Gluon: the kernels of `kernel.py` with their pipelines spelled out.

One program has 64 heads of one query (rows) or 64 columns, and eight warps, two warp groups. At K = 512 its sum of
[64, K] in FP32 fills half of the registers, and its tiles most of shared memory, so nothing but the program itself can
hide the latency of its loads. Plain Triton puts the load of a tile behind the products of the one before, and waits.
Here the order is written out: while a tile is multiplied, the next one is on its way (`cp.async`), and the matrix units
are left waiting only for the softmax between the two products of one tile. That is what Gluon is for: it shows the
layouts, the shared memory and the waits that Triton would choose.

Three habits keep this correct without running it under a debugger:

- Shared memory is written and read in phases; between two phases stand a wait for the writer, a barrier for all warps,
  and, before the matrix units read what threads or copies wrote, a proxy fence.
- Accumulators in flight are touched by nothing until they were waited for, not even on another path: a branch there
  would make the assembler run all products one by one.
- A tile that is overwritten was read by products that every warp has waited for, before the last barrier.

Rows of q and do are interleaved in the backward, q_0, do_0, q_1, do_1, ...: one product with the columns then gives
q . k and do . k in neighbouring registers of one thread, and their gradients and weights, interleaved again, give
g^T q + w^T do in one product.
"""

from __future__ import annotations

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

LN_2 = gl.constexpr(0.6931471805599453)
LOG2_E = gl.constexpr(1.4426950408889634)
ROWS = 64  # of a program: heads, or columns
NUM_WARPS = 8

# Where the elements of a tensor are: 16-bit matrices in shared memory; 16 bytes a thread and 512 a warp when they are
# copied; products [64, n] over two warp groups side by side.
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16))
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0]))
COPY_ROWS = gl.constexpr(gl.SliceLayout(1, COPY.value))
PRODUCT_64 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
PRODUCT_128 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16]))
# One value a row from each warp group, both in every thread of the row.
BOTH_GROUPS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0], [0, 1]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0], [0, 0]], [], [64, 2]
    )
)


@gluon.jit
def _copy(target, vectors, rows, real, K: gl.constexpr):
    """Begin to copy vectors[rows] to shared memory; a row that is not real becomes zero. Its group is committed."""
    column = gl.arange(0, K, gl.SliceLayout(0, COPY))
    async_copy.async_copy_global_to_shared(target, vectors + (rows * K)[:, None] + column[None, :], mask=real[:, None])
    async_copy.commit_group()


@gluon.jit
def _store(vectors, rows, real, tile, K: gl.constexpr):
    """vectors[rows] = tile, of shared memory."""
    column = gl.arange(0, K, gl.SliceLayout(0, COPY))
    gl.store(vectors + (rows * K)[:, None] + column[None, :], tile.load(COPY), mask=real[:, None])


@gluon.jit
def _length_of_picks(picked, M):
    """How many places of a list of picks must be looked at: all up to the last pick."""
    length = 0
    for at in range(0, M, 512):
        place = at + gl.arange(0, 512, gl.BlockedLayout([2], [32], [8], [0]))
        number = gl.load(picked + place, mask=place < M, other=-1)
        length = gl.maximum(length, gl.max(gl.where(number >= 0, place + 1, 0), 0))
    return length


@gluon.jit
def _next_rows(step, keys, window, entries, length, picked, place, ENTRIES: gl.constexpr):
    """What step `step` looks at: vectors, and in them the rows of a block, -1 where there is none.

    The first steps walk over the window, the others over the entries.
    """
    at = step * 64 + place
    vectors = keys
    rows = gl.where(at < window, at, -1)
    if ENTRIES != "none":
        window_steps = gl.cdiv(window, 64)
        later = step >= window_steps
        at = (step - window_steps) * 64 + place
        if ENTRIES == "visible":
            number = gl.where(at < length, at, -1)
        else:
            number = gl.load(picked + at, mask=(at >= 0) & (at < length), other=-1).to(gl.int32)
        vectors = gl.where(later, entries, keys)
        rows = gl.where(later, number, rows)
    return vectors, rows


@gluon.jit
def _by_thread(x):
    """[64, 64] of PRODUCT_64 as [rows, warp groups, eights, lanes, pairs]."""
    return x.reshape([64, 2, 4, 4, 2])


@gluon.jit
def _thread_sums(x):
    """Sums over the columns that one thread holds, so that no thread waits for another: [rows, warp groups, lanes]."""
    return gl.sum(gl.sum(_by_thread(x), 4), 2)


@gluon.jit
def _row_max(x, exchange):
    """The maximum of each row of PRODUCT_64. exchange: shared memory [64, 2]."""
    exchange.store(gl.max(gl.max(gl.max(_by_thread(x), 4), 2), 2))
    barrier()
    return gl.convert_layout(gl.max(exchange.load(BOTH_GROUPS), 1), gl.SliceLayout(1, PRODUCT_64), assert_trivial=True)


@gluon.jit
def sparse_attention_fwd_hopper_kernel(
    q_THK, keys_XK, entries_CK, picked_TM, sink_H, first_key_T, last_key_T, first_entry_T, visible_T,
    o_THK, lse_TH, H, M, scale,
    K: gl.constexpr, ENTRIES: gl.constexpr,
):  # fmt: skip
    """o and lse of 64 heads of one query. ENTRIES: "none", "visible" or "picked". scale: K^-0.5 log2 e."""
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, K // 2, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, PRODUCT_64)
    dtype: gl.constexpr = q_THK.dtype.element_ty
    q = gl.allocate_shared_memory(dtype, [64, K], SHARED)
    columns = gl.allocate_shared_memory(dtype, [2, 64, K], SHARED)
    weights = gl.allocate_shared_memory(dtype, [64, 64], SHARED)
    exchange = gl.allocate_shared_memory(gl.float32, [64, 2], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))

    program = gl.program_id(0).to(gl.int64)
    blocks = gl.cdiv(H, 64)
    t = program // blocks
    head = (program % blocks).to(gl.int32) * 64
    place = gl.arange(0, 64, COPY_ROWS)
    _copy(q, q_THK + (t * H + head) * K, place, head + place < H, K)

    low = gl.load(first_key_T + t)
    window = (gl.load(last_key_T + t) + 1 - low).to(gl.int32)
    keys_XK += low * K
    length = 0
    if ENTRIES != "none":
        entries_CK += gl.load(first_entry_T + t) * K
    if ENTRIES == "visible":
        length = gl.load(visible_T + t).to(gl.int32)
    if ENTRIES == "picked":
        picked_TM += t * M
        length = _length_of_picks(picked_TM, M)
    window_steps = gl.cdiv(window, 64)
    # A query sees itself at least; said aloud, so that there is no path around the loop.
    steps = gl.maximum(window_steps + gl.cdiv(length, 64), 1)
    _copy(columns.index(0), keys_XK, place, place < window, K)
    vectors, rows = _next_rows(1, keys_XK, window, entries_CK, length, picked_TM, place, ENTRIES)

    most = gl.full([64], float("-inf"), gl.float32, ROWS)  # in units of q . k
    sums = _thread_sums(gl.zeros([64, 64], gl.float32, PRODUCT_64))
    SUMS_ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, sums.type.layout))
    o_flying = warpgroup_mma_init(gl.zeros([64, K], gl.float32, SUM))
    n = gl.arange(0, 64, gl.SliceLayout(0, PRODUCT_64))
    for step in range(0, steps):
        here = columns.index(step % 2)
        o = warpgroup_mma_wait(0, [o_flying])
        async_copy.wait_group(0)
        barrier()
        fence_async_shared()
        # The first half of the product keeps the matrix units busy while the copies are issued.
        scores = warpgroup_mma(
            q.slice(0, K // 2, 1), here.slice(0, K // 2, 1).permute([1, 0]),
            gl.zeros([64, 64], gl.float32, PRODUCT_64), use_acc=False, is_async=True,
        )  # fmt: skip
        _copy(columns.index((step + 1) % 2), vectors, rows, rows >= 0, K)
        scores = warpgroup_mma(
            q.slice(K // 2, K // 2, 1), here.slice(K // 2, K // 2, 1).permute([1, 0]), scores, is_async=True
        )
        vectors, rows = _next_rows(step + 2, keys_XK, window, entries_CK, length, picked_TM, place, ENTRIES)
        seen = _next_rows(step, keys_XK, window, entries_CK, length, picked_TM, n, ENTRIES)[1] >= 0
        scores = gl.where(seen[None, :], warpgroup_mma_wait(0, [scores]), float("-inf"))

        new = gl.maximum(most, _row_max(scores, exchange))
        # As long as a row has seen nothing, its maximum is -inf, and -inf - -inf would be NaN.
        base = gl.where(new == float("-inf"), 0.0, new) * scale
        probabilities = gl.exp2(scores * scale - base[:, None])
        # The published kernel rounds the probabilities to the dtype of the values before the second product.
        weights.store(probabilities.to(dtype))
        shrink = gl.exp2(most * scale - base)
        most = new
        sums = sums * gl.convert_layout(shrink, SUMS_ROWS)[:, None, None] + _thread_sums(probabilities)
        o = o * gl.convert_layout(shrink, gl.SliceLayout(1, SUM))[:, None]
        fence_async_shared()
        barrier()
        o_flying = warpgroup_mma(weights, here, o, is_async=True)
    o = warpgroup_mma_wait(0, [o_flying])

    h = head + gl.arange(0, 64, ROWS)
    sink = gl.load(sink_H + h, mask=h < H, other=0.0)
    total = gl.convert_layout(gl.sum(gl.sum(sums, 2), 1), ROWS)
    # A sink far above all scores makes the denominator infinite: the output is rightly 0, but its log must not be
    # taken from there.
    factor = 1.0 / (total + gl.exp2(sink * LOG2_E - most * scale))
    log = (most * scale + gl.log2(total)) * LN_2
    top = gl.maximum(log, sink)
    gl.store(lse_TH + t * H + h, top + gl.log(gl.exp(log - top) + gl.exp(sink - top)), mask=h < H)
    o = o * gl.convert_layout(factor, gl.SliceLayout(1, SUM))[:, None]
    async_copy.wait_group(0)
    barrier()
    columns.index(0).store(o.to(dtype))
    barrier()
    _store(o_THK + (t * H + head) * K, place, head + place < H, columns.index(0), K)


@gluon.jit
def _copy_interleaved(target, q_THK, do_THK, first, heads, ROWS: gl.constexpr, K: gl.constexpr):
    """Begin to copy rows first, first + 1, ... of q [TH, K] and of do as q_0, do_0, q_1, do_1, ...; zero after `heads`
    of each. Its group is committed."""
    row = gl.arange(0, ROWS, COPY_ROWS)
    vectors = gl.where(row % 2 == 0, q_THK + first * K, do_THK + first * K)
    column = gl.arange(0, K, gl.SliceLayout(0, COPY))
    pointers = vectors[:, None] + ((row // 2) * K)[:, None] + column[None, :]
    async_copy.async_copy_global_to_shared(target, pointers, mask=(row // 2 < heads)[:, None])
    async_copy.commit_group()


@gluon.jit
def _inner(do_THK, o_THK, heads, K: gl.constexpr):
    """do . o of 64 rows, in the layout of copied rows."""
    row = gl.arange(0, 64, COPY_ROWS)
    inner = gl.zeros([64], gl.float32, COPY_ROWS)
    for at in range(0, K, 128):
        column = at + gl.arange(0, 128, gl.SliceLayout(0, COPY))
        here = (row * K)[:, None] + column[None, :]
        real = (row < heads)[:, None]
        do = gl.load(do_THK + here, mask=real, other=0.0).to(gl.float32)
        inner += gl.sum(do * gl.load(o_THK + here, mask=real, other=0.0).to(gl.float32), 1)
    return inner


@gluon.jit
def _gradients(products, seen, lse, inner, scale):
    """From q . k and do . k, interleaved, [64, 2 n]: the gradients of the scores times K^-0.5, [64, n], and these
    and the probabilities interleaved, [64, 2 n]."""
    n: gl.constexpr = products.shape[1] // 2
    scores, do_products = gl.split(products.reshape([64, n, 2]))
    weights = gl.where(seen[:, None], gl.exp2(scores * scale - lse[None, :]), 0.0)
    gradients = weights * (do_products - inner[None, :]) * (scale * LN_2)
    return gradients, gl.join(gradients, weights).reshape([64, 2 * n])


@gluon.jit
def _weigh(columns, tile, pairs, passing, seen, lse, inner, scale):
    """One step of `bwd_queries` up to dq: `passing` becomes g^T, `pairs` g and w interleaved, both [columns, rows]."""
    async_copy.wait_group(0)
    barrier()
    fence_async_shared()
    products = warpgroup_mma(columns, tile.permute([1, 0]), gl.zeros([64, 128], gl.float32, PRODUCT_128), use_acc=False)
    gradients, both = _gradients(products, seen, lse, inner, scale)
    pairs.store(both.to(pairs.dtype))
    passing.store(gradients.to(passing.dtype))
    fence_async_shared()
    barrier()


@gluon.jit
def _piece(pairs, tile, c: gl.constexpr):
    """Columns 128 c to 128 c + 127 of g^T q + w^T do, in flight."""
    zeros = gl.zeros([64, 128], gl.float32, PRODUCT_128)
    return warpgroup_mma(pairs, tile.slice(c * 128, 128, 1), zeros, use_acc=False, is_async=True)


@gluon.jit(do_not_specialize=["start"])
def sparse_attention_bwd_queries_hopper_kernel(
    q_THK, do_THK, o_THK, keys_XK, entries_CK, picked_TM, first_key_T, last_key_T, first_entry_T, visible_T, lse_TH,
    dq_THK, inner_TH, rows_tMBK, start, H, M, scale,
    K: gl.constexpr, ENTRIES: gl.constexpr,
):  # fmt: skip
    """dq and inner = do . o of 64 heads of one query, from query `start` on. With picks also `rows`: what each pick
    contributes to the gradient of its entry, summed over these heads; B blocks of heads."""
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, K // 2, 16])
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    dtype: gl.constexpr = q_THK.dtype.element_ty
    tile = gl.allocate_shared_memory(dtype, [128, K], SHARED)
    columns = gl.allocate_shared_memory(dtype, [64, K], SHARED)
    pairs = gl.allocate_shared_memory(dtype, [64, 128], SHARED)
    # Holds the gradients until dq has them, and then pieces of the rows on their way out.
    passing = gl.allocate_shared_memory(dtype, [64, 128], SHARED)
    gradients = passing.slice(0, 64, 1)

    program = gl.program_id(0).to(gl.int64)
    blocks = gl.cdiv(H, 64)
    t = start + program // blocks
    head = (program % blocks).to(gl.int32) * 64
    first = t * H + head
    heads = gl.minimum(H - head, 64)
    _copy_interleaved(tile, q_THK, do_THK, first, heads, 128, K)

    place = gl.arange(0, 64, COPY_ROWS)
    low = gl.load(first_key_T + t)
    window = (gl.load(last_key_T + t) + 1 - low).to(gl.int32)
    keys_XK += low * K
    length = 0
    if ENTRIES != "none":
        entries_CK += gl.load(first_entry_T + t) * K
    if ENTRIES == "visible":
        length = gl.load(visible_T + t).to(gl.int32)
    if ENTRIES == "picked":
        picked_TM += t * M
        rows_tMBK += (program // blocks * M * blocks + program % blocks) * K
        length = _length_of_picks(picked_TM, M)
    window_steps = gl.cdiv(window, 64)
    steps = window_steps + gl.cdiv(length, 64)
    _copy(columns, keys_XK, place, place < window, K)
    vectors, rows = _next_rows(1, keys_XK, window, entries_CK, length, picked_TM, place, ENTRIES)

    inner_R = _inner(do_THK + first * K, o_THK + first * K, heads, K)
    gl.store(inner_TH + first + place, inner_R, mask=place < heads)
    # The layouts of what `_gradients` takes are those of its own halves.
    HALF: gl.constexpr = gl.split(gl.zeros([64, 128], gl.float32, PRODUCT_128).reshape([64, 64, 2]))[0].type.layout
    inner = gl.convert_layout(inner_R, gl.SliceLayout(0, HALF))
    h = gl.arange(0, 64, gl.SliceLayout(0, HALF))
    lse = gl.load(lse_TH + first + h, mask=h < heads, other=0.0) * LOG2_E
    n = gl.arange(0, 64, gl.SliceLayout(1, HALF))
    dq = gl.zeros([64, K], gl.float32, SUM)
    out_n = gl.arange(0, 64, gl.SliceLayout(1, OUT))
    out_column = gl.arange(0, 128, gl.SliceLayout(0, OUT))
    for step in range(0, steps):
        seen = _next_rows(step, keys_XK, window, entries_CK, length, picked_TM, n, ENTRIES)[1] >= 0
        _weigh(columns, tile, pairs, gradients, seen, lse, inner, scale)
        dq_flying = warpgroup_mma(gradients.permute([1, 0]), columns, dq, is_async=True)
        if ENTRIES == "picked":
            # The first piece is multiplied while the next copies are issued; over the window, in vain.
            flying = _piece(pairs, tile, 0)
            dq = warpgroup_mma_wait(1, [dq_flying])
        else:
            dq = warpgroup_mma_wait(0, [dq_flying])
        barrier()
        _copy(columns, vectors, rows, rows >= 0, K)
        vectors, rows = _next_rows(step + 2, keys_XK, window, entries_CK, length, picked_TM, place, ENTRIES)
        if ENTRIES == "picked":
            piece = warpgroup_mma_wait(0, [flying])
            if step >= window_steps:
                at = (step - window_steps) * 64 + out_n
                real = gl.load(picked_TM + at, mask=at < length, other=-1) >= 0
                here = rows_tMBK + (at * (blocks * K))[:, None] + out_column[None, :]
                for c in gl.static_range(K // 128):
                    # The next piece is multiplied while this one is stored.
                    if c + 1 < K // 128:
                        flying = _piece(pairs, tile, c + 1)
                    passing.store(piece.to(dtype))
                    barrier()
                    gl.store(here + c * 128, passing.load(OUT), mask=real[:, None])
                    barrier()
                    if c + 1 < K // 128:
                        piece = warpgroup_mma_wait(0, [flying])

    async_copy.wait_group(0)
    barrier()
    columns.store(dq.to(dtype))
    barrier()
    _store(dq_THK + first * K, place, place < heads, columns, K)


@gluon.jit(do_not_specialize=["T", "X", "part"])
def sparse_attention_bwd_columns_hopper_kernel(
    q_THK, do_THK, vectors_XK, lse_TH, inner_TH, first_T, last_T, start_X, stop_X,
    dvectors_SXK, T, H, X, part, scale,
    K: gl.constexpr,
):  # fmt: skip
    """Gradient of 64 columns from queries s part to (s + 1) part - 1, where s is the second program index.

    Query t sees the columns first_T[t] to last_T[t]; column x is seen by none but queries start_X[x] to stop_X[x] - 1.
    A step takes 32 heads of one query.
    """
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, K // 2, 16])
    dtype: gl.constexpr = q_THK.dtype.element_ty
    columns = gl.allocate_shared_memory(dtype, [64, K], SHARED)
    tiles = gl.allocate_shared_memory(dtype, [2, 64, K], SHARED)
    pairs = gl.allocate_shared_memory(dtype, [64, 64], SHARED)

    block = gl.program_id(0).to(gl.int64) * 64
    s = gl.program_id(1).to(gl.int64)
    place = gl.arange(0, 64, COPY_ROWS)
    left = gl.minimum(X - block, 64).to(gl.int32)
    _copy(columns, vectors_XK + block * K, place, place < left, K)
    start = gl.load(start_X + block + place, mask=place < left, other=0)
    stop = gl.load(stop_X + block + place, mask=place < left, other=0)
    low = gl.maximum(gl.min(gl.where(start < stop, start, T), 0), s * part)
    high = gl.minimum(gl.max(gl.where(start < stop, stop, 0), 0), (s + 1) * part)
    blocks = gl.cdiv(H, 32)
    # A step over the end sees no query. At least one, so that there is no path around the loop.
    steps = gl.maximum((high - low).to(gl.int32) * blocks, 1)
    _copy_interleaved(tiles.index(0), q_THK, do_THK, low * H, gl.where(low < high, gl.minimum(H, 32), 0), 64, K)

    halves = gl.split(gl.zeros([64, 64], gl.float32, PRODUCT_64).reshape([64, 32, 2]))[0]
    HALF: gl.constexpr = halves.type.layout
    x = block + gl.arange(0, 64, gl.SliceLayout(1, HALF))
    h = gl.arange(0, 32, gl.SliceLayout(0, HALF))
    sums_flying = warpgroup_mma_init(gl.zeros([64, K], gl.float32, SUM))
    for step in range(0, steps):
        here = tiles.index(step % 2)
        sums = warpgroup_mma_wait(0, [sums_flying])
        async_copy.wait_group(0)
        barrier()
        fence_async_shared()
        products = warpgroup_mma(
            columns.slice(0, K // 2, 1), here.slice(0, K // 2, 1).permute([1, 0]),
            gl.zeros([64, 64], gl.float32, PRODUCT_64), use_acc=False, is_async=True,
        )  # fmt: skip
        after = step + 1
        t = low + after // blocks
        head = after % blocks * 32
        heads = gl.where(t < high, gl.minimum(H - head, 32), 0)
        _copy_interleaved(tiles.index(after % 2), q_THK, do_THK, t * H + head, heads, 64, K)
        products = warpgroup_mma(
            columns.slice(K // 2, K // 2, 1), here.slice(K // 2, K // 2, 1).permute([1, 0]), products, is_async=True
        )
        t = low + step // blocks
        head = step % blocks * 32
        real = (head + h < H) & (t < high)
        lse = gl.load(lse_TH + t * H + head + h, mask=real, other=0.0) * LOG2_E
        inner = gl.load(inner_TH + t * H + head + h, mask=real, other=0.0)
        seen = (x >= gl.load(first_T + t, mask=t < high, other=1)) & (x <= gl.load(last_T + t, mask=t < high, other=0))
        products = warpgroup_mma_wait(0, [products])
        both = _gradients(products, seen, lse, inner, scale)[1]
        pairs.store(both.to(dtype))
        fence_async_shared()
        barrier()
        sums_flying = warpgroup_mma(pairs, here, sums, is_async=True)
    sums = warpgroup_mma_wait(0, [sums_flying])
    async_copy.wait_group(0)

    x = block + gl.arange(0, 64, gl.SliceLayout(1, SUM))
    column = gl.arange(0, K, gl.SliceLayout(0, SUM))
    pointers = dvectors_SXK + ((s * X + x) * K)[:, None] + column[None, :]
    gl.store(pointers, sums.to(dvectors_SXK.dtype.element_ty), mask=(x < X)[:, None])
