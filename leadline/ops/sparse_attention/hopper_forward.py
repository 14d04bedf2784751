"""The forward of sparse attention for Hopper; `hopper.py` has the idea.

A program takes 64 heads of one query at a time, and then those of another query; q stays in shared memory, the tiles
are its columns, and o is the sum. The running maximum goes from tile to tile, hence from one multiplier to the other
and back: the owner of a tile hands on the new maximum, and by how much that shrinks what was summed before. Each
multiplier counts the weights of its own tiles; the two counts meet at the end of a query.

Floors at 32K tokens, K = 512 and 64 heads: 2 x 64 x 64 x K FLOPs a tile, and each tile is 64 KiB from the L2 cache, so
at 500 TFLOP/s it gives 4 TB/s. HCA has but 4.5 tiles a query on average, against 128 KiB of q and o from and to device
memory, where both floors are equal.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)

from leadline.ops.sparse_attention.hopper import (
    COPY_ROWS,
    LN_2,
    LOADER_REGISTERS,
    LOG2_E,
    MULTIPLIER_REGISTERS,
    PRODUCT,
    SCALAR,
    SHARED,
    VECTOR,
    Sources,
    add_half,
    barrier,
    copy,
    fill,
    look,
    new_mbarriers,
    new_ring,
    numbers,
    pointers,
    prefetch,
    query,
    rows_layout,
    scores,
    steps_of,
    store,
    tell,
)

ROWS = gl.constexpr(gl.SliceLayout(1, PRODUCT.value))


class Shared(NamedTuple):
    """Shared memory of a program. What is there twice belongs to tiles or queries in turn; mbarriers end in `_done`.

    q: [1, 64, K]. weights: [2, 64, 64]. most, shrink: [2, 64], the maximum after a tile and the factor for what was
    summed before. sums: [4, 64], of the weights, by query and multiplier. unseen: [2, 64], -inf where a column of a
    tile is none. steps: [2, 1], tiles of a query.
    """

    ring: Any
    q: Any
    weights: Any
    most: Any
    shrink: Any
    sums: Any
    unseen: Any
    steps: Any
    q_loaded: Any
    q_read: Any
    unseen_done: Any
    weights_done: Any
    sums_done: Any
    steps_done: Any


@gluon.jit
def _load(s, q_THK, sources, items, H, K: gl.constexpr, ENTRIES: gl.constexpr):
    """The loader."""
    row = gl.arange(0, 64, COPY_ROWS)
    count, even, odd = 0, 0, 0  # queries, and how often each tile of the ring was filled
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        t, head = query(item, 0, H)
        picture = look(t, sources, K, ENTRIES)
        steps = steps_of(picture)
        s.steps.index(count % 2).store(gl.full([1], 0, gl.int32, SCALAR) + steps)
        tell(s.steps_done.index(count % 2))
        mbarrier.wait(s.q_read.index(0), (count + 1) & 1)
        q_R = q_THK + (t * H + head) * K + row * K
        for h in gl.static_range(2):
            copy(s.q.index(0).slice(h * (K // 2), K // 2, 1), q_R, head + row < H, h * (K // 2), s.q_loaded.index(0))
        if item + gl.num_programs(0) < items:
            after, its_head = query(item + gl.num_programs(0), 0, H)
            prefetch(q_THK + (after * H + its_head) * K, H - its_head, K)
        for step in range(0, steps):
            b = step % 2
            number = numbers(picture, step, ENTRIES)
            rows_R = pointers(picture, step, number, K, ENTRIES)
            fill(s.ring, b, gl.where(b == 0, even, odd), rows_R, number >= 0, K)
            s.unseen.index(b).store(gl.where(number >= 0, 0.0, float("-inf")))
            tell(s.unseen_done.index(b))
            even, odd = even + 1 - b, odd + b
        count += 1


@gluon.jit
def _soften(s, products, most, sums, W: gl.constexpr, scale, dtype: gl.constexpr):
    """Scores in units of log 2 to weights; the running maximum and sum of each row go on."""
    unseen = s.unseen.index(W).load(gl.SliceLayout(0, PRODUCT))
    products = products * scale + unseen[None, :]
    new = gl.maximum(most, gl.max(products, 1))
    # As long as a row has seen nothing, its maximum is -inf, and -inf - -inf would be NaN.
    base = gl.where(new == float("-inf"), 0.0, new)
    weights = gl.exp2(products - base[:, None])
    shrink = gl.exp2(most - base)
    # The published kernel rounds the probabilities to the dtype of the values before the second product.
    s.weights.index(W).store(weights.to(dtype))
    s.most.index(W).store(new)
    s.shrink.index(W).store(shrink)
    fence_async_shared()
    tell(s.weights_done.index(W))
    return new, shrink, sums * shrink + gl.sum(weights, 1)


@gluon.jit
def _own(s, o, most, sums, used, last, scale, W: gl.constexpr, K: gl.constexpr, dtype: gl.constexpr):
    """A tile of this multiplier. last: whether it is its last one of this query."""
    products = scores(s.q, s.ring, used, W, K)
    mbarrier.wait(s.unseen_done.index(W), used & 1)
    products = warpgroup_mma_wait(0, [products])
    if last:
        tell(s.q_read.index(0))
    most, shrink, sums = _soften(s, products, most, sums, W, scale, dtype)
    o = o * gl.convert_layout(shrink, _rows_of(o), assert_trivial=True)[:, None]
    return add_half(o, s.weights, s.ring, W, used, W, K), most, sums


@gluon.jit
def _other(s, o, sums, used, W: gl.constexpr, K: gl.constexpr):
    """A tile of the other multiplier."""
    mbarrier.wait(s.weights_done.index(1 - W), used & 1)
    most, shrink = s.most.index(1 - W).load(ROWS), s.shrink.index(1 - W).load(ROWS)
    o = o * gl.convert_layout(shrink, _rows_of(o), assert_trivial=True)[:, None]
    return add_half(o, s.weights, s.ring, 1 - W, used, W, K), most, sums * shrink


@gluon.constexpr_function
def _rows_of(x):
    return gl.SliceLayout(1, x.type.layout)


@gluon.jit
def _multiply(
    s, sink_H, o_THK, lse_TH, items, H, scale, W: gl.constexpr, K: gl.constexpr, dtype: gl.constexpr
):  # fmt: skip
    """The multiplier W, which has the columns from W K/2 on."""
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K // 2, 16])
    OUT: gl.constexpr = gl.SliceLayout(1, rows_layout(K // 2))
    count, mine, theirs = 0, 0, 0  # queries, and tiles of each multiplier
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        t, head = query(item, 0, H)
        h = head + gl.arange(0, 64, ROWS)
        sink = gl.load(sink_H + h, mask=h < H, other=0.0) * LOG2_E
        mbarrier.wait(s.steps_done.index(count % 2), (count // 2) & 1)
        steps = gl.max(s.steps.index(count % 2).load(SCALAR), 0)
        mbarrier.wait(s.q_loaded.index(0), count & 1)
        if steps <= W:
            tell(s.q_read.index(0))
        most = gl.full([64], float("-inf"), gl.float32, ROWS)
        sums = gl.zeros([64], gl.float32, ROWS)
        o = gl.zeros([64, K // 2], gl.float32, SUM)
        for i in range(0, steps, 2):
            if W == 0:
                o, most, sums = _own(s, o, most, sums, mine, i + 2 >= steps, scale, W, K, dtype)
                mine += 1
                if i + 1 < steps:
                    o, most, sums = _other(s, o, sums, theirs, W, K)
                    theirs += 1
            else:
                o, most, sums = _other(s, o, sums, theirs, W, K)
                theirs += 1
                if i + 1 < steps:
                    o, most, sums = _own(s, o, most, sums, mine, i + 3 >= steps, scale, W, K, dtype)
                    mine += 1

        # In turn, because with one tile a query the owner can be a whole query ahead.
        turn = count % 2 * 2
        s.sums.index(turn + W).store(sums)
        tell(s.sums_done.index(turn + W))
        mbarrier.wait(s.sums_done.index(turn + 1 - W), (count // 2) & 1)
        total = sums + s.sums.index(turn + 1 - W).load(ROWS)
        # A sink far above all scores makes the denominator infinite: the output is rightly 0, but its log must not be
        # taken from there.
        factor = 1.0 / (total + gl.exp2(sink - most))
        if W == 0:
            log = most + gl.log2(total)
            top = gl.maximum(log, sink)
            lse = (top + gl.log2(1.0 + gl.exp2(gl.minimum(log, sink) - top))) * LN_2
            gl.store(lse_TH + t * H + h, lse, mask=h < H)
        o = o * gl.convert_layout(factor, gl.SliceLayout(1, SUM), assert_trivial=True)[:, None]
        row = gl.arange(0, 64, OUT)
        store(o_THK + (t * H + head) * K, row, head + row < H, W * (K // 2), o, K)
        count += 1


@gluon.jit
def sparse_attention_fwd_hopper_kernel(
    q_THK, keys_XK, entries_CK, picked_TM, sink_H, first_key_T, last_key_T, first_entry_T, visible_T,
    o_THK, lse_TH, items, H, M, scale,
    K: gl.constexpr, ENTRIES: gl.constexpr,
):  # fmt: skip
    """o and lse. items: queries x blocks of 64 heads, shared among the programs. ENTRIES: "none", "visible" or
    "picked". scale: K^-0.5 log2 e."""
    dtype: gl.constexpr = q_THK.dtype.element_ty
    s = Shared(
        ring=new_ring(dtype, K),
        q=gl.allocate_shared_memory(dtype, [1, 64, K], SHARED),
        weights=gl.allocate_shared_memory(dtype, [2, 64, 64], SHARED),
        most=gl.allocate_shared_memory(gl.float32, [2, 64], VECTOR),
        shrink=gl.allocate_shared_memory(gl.float32, [2, 64], VECTOR),
        sums=gl.allocate_shared_memory(gl.float32, [4, 64], VECTOR),
        unseen=gl.allocate_shared_memory(gl.float32, [2, 64], VECTOR),
        steps=gl.allocate_shared_memory(gl.int32, [2, 1], VECTOR),
        q_loaded=new_mbarriers(1, 256),
        q_read=new_mbarriers(1, 2),
        unseen_done=new_mbarriers(2, 1),
        weights_done=new_mbarriers(2, 1),
        sums_done=new_mbarriers(4, 1),
        steps_done=new_mbarriers(2, 1),
    )
    barrier()
    sources = Sources(keys_XK, entries_CK, picked_TM, first_key_T, last_key_T, first_entry_T, visible_T, M)
    gl.warp_specialize(
        [
            (_multiply, (s, sink_H, o_THK, lse_TH, items, H, scale, 0, K, dtype)),
            (_multiply, (s, sink_H, o_THK, lse_TH, items, H, scale, 1, K, dtype)),
            (_load, (s, q_THK, sources, items, H, K, ENTRIES)),
        ],
        [4, 4],
        [MULTIPLIER_REGISTERS, LOADER_REGISTERS],
    )
