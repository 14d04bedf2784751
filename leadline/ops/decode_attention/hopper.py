"""Attention of single queries for Hopper, in Gluon: the kernel of `kernel.py` with its pipeline spelled out.

The products are turned around: 64 keys are the rows of the first, S^T = k q^T, and the K columns of the keys those of the
second, o^T = k^T p^T. So the tile of keys, written to shared memory once in bfloat16, is the first operand of both, and
the heads are the columns of products that may be as few as 16. A head's numbers do not depend on how many others are in
the block.

Order of a step: the first product of a tile runs while the next tile, whose bytes were loaded a step ago, is decoded in
registers and written to the other half of shared memory, and the bytes of the one after it are asked for. The rules of
`sparse_attention/hopper.py` hold here as well: phases of shared memory are divided by a wait, a barrier and a proxy
fence, and no accumulator is touched while it is in flight, not even on another path, so what is decoded for a tile that
does not exist is zeros.
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

NUM_WARPS = 8

# 16 bytes a thread and 512 a warp when rows are copied; and 16 bytes a thread of
# a chunk of 64 codes of each row that is decoded.
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16))
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0]))
WORDS = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [8, 1], [1, 0]))
LISTED = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))


@gluon.jit
def _listed(window_rows, entry_rows, place, W, M, TILE: gl.constexpr):
    """The rows at some places of the two lists, -1 behind each of them; the second begins with a tile."""
    window = gl.cdiv(W, TILE) * TILE
    window_row = gl.load(window_rows + place, mask=place < W, other=-1)
    entry_row = gl.load(entry_rows + (place - window), mask=(place >= window) & (place < window + M), other=-1)
    return gl.where(place < window, window_row, entry_row)


@gluon.jit
def _load_packed(payload, scales, rows, K: gl.constexpr):
    """The bytes of packed rows, four in an integer: chunks of 64 codes, the rotary part behind them, and the scales of a
    row as one integer. Whole integers, because a register that waits for the next step would hold one byte else."""
    WORDS_OF_ROW: gl.constexpr = (K + 64) // 4
    rows = rows.to(gl.int64)
    real = rows >= 0
    chunks = ()
    for at in gl.static_range(0, (K - 64) // 4, 16):
        word = at + gl.arange(0, 16, gl.SliceLayout(0, WORDS))
        chunks += (gl.load(payload + (rows * WORDS_OF_ROW)[:, None] + word[None, :], mask=real[:, None], other=0),)
    word = (K - 64) // 4 + gl.arange(0, 32, gl.SliceLayout(0, WORDS))
    chunks += (gl.load(payload + (rows * WORDS_OF_ROW)[:, None] + word[None, :], mask=real[:, None], other=0),)
    return chunks, gl.load(scales + rows, mask=real, other=0)


@gluon.jit
def _decoded(word, scales, c: gl.constexpr, TILE: gl.constexpr):
    """Chunk c of packed rows in bfloat16 [TILE, 64]."""
    code = (scales >> (8 * c)).to(gl.int32) & 0xFF
    scale = gl.where(code == 255, 0x7FC00000, gl.maximum(code << 23, 0x400000)).to(gl.float32, bitcast=True)
    first, second = (word & 0xFF).to(gl.uint8), ((word >> 8) & 0xFF).to(gl.uint8)
    third, fourth = ((word >> 16) & 0xFF).to(gl.uint8), ((word >> 24) & 0xFF).to(gl.uint8)
    codes = gl.join(gl.join(first, third), gl.join(second, fourth)).reshape([TILE, 64])
    values = codes.to(gl.float8e4nv, bitcast=True).to(gl.float16).to(gl.float32)
    factor = gl.convert_layout(scale, gl.SliceLayout(1, values.type.layout), assert_trivial=True)
    return (values * factor[:, None]).to(gl.bfloat16)


@gluon.jit
def _decode(keys, chunks, scales, K: gl.constexpr, TILE: gl.constexpr):
    """Write packed rows to shared memory in bfloat16. First the left halves of all buffers, because between two writes to
    one buffer stands a barrier."""
    for half in gl.static_range(2):
        for b in gl.static_range(K // 128):
            if 2 * b + half < (K - 64) // 64:
                values = _decoded(chunks[2 * b + half], scales, 2 * b + half, TILE)
                keys[b].slice(half * 64, 64, 1).store(values)
            else:
                last = chunks[2 * b + half]
                low, high = (last & 0xFFFF).to(gl.int16), (last >> 16).to(gl.int16)
                turned = gl.join(low, high).reshape([TILE, 64]).to(gl.bfloat16, bitcast=True)
                keys[b].slice(half * 64, 64, 1).store(turned)


@gluon.jit
def _copy(target, vectors, rows, K: gl.constexpr):
    """Begin to copy 128 columns of some rows of floats to shared memory; zeros for -1."""
    column = gl.arange(0, 128, gl.SliceLayout(0, COPY))
    pointers = vectors + (rows.to(gl.int64) * K)[:, None] + column[None, :]
    async_copy.async_copy_global_to_shared(target, pointers, mask=(rows >= 0)[:, None])


@gluon.jit
def decode_attention_fwd_hopper_kernel(
    q_THK, window, window_scales, window_rows, entries, entry_scales, entry_rows,
    sums_TSHK, most_TSH, total_TSH, H, W, M, scale,
    K: gl.constexpr, R: gl.constexpr, TILE: gl.constexpr, TILES: gl.constexpr, HEADS: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """One split of one query for a block of heads: TILES tiles of TILE rows. Packed rows come as int32, with one int64 of
    scales each; R is 0 for floats."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    BUFFERS: gl.constexpr = K // 128
    ROWS: gl.constexpr = gl.SliceLayout(1, WORDS if R else COPY)
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [TILE // 16, 128 // TILE], [16, HEADS * TILE // 128, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, HEADS, 16])
    HEAD: gl.constexpr = gl.SliceLayout(0, SCORES)
    dtype: gl.constexpr = q_THK.dtype.element_ty
    split, splits = gl.program_id(0), gl.num_programs(0)
    t = gl.program_id(2).to(gl.int64)
    head = gl.program_id(1) * HEADS
    window_rows += t * W
    entry_rows += t * M
    at = (t * splits + split) * H + head
    h = gl.arange(0, HEADS, HEAD)
    first = split * (TILES * TILE)
    window_places = gl.cdiv(W, TILE) * TILE

    place = first + gl.arange(0, TILE, ROWS)
    rows = _listed(window_rows, entry_rows, place, W, M, TILE)
    listed = _listed(window_rows, entry_rows, first + gl.arange(0, TILES * TILE, LISTED), W, M, TILE)
    if gl.max(listed, 0) < 0:
        gl.store(most_TSH + at + h, gl.full([HEADS], float("-inf"), gl.float32, HEAD), mask=head + h < H)
        gl.store(total_TSH + at + h, gl.zeros([HEADS], gl.float32, HEAD), mask=head + h < H)
        return

    keys, q, sums = (), (), ()
    for b in gl.static_range(BUFFERS):
        keys += (gl.allocate_shared_memory(dtype, [TILE, 128], SHARED),)
        q += (gl.allocate_shared_memory(dtype, [HEADS, 128], SHARED),)
        sums += (gl.zeros([128, HEADS], gl.float32, SUM),)
    weights = gl.allocate_shared_memory(dtype, [TILE, HEADS], gl.NVMMASharedLayout(2 * HEADS, 16))
    vectors = gl.where(first < window_places, window, entries)
    if R:
        scales = gl.where(first < window_places, window_scales, entry_scales)
        chunks, codes = _load_packed(vectors, scales, rows, K)
    row = gl.arange(0, HEADS, gl.SliceLayout(1, COPY))
    for b in gl.static_range(BUFFERS):
        _copy(q[b], q_THK + (t * H + head) * K + b * 128, gl.where(head + row < H, row, -1), K)
    most = gl.full([HEADS], float("-inf"), gl.float32, HEAD)  # in units of log 2
    totals = gl.zeros([TILE, HEADS], gl.float32, SCORES)
    for tile in range(TILES):
        if R:
            _decode(keys, chunks, codes, K, TILE)
        else:
            for b in gl.static_range(BUFFERS):
                _copy(keys[b], vectors + b * 128, rows, K)
        async_copy.commit_group()
        key = first + tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, SCORES))
        seen = _listed(window_rows, entry_rows, key, W, M, TILE) >= 0
        if TILES > 1:
            next_place = first + (tile + 1) * TILE
            rows = _listed(window_rows, entry_rows, place + (tile + 1) * TILE, W, M, TILE)
            vectors = gl.where(next_place < window_places, window, entries)
            if R:
                scales = gl.where(next_place < window_places, window_scales, entry_scales)
                chunks, codes = _load_packed(vectors, scales, rows, K)
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        scores = warpgroup_mma(
            keys[0], q[0].permute([1, 0]), gl.zeros([TILE, HEADS], gl.float32, SCORES), use_acc=False, is_async=True
        )
        for b in gl.static_range(1, BUFFERS):
            scores = warpgroup_mma(keys[b], q[b].permute([1, 0]), scores, is_async=True)
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
        factor = gl.convert_layout(shrink, gl.SliceLayout(0, SUM))
        fence_async_shared()
        barrier()
        flying = ()
        for b in gl.static_range(BUFFERS):
            flying += (warpgroup_mma(keys[b].permute([1, 0]), weights, sums[b] * factor[None, :], is_async=True),)
        landed = warpgroup_mma_wait(0, flying)
        sums = landed if BUFFERS > 1 else (landed,)
        barrier()

    gl.store(most_TSH + at + h, most, mask=head + h < H)
    gl.store(total_TSH + at + h, gl.sum(totals, 0), mask=head + h < H)
    h = gl.arange(0, HEADS, gl.SliceLayout(0, SUM))
    for b in gl.static_range(BUFFERS):
        column = b * 128 + gl.arange(0, 128, gl.SliceLayout(1, SUM))
        gl.store(sums_TSHK + column[:, None] + ((at + h) * K)[None, :], sums[b], mask=(head + h < H)[None, :])
