"""Attention of single queries for Hopper, in Gluon: the kernel of `kernel.py` with its pipeline spelled out.

The products are turned around: keys are the rows of the first, S^T = k q^T, and the K columns of the keys those of
the second, o^T = k^T p^T. So a tile of keys, written to shared memory once in bfloat16, is the first operand of both,
and the heads are the columns of products that may be as few as 16. A head's numbers do not depend on how many others
are in the block.

Eight-bit codes become bfloat16 two at a time: a word holds four, and one shift puts codes 0 and 2 (or 1 and 3) into the
lower and the upper half of a register, sign at the top and the other seven bits across exponent and mantissa. That is
the value times 2^-120, and two exact products, with 2^120 and with the scale, make it right. The two halves of a
register are neighbours in shared memory, so columns stand there in the order 0, 2, 1, 3 of each four. The query is put
into the same order, and the sums are written back in theirs.

A program that has one tile is a chain, from lists to rows, products, weights, products and sums, so its links overlap:
scores are summed up over the columns that are already decoded while the next are, and sums of some columns are written
while those of others are made. With several tiles, the bytes of the next one are on their way while one is multiplied.

The rules of `sparse_attention/hopper.py` hold here as well: phases of shared memory are divided by a wait, a barrier
and a proxy fence, and no accumulator is touched while it is in flight, not even on another path.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # as Triton 3.6 calls it

SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16))


@gluon.jit
def _listed(window_rows, entry_rows, place, W, M, TILE: gl.constexpr):
    """The rows at some places of the two lists, -1 behind each of them; the second begins with a tile."""
    window = gl.cdiv(W, TILE) * TILE
    window_row = gl.load(window_rows + place, mask=place < W, other=-1)
    entry_row = gl.load(entry_rows + (place - window), mask=(place >= window) & (place < window + M), other=-1)
    return gl.where(place < window, window_row, entry_row)


@gluon.jit
def _load_packed(payload, scales, rows, K: gl.constexpr, WORDS: gl.constexpr, ROTARY: gl.constexpr):
    """The bytes of packed rows, four in an integer: chunks of 64 codes, the rotary part behind them, and the scales of
    a row as one integer."""
    WORDS_OF_ROW: gl.constexpr = (K + 64) // 4
    rows = rows.to(gl.int64)
    real = rows >= 0
    chunks = ()
    for at in gl.static_range(0, (K - 64) // 4, 16):
        word = at + gl.arange(0, 16, gl.SliceLayout(0, WORDS))
        chunks += (gl.load(payload + (rows * WORDS_OF_ROW)[:, None] + word[None, :], mask=real[:, None], other=0),)
    # A thread has as many values of the rotary part as of a chunk.
    word = (K - 64) // 4 + gl.arange(0, 32, gl.SliceLayout(0, ROTARY))
    row = gl.convert_layout(rows, gl.SliceLayout(1, ROTARY), assert_trivial=True)
    chunks += (gl.load(payload + (row * WORDS_OF_ROW)[:, None] + word[None, :], mask=(row >= 0)[:, None], other=0),)
    return chunks, gl.load(scales + rows, mask=real, other=0)


@gluon.jit
def _halves(words):
    """The lower and the upper 16 bits of each integer, one behind the other, as bfloat16 [rows, 2 x columns]."""
    both = gl.join((words & 0xFFFF).to(gl.int16), (words >> 16).to(gl.int16))
    return both.reshape([words.shape[0], 2 * words.shape[1]]).to(gl.bfloat16, bitcast=True)


@gluon.jit
def _decoded(words, scales, c: gl.constexpr):
    """Chunk c of packed rows in bfloat16 [rows, 64]; columns in the order 0, 2, 1, 3 of each four."""
    even = ((words << 8) & -0x7FFF8000) | ((words << 4) & 0x07F007F0)
    odd = (words & -0x7FFF8000) | ((words >> 4) & 0x07F007F0)
    values = _halves(gl.join(even, odd).reshape([words.shape[0], 32]))
    code = (scales >> (8 * c)).to(gl.int32) & 0xFF
    bits = gl.where(code == 255, 0x7FC0, gl.maximum(code << 7, 0x40))
    scale = bits.to(gl.int16).to(gl.bfloat16, bitcast=True)
    scale = gl.convert_layout(scale, gl.SliceLayout(1, values.type.layout), assert_trivial=True)
    return values * gl.full([], 2.0**120, gl.bfloat16) * scale[:, None]


@gluon.jit
def _columns(chunks, scales, b: gl.constexpr, K: gl.constexpr):
    """Columns 128 b to 128 b + 127 of packed rows in bfloat16 [rows, 128]: two chunks side by side."""
    left = _decoded(chunks[2 * b], scales, 2 * b)
    right = _decoded(chunks[2 * b + 1], scales, 2 * b + 1) if b < K // 128 - 1 else _halves(chunks[2 * b + 1])
    return gl.join(left, right).permute([0, 2, 1]).reshape([left.shape[0], 128])


@gluon.jit
def _load_query(q_HK, heads, K: gl.constexpr, HEADS: gl.constexpr, WARPS: gl.constexpr):
    """A block of heads in pieces of 64 columns, zeros behind `heads`."""
    QUERY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    head = gl.arange(0, HEADS, gl.SliceLayout(1, QUERY))
    pieces = ()
    for at in gl.static_range(0, K, 64):
        column = at + gl.arange(0, 64, gl.SliceLayout(0, QUERY))
        pieces += (gl.load(q_HK + (head * K)[:, None] + column[None, :], mask=(head < heads)[:, None], other=0.0),)
    return pieces


@gluon.jit
def _store_query(target, pieces, K: gl.constexpr, R: gl.constexpr, HEADS: gl.constexpr):
    """Write a block of heads to shared memory with columns in the order of the keys. First the left halves of all
    buffers, because between two writes to one buffer stands a barrier."""
    for half in gl.static_range(2):
        for b in gl.static_range(K // 128):
            q = pieces[2 * b + half]
            if b * 128 + half * 64 < K - 64 and R > 0:
                q = q.reshape([HEADS, 16, 2, 2]).permute([0, 1, 3, 2]).reshape([HEADS, 64])
            target[b].slice(half * 64, 64, 1).store(q)


@gluon.jit
def _copy(target, vectors, rows, K: gl.constexpr, COPY: gl.constexpr):
    """Begin to copy 128 columns of some rows of floats to shared memory; zeros for -1."""
    column = gl.arange(0, 128, gl.SliceLayout(0, COPY))
    pointers = vectors + (rows.to(gl.int64) * K)[:, None] + column[None, :]
    async_copy.async_copy_global_to_shared(target, pointers, mask=(rows >= 0)[:, None])


@gluon.jit
def decode_attention_fwd_hopper_kernel(
    q_THK, window, window_scales, window_rows, entries, entry_scales, entry_rows,
    sums_TSHK, most_TSH, total_TSH, H, W, M, tiles, scale,
    K: gl.constexpr, R: gl.constexpr, TILE: gl.constexpr, SINGLE: gl.constexpr, HEADS: gl.constexpr,
    WARPS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """One split of one query for a block of heads: some tiles of TILE rows, or a SINGLE one. Packed rows come as int32,
    with one int64 of scales each; R is 0 for floats."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    BUFFERS: gl.constexpr = K // 128
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])
    ROTARY: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, WORDS if R else COPY)
    # Warps side by side where a tile has fewer rows than they need.
    BESIDE: gl.constexpr = 16 * WARPS // TILE
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS // BESIDE, BESIDE], [16, HEADS // BESIDE, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEADS, 16])
    HEAD: gl.constexpr = gl.SliceLayout(0, SCORES)
    dtype: gl.constexpr = q_THK.dtype.element_ty
    split, splits = gl.program_id(0), gl.num_programs(0)
    t = gl.program_id(2).to(gl.int64)
    head = gl.program_id(1) * HEADS
    window_rows += t * W
    entry_rows += t * M
    at = (t * splits + split) * H + head
    h = gl.arange(0, HEADS, HEAD)
    first = split * (1 if SINGLE else tiles) * TILE
    window_places = gl.cdiv(W, TILE) * TILE

    place = first + gl.arange(0, TILE, ROWS)
    rows = _listed(window_rows, entry_rows, place, W, M, TILE)
    pieces = _load_query(q_THK + (t * H + head) * K, H - head, K, HEADS, WARPS)
    vectors = gl.where(first < window_places, window, entries)
    if R:
        scales = gl.where(first < window_places, window_scales, entry_scales)
        chunks, codes = _load_packed(vectors, scales, rows, K, WORDS, ROTARY)
    last = rows
    if not SINGLE:
        for tile in range(1, tiles):
            last = gl.maximum(last, _listed(window_rows, entry_rows, place + tile * TILE, W, M, TILE))
    if gl.max(last, 0) < 0:
        gl.store(most_TSH + at + h, gl.full([HEADS], float("-inf"), gl.float32, HEAD), mask=head + h < H)
        gl.store(total_TSH + at + h, gl.zeros([HEADS], gl.float32, HEAD), mask=head + h < H)
        return

    keys, q, sums = (), (), ()
    for _ in gl.static_range(BUFFERS):
        keys += (gl.allocate_shared_memory(dtype, [TILE, 128], SHARED),)
        q += (gl.allocate_shared_memory(dtype, [HEADS, 128], SHARED),)
        sums += (gl.zeros([128, HEADS], gl.float32, SUM),)
    weights = gl.allocate_shared_memory(dtype, [TILE, HEADS], gl.NVMMASharedLayout(2 * HEADS, 16))
    _store_query(q, pieces, K, R, HEADS)
    most = gl.full([HEADS], float("-inf"), gl.float32, HEAD)  # in units of log 2
    totals = gl.zeros([TILE, HEADS], gl.float32, SCORES)
    for tile in range(1 if SINGLE else tiles):
        if not R:
            for b in gl.static_range(BUFFERS):
                _copy(keys[b], vectors + b * 128, rows, K, COPY)
                async_copy.commit_group()
        key = first + tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, SCORES))
        seen = _listed(window_rows, entry_rows, key, W, M, TILE) >= 0
        if not SINGLE:
            next_place = first + (tile + 1) * TILE
            rows = _listed(window_rows, entry_rows, place + (tile + 1) * TILE, W, M, TILE)
            rows = gl.where(tile + 1 < tiles, rows, -1)  # the next tile may be another program's
            vectors = gl.where(next_place < window_places, window, entries)
        scores = gl.zeros([TILE, HEADS], gl.float32, SCORES)
        for b in gl.static_range(BUFFERS):
            if R:
                keys[b].store(_columns(chunks, codes, b, K))
            else:
                async_copy.wait_group(BUFFERS - 1 - b)
            fence_async_shared()
            barrier()
            scores = warpgroup_mma(keys[b], q[b].permute([1, 0]), scores, use_acc=b > 0, is_async=True)
        if not SINGLE and R:
            scales = gl.where(next_place < window_places, window_scales, entry_scales)
            chunks, codes = _load_packed(vectors, scales, rows, K, WORDS, ROTARY)
        scores = gl.where(seen[:, None], warpgroup_mma_wait(0, [scores]) * scale, float("-inf"))

        new = gl.maximum(most, gl.max(scores, 0))
        # As long as a head has seen nothing, its maximum is -inf, and -inf - -inf would be NaN.
        base = gl.where(new == float("-inf"), 0.0, new)
        probabilities = gl.exp2(scores - base[None, :])
        # The published kernel rounds the probabilities to the dtype of the values before the second product.
        weights.store(probabilities.to(dtype))
        shrink = gl.exp2(most - base)
        most = new
        totals = totals * shrink[None, :] + probabilities
        if not SINGLE:
            factor = gl.convert_layout(shrink, gl.SliceLayout(0, SUM))
            scaled = ()
            for b in gl.static_range(BUFFERS):
                scaled += (sums[b] * factor[None, :],)
            sums = scaled
        fence_async_shared()
        barrier()
        flying = ()
        for b in gl.static_range(BUFFERS):
            flying += (warpgroup_mma(keys[b].permute([1, 0]), weights, sums[b], use_acc=not SINGLE, is_async=True),)
        if not SINGLE:
            landed = warpgroup_mma_wait(0, flying)
            sums = landed if BUFFERS > 1 else (landed,)
            barrier()
        else:
            sums = flying

    gl.store(most_TSH + at + h, most, mask=head + h < H)
    gl.store(total_TSH + at + h, gl.sum(totals, 0), mask=head + h < H)
    h = gl.arange(0, HEADS, gl.SliceLayout(0, SUM))
    for b in gl.static_range(BUFFERS):
        # What has landed is stored while the rest is still in flight.
        landed = warpgroup_mma_wait(BUFFERS - 1 - b, [sums[b]]) if SINGLE else sums[b]
        column = b * 128 + gl.arange(0, 128, gl.SliceLayout(1, SUM))
        if R:
            in_order = (column & -4) | ((column & 1) << 1) | ((column >> 1) & 1)
            column = gl.where(column < K - 64, in_order, column)
        gl.store(sums_TSHK + column[:, None] + ((at + h) * K)[None, :], landed, mask=(head + h < H)[None, :])
