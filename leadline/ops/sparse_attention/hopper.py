"""Sparse attention for Hopper, in Gluon: what its kernels share.

At K = 512 a sum of [64, K] in FP32 fills half of the registers of a multiprocessor and three tiles [64, K] of 16 bits
most of its shared memory. So there is room for one program, and nothing but the program itself can hide what it waits
for. It has twelve warps, three warp groups with a role each, and the roles meet at mbarriers in shared memory:

- The loader copies tiles. Their rows lie scattered (picks) or end anywhere (runs), so it copies row by row, with
  `cp.async`, which counts as an arrival at the mbarrier of its tile when it lands.
- Two multipliers share the sum: each has half of its columns, [64, K / 2], in 128 registers a thread.

The forward and `bwd_columns` do the same with a tile: a product of all K columns with a block that stays (scores),
something done with each score (weights), and a product of the weights with the tile (the sum). The multipliers take the
tiles in turn: the owner makes the weights, and then both add their half. The block is read from shared memory once a
tile that way; if each multiplier made half of the scores of every tile, it would be twice, and these reads would be the
bound. A half of a tile is handed back to the loader as soon as it was added.

What bounds the forward: two products of [64, 64, K] take 2 x 64 x 64 x K / 2048 cycles (2,048 at K = 512) of the matrix
units, and 2,176 of shared memory, which is read for them and written by copies. Between the two products of a tile the
scores must become weights, about 900 cycles, and there is no room for a third tile whose scores could be made
meanwhile.

Three habits keep this correct without running it under a debugger:

- Shared memory is written and read in phases; between two phases stand a wait for the writer, a barrier for all threads
  of the role that reads or has read, and, before the matrix units read what threads or copies wrote, a proxy fence.
- Accumulators in flight are touched by nothing until they were waited for, not even on another path: a branch there
  would make the assembler run all products one by one.
- An mbarrier says that something happened only once, so each role counts how often, and asks for that phase.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
)

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # as Triton 3.6 calls it

LN_2 = gl.constexpr(0.6931471805599453)
LOG2_E = gl.constexpr(1.4426950408889634)
NUM_WARPS = 4  # of each role
MULTIPLIER_REGISTERS = gl.constexpr(224)
LOADER_REGISTERS = gl.constexpr(56)

# Where the elements of a tensor are: 16-bit matrices in shared memory, vectors there, and products [64, 64].
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16))
VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
MBARRIER = gl.constexpr(mbarrier.MBarrierLayout())
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
# Copied 16 bytes a thread: a warp takes 128 bytes of four rows, so that a thread has few rows to find.
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
COPY_ROWS = gl.constexpr(gl.SliceLayout(1, COPY.value))
SCALAR = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


class Ring(NamedTuple):
    """Two tiles [2, 64, K]; half h of tile b has its mbarriers at 2 b + h."""

    tiles: Any
    full: Any
    empty: Any


@gluon.jit
def new_ring(dtype: gl.constexpr, K: gl.constexpr):
    ring = Ring(
        gl.allocate_shared_memory(dtype, [2, 64, K], SHARED),
        gl.allocate_shared_memory(gl.int64, [4, 1], MBARRIER),
        gl.allocate_shared_memory(gl.int64, [4, 1], MBARRIER),
    )
    for i in gl.static_range(4):
        mbarrier.init(ring.full.index(i), count=128)
        mbarrier.init(ring.empty.index(i), count=1)
    return ring


@gluon.jit
def new_mbarriers(number: gl.constexpr, count: gl.constexpr):
    mbarriers = gl.allocate_shared_memory(gl.int64, [number, 1], MBARRIER)
    for i in gl.static_range(number):
        mbarrier.init(mbarriers.index(i), count=count)
    return mbarriers


@gluon.jit
def tell(where, pred=True):
    """Arrive at an mbarrier once all threads of the role have come here."""
    barrier()
    mbarrier.arrive(where, count=1, pred=pred)


@gluon.jit
def unknown_zero(count):
    """0, but no compiler sees that. An address that depends on it is worked out where it is used, in one instruction;
    otherwise the addresses of all pieces of all operands would be held in registers, of which there are none left."""
    return count >> 30


@gluon.jit
def begin_copy(target, rows_R, real_R, first: gl.constexpr):
    """Begin to copy columns first, first + 1, ... of the rows that the pointers rows_R point to; a row that is not real
    becomes zero."""
    column = first + gl.arange(0, target.shape[1], gl.SliceLayout(0, COPY))
    async_copy.async_copy_global_to_shared(target, rows_R[:, None] + column[None, :], mask=real_R[:, None])


@gluon.jit
def copy(target, rows_R, real_R, first: gl.constexpr, full):
    """`begin_copy`; when it has landed, 128 threads arrive at `full`."""
    begin_copy(target, rows_R, real_R, first)
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def prefetch(vectors, rows, K: gl.constexpr):
    """Have rows, at most 64, brought to the L2 cache: those of the next item, for which there is no room here yet."""
    line = gl.arange(0, K, gl.BlockedLayout([1], [32], [4], [0])) * 64
    pointer = vectors + gl.minimum(line, gl.minimum(rows, 64) * K - 64)
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointer], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def fill(ring, b, used, rows_R, real_R, K: gl.constexpr):
    """Copy a tile to place b of the ring, which was filled `used` times before, as soon as there is room."""
    for h in gl.static_range(2):
        mbarrier.wait(ring.empty.index(2 * b + h), (used + 1) & 1)
        half = ring.tiles.index(b).slice(h * (K // 2), K // 2, 1)
        copy(half, rows_R, real_R, h * (K // 2), ring.full.index(2 * b + h))


@gluon.jit
def scores(block, ring, used, W: gl.constexpr, K: gl.constexpr):
    """block tile^T for the next tile of the multiplier W, which has used `used` before."""
    zero = unknown_zero(used)
    product = gl.zeros([64, 64], gl.float32, PRODUCT)
    for h in gl.static_range(2):
        mbarrier.wait(ring.full.index(2 * W + h), used & 1)
        fence_async_shared()
        columns = ring.tiles.index(W + zero).slice(h * (K // 2), K // 2, 1)
        product = warpgroup_mma(
            block.index(zero).slice(h * (K // 2), K // 2, 1), columns.permute([1, 0]), product,
            use_acc=h == 1, is_async=True,
        )  # fmt: skip
    return product


@gluon.jit
def add_half(sums, weights, ring, owner: gl.constexpr, used, W: gl.constexpr, K: gl.constexpr):
    """sums + weights tile, the half of the multiplier W, for a tile of the multiplier `owner`; then the half of the
    tile is handed back."""
    zero = unknown_zero(used)
    half = ring.tiles.index(owner + zero).slice(W * (K // 2), K // 2, 1)
    sums = warpgroup_mma(weights.index(owner + zero), half, sums)
    tell(ring.empty.index(2 * owner + W))
    return sums


@gluon.constexpr_function
def rows_layout(width):
    """Of [64, width], as the sums of a multiplier, but with 16 bytes of a row in a thread and 64 in four."""
    wide = [[0, 2**i] for i in range(5, 10) if 2**i < width]
    registers, lanes = [[0, 1], [0, 2], [0, 4], [8, 0], *wide], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, width])


@gluon.jit
def store(vectors, rows, real, first: gl.constexpr, x, K: gl.constexpr):
    """vectors[rows] = x from column `first` on. rows, real: of the layout `rows_layout`."""
    LAYOUT: gl.constexpr = rows_layout(x.shape[1])
    column = first + gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT))
    x = gl.convert_layout(x.to(vectors.dtype.element_ty), LAYOUT)
    gl.store(vectors + (rows * K)[:, None] + column[None, :], x, mask=real[:, None])


@gluon.jit
def query(item, start, H):
    """The query of an item and its first head, 64 heads an item."""
    blocks = gl.cdiv(H, 64)
    return (start + item // blocks).to(gl.int64), item % blocks * 64


class Sources(NamedTuple):
    """What all queries look at, as the public function takes it."""

    keys_XK: Any
    entries_CK: Any
    picked_TM: Any
    first_key_T: Any
    last_key_T: Any
    first_entry_T: Any
    visible_T: Any
    M: Any


class Picture(NamedTuple):
    """What one query looks at: `window` keys from the pointer `keys` on, then `length` entries."""

    keys: Any
    window: Any
    entries: Any
    length: Any
    picked: Any


@gluon.jit
def look(t, sources, K: gl.constexpr, ENTRIES: gl.constexpr):
    """The picture of query t."""
    low = gl.load(sources.first_key_T + t)
    window = (gl.load(sources.last_key_T + t) + 1 - low).to(gl.int32)
    # A function of Triton 3.6 cannot return None, so pointers that nobody follows stand in for what is not there.
    entries, length, picked = sources.keys_XK, window * 0, sources.last_key_T
    if ENTRIES != "none":
        entries = sources.entries_CK + gl.load(sources.first_entry_T + t) * K
    if ENTRIES == "visible":
        length = gl.load(sources.visible_T + t).to(gl.int32)
    if ENTRIES == "picked":
        picked = sources.picked_TM + t * sources.M
        length = length_of_picks(picked, sources.M)
    return Picture(sources.keys_XK + low * K, window, entries, length, picked)


@gluon.jit
def length_of_picks(picked, M):
    """How many places of a list of picks must be looked at: all up to the last pick."""
    length = 0
    for at in range(0, M, 256):
        place = at + gl.arange(0, 256, gl.BlockedLayout([2], [32], [4], [0]))
        number = gl.load(picked + place, mask=place < M, other=-1)
        length = gl.maximum(length, gl.max(gl.where(number >= 0, place + 1, 0), 0))
    return length


@gluon.jit
def numbers(picture, step, ENTRIES: gl.constexpr):
    """What step `step` looks at: numbers of 64 keys or entries, -1 where there is none. The first steps walk over the
    window, the others over the entries."""
    place = step * 64 + gl.arange(0, 64, COPY_ROWS)
    number = gl.where(place < picture.window, place, -1)
    if ENTRIES != "none":
        window_steps = gl.cdiv(picture.window, 64)
        at = place - window_steps * 64
        here = (at >= 0) & (at < picture.length)
        if ENTRIES == "visible":
            entry = gl.where(here, at, -1)
        else:
            entry = gl.load(picture.picked + at, mask=here, other=-1).to(gl.int32)
        number = gl.where(step < window_steps, number, entry)
    return number


@gluon.jit
def pointers(picture, step, number, K: gl.constexpr, ENTRIES: gl.constexpr):
    """To the rows with these numbers."""
    vectors = picture.keys
    if ENTRIES != "none":
        vectors = gl.where(step < gl.cdiv(picture.window, 64), vectors, picture.entries)
    return vectors + number * K


@gluon.jit
def steps_of(picture):
    # A query sees itself at least; said aloud, so that there is no path around a loop over the steps.
    return gl.maximum(gl.cdiv(picture.window, 64) + gl.cdiv(picture.length, 64), 1)
