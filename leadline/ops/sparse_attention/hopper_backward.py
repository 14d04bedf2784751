"""The backward of sparse attention for Hopper; `hopper.py` has the idea, `kernel.py` says which kernel sums what.

In shared memory rows of q are followed by those of do for the same heads: one product with the columns then gives q . k
and do . k in registers of one thread.

`bwd_columns` turns the roles of the forward around: 64 columns stay, and the tiles are q and do of 16 heads of a query.
The sum is the gradient of the columns, and no running maximum goes around. Tiles are half as large as in the forward,
so that there is room for four: one is added, two are multiplied with the columns by their owners, one is on its way. A
multiplier makes its weights while the last tile of the other one is added, and the other way round.

`bwd_queries` keeps q and do of 64 heads of one query, twice as much, so there is room for one tile of columns. The
multipliers share everything: each takes 32 heads of the scores, and half of the K columns of the sums. To have the
next tile under way nevertheless, tiles are cut into pieces of K / 4 columns. A piece is handed back as soon as dq has
it, which comes before the rows of picks, and the next tile starts with the pieces that are there.

Where o was turned back by a rotation, do must be turned forth, but only its last columns move: those are found in a
tensor of their own, and the rest of do is taken as it comes.

Floors at 32K tokens of CSA, K = 512 and 64 heads: 5 products of [64, 64, K] for 64 picks, 3 for 64 window keys, and in
`bwd_columns` 4 for 64 keys and 64 heads, half as many again because a block of 64 keys is seen by 191 queries, each of
which sees no more than 128; its scores, with 32 rows a tile, are bound by what they read from shared memory, 1.5 times
their arithmetic. Picks also write rows of 1 KiB to device memory, which `bwd_picks` reads again, beside the products of
the next chunk of queries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from leadline.ops.rope.kernel import rotate
from leadline.ops.sparse_attention.hopper import (
    COPY,
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
    barrier,
    begin_copy,
    copy,
    look,
    new_mbarriers,
    numbers,
    pointers,
    prefetch,
    query,
    rows_layout,
    steps_of,
    store,
    tell,
    unknown_zero,
)

TAIL = gl.constexpr(64)  # columns


@gluon.jit
def _halves(products):
    """The left and the right half of the columns; both are in the registers of the same threads."""
    WIDTH: gl.constexpr = products.shape[1] // 2
    return gl.split(products.reshape([64, 2, WIDTH]).permute([0, 2, 1]))


@gluon.jit
def _gradients(products, lse, inner, scale):
    """From q . k and do . k, side by side: weights, and gradients of the scores times K^-0.5."""
    q_products, do_products = _halves(products)
    weights = gl.exp2(q_products * scale - lse)
    return weights, weights * (do_products - inner[None, :]) * (scale * LN_2)


@gluon.jit
def _copy_heads(target, rows_R, tails_R, real_R, first: gl.constexpr, full, K: gl.constexpr):
    """`copy` of columns first, first + 1, ... of rows of q and do. Their last TAIL columns, which a rotation of the
    output turns, lie at pointers of their own."""
    WIDTH: gl.constexpr = target.shape[1]
    for at in gl.static_range(0, WIDTH, TAIL):
        part = target.slice(at, TAIL, 1)
        if first + at + TAIL < K:
            begin_copy(part, rows_R, real_R, first + at)
        else:
            begin_copy(part, tails_R, real_R, 0)
    async_copy.mbarrier_arrive(full, increment_count=False)


class Columns(NamedTuple):
    """Shared memory of `bwd_columns`. tiles: [4, 32, K], q and do of 16 heads each; half h of tile b has its mbarriers
    at 2 b + h. block: [1, 64, K], the columns. pairs: [4, 64, 32], gradients and weights."""

    tiles: Any
    block: Any
    pairs: Any
    full: Any
    empty: Any
    block_loaded: Any
    pairs_done: Any


class Part(NamedTuple):
    """64 columns from `block` on, and queries low to high - 1, which a program sums over in turns: a tile for each
    multiplier."""

    block: Any
    low: Any
    high: Any
    turns: Any


@gluon.jit
def _tile_of(part, number, H):
    """Query and first head of a tile, and its heads; none over the end."""
    blocks = gl.cdiv(H, 16)
    t, head = part.low + number // blocks, number % blocks * 16
    return t, head, gl.where(t < part.high, gl.minimum(H - head, 16), 0)


@gluon.jit
def _load_rows(s, q_THK, do_THK, tail_THR, stride, vectors_XK, part, H, X, K: gl.constexpr):
    """The loader of `bwd_columns`."""
    row = gl.arange(0, 64, COPY_ROWS)
    block_R = vectors_XK + part.block * K + row * K
    for h in gl.static_range(2):
        target = s.block.index(0).slice(h * (K // 2), K // 2, 1)
        copy(target, block_R, part.block + row < X, h * (K // 2), s.block_loaded.index(0))
    row = gl.arange(0, 32, COPY_ROWS)
    rows_R = gl.where(row < 16, q_THK, do_THK) + row % 16 * K
    stride_R = gl.where(row < 16, K, stride)
    tails_R = gl.where(row < 16, q_THK, tail_THR) + row % 16 * stride_R + (stride_R - TAIL)
    for number in range(0, 2 * part.turns):
        t, head, heads = _tile_of(part, number, H)
        first, place = t * H + head, number % 4
        for h in gl.static_range(2):
            mbarrier.wait(s.empty.index(2 * place + h), (number // 4 + 1) & 1)
            half, full = s.tiles.index(place).slice(h * (K // 2), K // 2, 1), s.full.index(2 * place + h)
            rows, tails = rows_R + first * K, tails_R + first * stride_R
            _copy_heads(half, rows, tails, row % 16 < heads, h * (K // 2), full, K)


class Known(NamedTuple):
    """What is known of the heads of a tile: log of the denominator, inner product, and the first and last column that
    the query sees."""

    lse: Any
    inner: Any
    first: Any
    last: Any


@gluon.constexpr_function
def _narrow():
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])


@gluon.jit
def _known_of_rows(part, number, lse_TH, inner_TH, first_T, last_T, H):
    """What is known of a tile; loaded long before it is needed."""
    HALF: gl.constexpr = _halves(gl.zeros([64, 32], gl.float32, _narrow()))[0].type.layout
    h = gl.arange(0, 16, gl.SliceLayout(0, HALF))
    t, head, heads = _tile_of(part, number, H)
    return Known(
        gl.load(lse_TH + (t * H + head) + h, mask=h < heads, other=0.0),
        gl.load(inner_TH + (t * H + head) + h, mask=h < heads, other=0.0),
        gl.load(first_T + t, mask=t < part.high, other=1),
        gl.load(last_T + t, mask=t < part.high, other=0),
    )


@gluon.jit
def _score_rows(s, turn, W: gl.constexpr, K: gl.constexpr):
    """block tile^T for the tile of the multiplier W, in flight."""
    zero = unknown_zero(turn)
    place = turn % 2 * 2 + W
    products = gl.zeros([64, 32], gl.float32, _narrow())
    for h in gl.static_range(2):
        mbarrier.wait(s.full.index(2 * place + h), (turn // 2) & 1)
        fence_async_shared()
        rows = s.tiles.index(place + zero).slice(h * (K // 2), K // 2, 1)
        columns = s.block.index(zero).slice(h * (K // 2), K // 2, 1)
        products = warpgroup_mma(columns, rows.permute([1, 0]), products, use_acc=h == 1, is_async=True)
    return products


@gluon.jit
def _weigh_rows(s, part, products, turn, known, scale, W: gl.constexpr):
    """Gradients and weights of the tile of the multiplier W."""
    HALF: gl.constexpr = _halves(gl.zeros([64, 32], gl.float32, _narrow()))[0].type.layout
    x = part.block + gl.arange(0, 64, gl.SliceLayout(1, HALF))
    seen = ((x >= known.first) & (x <= known.last))[:, None]
    lse, inner = known.lse * LOG2_E, known.inner
    weights, gradients = _gradients(products, lse[None, :], inner, scale)
    # What is not seen may hold anything.
    pairs = gl.join(gl.where(seen, gradients, 0.0), gl.where(seen, weights, 0.0)).permute([0, 2, 1]).reshape([64, 32])
    s.pairs.index(turn % 2 * 2 + W).store(pairs.to(s.pairs.dtype))


@gluon.jit
def _add_rows(s, sums, turn, owner: gl.constexpr, W: gl.constexpr, K: gl.constexpr):
    """sums + pairs^T tile, the half of the multiplier W, in flight."""
    place = turn % 2 * 2 + owner + unknown_zero(turn)
    half = s.tiles.index(place).slice(W * (K // 2), K // 2, 1)
    return warpgroup_mma(s.pairs.index(place), half, sums, is_async=True)


@gluon.jit
def _rows_landed(s, sums, turn, owner: gl.constexpr, W: gl.constexpr):
    """The sum when it has landed; the half of the tile is handed back."""
    sums = warpgroup_mma_wait(0, [sums])
    tell(s.empty.index(2 * (turn % 2 * 2 + owner) + W))
    return sums


@gluon.jit
def _turn(s, sums, part, turn, known, scale, W: gl.constexpr, K: gl.constexpr):
    """The tile of this multiplier; meanwhile the last one of the other is added."""
    products = _score_rows(s, turn, W, K)
    last = turn - 1 + W  # turn of the other one
    mbarrier.wait(s.pairs_done.index(1 - W), last & 1)
    sums = _add_rows(s, sums, last, 1 - W, W, K)
    _weigh_rows(s, part, warpgroup_mma_wait(1, [products]), turn, known, scale, W)
    fence_async_shared()
    sums = _rows_landed(s, sums, last, 1 - W, W)
    tell(s.pairs_done.index(W))
    return _rows_landed(s, _add_rows(s, sums, turn, W, W, K), turn, W, W)


@gluon.jit
def _sum_rows(
    s, part, lse_TH, inner_TH, first_T, last_T, dvectors_XK, H, X, scale, W: gl.constexpr, K: gl.constexpr
):  # fmt: skip
    """The multiplier W of `bwd_columns`."""
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K // 2, 16])
    OUT: gl.constexpr = gl.SliceLayout(1, rows_layout(K // 2))
    sums = gl.zeros([64, K // 2], gl.float32, SUM)
    known = _known_of_rows(part, W, lse_TH, inner_TH, first_T, last_T, H)
    mbarrier.wait(s.block_loaded.index(0), 0)
    if W == 0:
        products = warpgroup_mma_wait(0, [_score_rows(s, 0, W, K)])
        _weigh_rows(s, part, products, 0, known, scale, W)
        fence_async_shared()
        tell(s.pairs_done.index(W))
        known = _known_of_rows(part, 2, lse_TH, inner_TH, first_T, last_T, H)
        sums = _rows_landed(s, _add_rows(s, sums, 0, W, W, K), 0, W, W)
    for turn in range(1 - W, part.turns):
        sums = _turn(s, sums, part, turn, known, scale, W, K)
        known = _known_of_rows(part, 2 * (turn + 1) + W, lse_TH, inner_TH, first_T, last_T, H)
    if W == 0:
        last = part.turns - 1
        mbarrier.wait(s.pairs_done.index(1), last & 1)
        sums = _rows_landed(s, _add_rows(s, sums, last, 1, W, K), last, 1, W)
    x = part.block + gl.arange(0, 64, OUT)
    store(dvectors_XK, x, x < X, W * (K // 2), sums, K)


@gluon.jit(do_not_specialize=["T", "X", "part"])
def sparse_attention_bwd_columns_hopper_kernel(
    q_THK, do_THK, tail_THR, stride, vectors_XK, lse_TH, inner_TH, first_T, last_T, start_X, stop_X,
    dvectors_SXK, T, H, X, part, scale,
    K: gl.constexpr,
):  # fmt: skip
    """Gradient of 64 columns from queries s part to (s + 1) part - 1, where s is the second program index.

    Query t sees the columns first_T[t] to last_T[t]; column x is seen by none but queries start_X[x] to stop_X[x] - 1.
    tail_THR: where the last columns of do are, at the end of rows of `stride` values.
    """
    dtype: gl.constexpr = q_THK.dtype.element_ty
    s = Columns(
        tiles=gl.allocate_shared_memory(dtype, [4, 32, K], SHARED),
        block=gl.allocate_shared_memory(dtype, [1, 64, K], SHARED),
        pairs=gl.allocate_shared_memory(dtype, [4, 64, 32], gl.NVMMASharedLayout(64, 16)),
        full=new_mbarriers(8, 128),
        empty=new_mbarriers(8, 1),
        block_loaded=new_mbarriers(1, 256),
        pairs_done=new_mbarriers(2, 1),
    )
    barrier()
    block = gl.program_id(0).to(gl.int64) * 64
    number = gl.program_id(1).to(gl.int64)
    x = block + gl.arange(0, 64, SCALAR)
    start = gl.load(start_X + x, mask=x < X, other=0)
    stop = gl.load(stop_X + x, mask=x < X, other=0)
    low = gl.maximum(gl.min(gl.where(start < stop, start, T), 0), number * part)
    high = gl.minimum(gl.max(gl.where(start < stop, stop, 0), 0), (number + 1) * part)
    # A tile over the end sees no query. At least one turn, so that there is no path around the loop.
    turns = gl.maximum(gl.cdiv((high - low).to(gl.int32) * gl.cdiv(H, 16), 2), 1)
    here = Part(block, low, high, turns)
    dvectors_XK = dvectors_SXK + number * X * K
    gl.warp_specialize(
        [
            (_sum_rows, (s, here, lse_TH, inner_TH, first_T, last_T, dvectors_XK, H, X, scale, 0, K)),
            (_sum_rows, (s, here, lse_TH, inner_TH, first_T, last_T, dvectors_XK, H, X, scale, 1, K)),
            (_load_rows, (s, q_THK, do_THK, tail_THR, stride, vectors_XK, here, H, X, K)),
        ],
        [4, 4],
        [MULTIPLIER_REGISTERS, LOADER_REGISTERS],
    )


class Queries(NamedTuple):
    """Shared memory of `bwd_queries`. What is there twice belongs to tiles, queries or multipliers in turn.

    heads: [1, 128, K], q and do of 32 heads, then those of the others. pieces: [places, 64, K / pieces], columns.
    gradients, weights: [1, 64, 64], of all heads. lse, inner: [2, 32]. unseen: [2, 64], -inf where a column of a
    tile is none. steps, window_steps: [2, 1], tiles of a query, and of these the ones over the window.
    """

    heads: Any
    pieces: Any
    gradients: Any
    weights: Any
    lse: Any
    inner: Any
    unseen: Any
    steps: Any
    window_steps: Any
    heads_loaded: Any
    heads_read: Any
    full: Any
    empty: Any
    unseen_done: Any
    pairs_done: Any
    pairs_read: Any
    steps_done: Any


class Rows(NamedTuple):
    """Tensors in device memory that have rows for each query: what is known, and the results."""

    q_THK: Any
    do_THK: Any
    tail_THR: Any
    stride: Any
    o_THK: Any
    lse_TH: Any
    dq_THK: Any
    inner_TH: Any
    rows_tMBK: Any


@gluon.constexpr_function
def _pieces(K):
    """Into how many pieces a tile is cut; they are at least 64 columns wide."""
    return 4 if K >= 256 else 2


@gluon.constexpr_function
def _places(K, ENTRIES):
    """For how many pieces there is room: one more when no weights are needed."""
    return _pieces(K) + (ENTRIES != "picked")


@gluon.jit
def _place(tiles, p: gl.constexpr, K: gl.constexpr, ENTRIES: gl.constexpr):
    """Where piece p of a tile goes when `tiles` came before, and the phase of its mbarriers."""
    number = (tiles & 0xFFFFFFF) * _pieces(K) + p  # what is not negative is divided in fewer steps
    PLACES: gl.constexpr = _places(K, ENTRIES)
    return number % PLACES, (number // PLACES) & 1


@gluon.jit
def _load_columns(s, rows, sources, start, items, H, K: gl.constexpr, ENTRIES: gl.constexpr):
    """The loader of `bwd_queries`."""
    WIDTH: gl.constexpr = K // _pieces(K)
    row = gl.arange(0, 64, COPY_ROWS)
    count, tiles = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        t, head = query(item, start, H)
        picture = look(t, sources, K, ENTRIES)
        steps = steps_of(picture)
        nothing = gl.full([1], 0, gl.int32, SCALAR)
        s.steps.index(count % 2).store(nothing + steps)
        s.window_steps.index(count % 2).store(nothing + gl.cdiv(picture.window, 64))
        tell(s.steps_done.index(count % 2))
        for step in range(0, steps):
            number = numbers(picture, step, ENTRIES)
            rows_R = pointers(picture, step, number, K, ENTRIES)
            for p in gl.static_range(_pieces(K)):
                place, phase = _place(tiles, p, K, ENTRIES)
                mbarrier.wait(s.empty.index(place), phase ^ 1)
                copy(s.pieces.index(place), rows_R, number >= 0, p * WIDTH, s.full.index(place))
            s.unseen.index(tiles % 2).store(gl.where(number >= 0, 0.0, float("-inf")))
            tell(s.unseen_done.index(tiles % 2))
            tiles += 1
            if step == 0:
                # Behind the columns, which need not wait until the last query has gone.
                first = t * H + head + row % 32
                heads_R = gl.where(row < 32, rows.q_THK, rows.do_THK) + first * K
                stride = gl.where(row < 32, K, rows.stride)
                tails_R = gl.where(row < 32, rows.q_THK, rows.tail_THR) + first * stride + (stride - TAIL)
                for p in gl.static_range(_pieces(K)):
                    mbarrier.wait(s.heads_read.index(p), (count + 1) & 1)
                    for r in gl.static_range(2):
                        target = s.heads.index(0).slice(64 * r, 64, 0).slice(p * WIDTH, WIDTH, 1)
                        real = head + 32 * r + row % 32 < H
                        heads, tails = heads_R + 32 * r * K, tails_R + 32 * r * stride
                        _copy_heads(target, heads, tails, real, p * WIDTH, s.heads_loaded.index(p), K)
                if ENTRIES != "picked":
                    _prefetch_heads(rows, item + gl.num_programs(0), start, items, H, K)
        if ENTRIES == "picked":
            # Not before: the rows of picks would drive them out of the cache again.
            _prefetch_heads(rows, item + gl.num_programs(0), start, items, H, K)
        count += 1


@gluon.jit
def _prefetch_heads(rows, item, start, items, H, K: gl.constexpr):
    if item < items:
        t, head = query(item, start, H)
        prefetch(rows.q_THK + (t * H + head) * K, H - head, K)
        prefetch(rows.do_THK + (t * H + head) * K, H - head, K)
        prefetch(rows.o_THK + (t * H + head) * K, H - head, K)


@gluon.jit
def _known_of_heads(s, rows, first, real, W: gl.constexpr, K: gl.constexpr):
    """inner = do . o, and lse, of 32 heads from row `first` of [T H] on."""
    row = gl.arange(0, 32, COPY_ROWS)
    inner = gl.zeros([32], gl.float32, COPY_ROWS)
    for at in gl.static_range(0, K, 64):
        here = first * K + (row * K)[:, None] + (at + gl.arange(0, 64, gl.SliceLayout(0, COPY)))[None, :]
        do = gl.load(rows.do_THK + here, mask=(row < real)[:, None], other=0.0).to(gl.float32)
        o = gl.load(rows.o_THK + here, mask=(row < real)[:, None], other=0.0).to(gl.float32)
        inner += gl.sum(do * o, 1)
    gl.store(rows.inner_TH + first + row, inner, mask=row < real)
    s.inner.index(W).store(inner)
    s.lse.index(W).store(gl.load(rows.lse_TH + first + row, mask=row < real, other=0.0) * LOG2_E)
    barrier()


@gluon.jit
def _weigh(s, step, tiles, count, scale, W: gl.constexpr, K: gl.constexpr, ENTRIES: gl.constexpr):
    """Gradients, and with picks weights, of a tile: this multiplier makes its half, then it waits for the other."""
    WIDTH: gl.constexpr = K // _pieces(K)
    dtype: gl.constexpr = s.gradients.dtype
    zero = unknown_zero(tiles)
    products = gl.zeros([64, 64], gl.float32, PRODUCT)
    heads = s.heads.index(zero).slice(64 * W, 64, 0)
    for p in gl.static_range(_pieces(K)):
        place, phase = _place(tiles, p, K, ENTRIES)
        mbarrier.wait(s.heads_loaded.index(p), count & 1, pred=step == 0)
        mbarrier.wait(s.full.index(place), phase)
        fence_async_shared()
        piece = heads.slice(p * WIDTH, WIDTH, 1).permute([1, 0])
        products = warpgroup_mma(s.pieces.index(place + zero), piece, products, use_acc=p > 0, is_async=True)
    mbarrier.wait(s.unseen_done.index(tiles % 2), (tiles // 2) & 1)
    HALF: gl.constexpr = _halves(gl.zeros([64, 64], gl.float32, PRODUCT))[0].type.layout
    lse = s.lse.index(W).load(gl.SliceLayout(0, HALF))
    inner = s.inner.index(W).load(gl.SliceLayout(0, HALF))
    unseen = s.unseen.index(tiles % 2).load(gl.SliceLayout(1, HALF))
    lse = lse[None, :] - unseen[:, None]  # infinite where nothing is seen, so that the weight is 0
    weights, gradients = _gradients(warpgroup_mma_wait(0, [products]), lse, inner, scale)
    mbarrier.wait(s.pairs_read.index(1 - W), (tiles + 1) & 1)
    s.gradients.index(0).slice(32 * W, 32, 1).store(gradients.to(dtype))
    if ENTRIES == "picked":
        s.weights.index(0).slice(32 * W, 32, 1).store(weights.to(dtype))
    fence_async_shared()
    tell(s.pairs_done.index(W))
    mbarrier.wait(s.pairs_done.index(1 - W), tiles & 1)


@gluon.jit
def _add_to_dq(s, dq, tiles, W: gl.constexpr, K: gl.constexpr, ENTRIES: gl.constexpr):
    """dq + g columns for the pieces of this multiplier, in flight."""
    zero = unknown_zero(tiles)
    added = ()
    for p in gl.static_range(len(dq)):
        piece = s.pieces.index(_place(tiles, W * len(dq) + p, K, ENTRIES)[0] + zero)
        added += (warpgroup_mma(s.gradients.index(zero).permute([1, 0]), piece, dq[p], is_async=True),)
    return added


@gluon.jit
def _dq_landed(s, flying, behind: gl.constexpr, tiles, W: gl.constexpr, K: gl.constexpr, ENTRIES: gl.constexpr):
    """The sums when they have landed; each piece of columns is handed back at once. behind: products under way that
    began later."""
    dq = ()
    for p in gl.static_range(len(flying)):
        dq += (warpgroup_mma_wait(len(flying) - 1 - p + behind, [flying[p]]),)
        tell(s.empty.index(_place(tiles, W * len(flying) + p, K, ENTRIES)[0]))
    return dq


@gluon.jit
def _rows_of_picks(s, zero, piece: gl.constexpr, WIDTH: gl.constexpr):
    """A piece of g^T q + w^T do for the columns of a tile, in flight."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    heads = s.heads.index(zero).slice(piece * WIDTH, WIDTH, 1)
    sums = gl.zeros([64, WIDTH], gl.float32, LAYOUT)
    for h in gl.static_range(2):
        gradients = s.gradients.index(zero).slice(32 * h, 32, 1)
        weights = s.weights.index(zero).slice(32 * h, 32, 1)
        sums = warpgroup_mma(gradients, heads.slice(64 * h, 32, 0), sums, use_acc=h > 0, is_async=True)
        sums = warpgroup_mma(weights, heads.slice(64 * h + 32, 32, 0), sums, is_async=True)
    return sums


@gluon.jit
def _as_it_lies(x):
    """The columns in the order in which the registers of a product have them, so that `store` has nothing to move.
    `in_order` undoes it, for the sums: there that is cheaper than for each of their rows."""
    WIDTH: gl.constexpr = x.shape[1]
    return x.reshape([64, WIDTH // 32, 4, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([64, WIDTH])


def tails(do_THK: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """Where the scores find the last columns of do when o was turned back by `rotation`: turned forth, or in do itself
    without a rotation. None for a rotation of another width."""
    if rotation is None:
        return do_THK
    if 2 * rotation[0].shape[1] != TAIL.value:
        return None
    return rotate(do_THK[..., -TAIL.value :].contiguous(), *rotation, False)


def in_order(sums_CK: Tensor) -> Tensor:
    """The columns of sums of rows of picks in their own order again."""
    return sums_CK.unflatten(1, (-1, 4, 4, 2)).transpose(2, 3).flatten(1)


@gluon.jit
def _sum_columns(s, rows, start, items, H, M, scale, W: gl.constexpr, K: gl.constexpr, ENTRIES: gl.constexpr):
    """The multiplier W of `bwd_queries`: heads 32 W to 32 W + 31, and the columns of the sums from W K/2 on."""
    WIDTH: gl.constexpr = K // _pieces(K)
    OWN: gl.constexpr = _pieces(K) // 2
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    OUT: gl.constexpr = gl.SliceLayout(1, rows_layout(WIDTH))
    count, tiles = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        t, head = query(item, start, H)
        _known_of_heads(s, rows, t * H + head + 32 * W, H - head - 32 * W, W, K)
        mbarrier.wait(s.steps_done.index(count % 2), (count // 2) & 1)
        steps = gl.max(s.steps.index(count % 2).load(SCALAR), 0)
        window_steps = gl.max(s.window_steps.index(count % 2).load(SCALAR), 0)
        dq = ()
        for p in gl.static_range(OWN):
            dq += (gl.zeros([64, WIDTH], gl.float32, SUM),)
        for step in range(0, steps):
            _weigh(s, step, tiles, count, scale, W, K, ENTRIES)
            last = step + 1 == steps
            if ENTRIES == "picked" and step >= window_steps:
                blocks = gl.cdiv(H, 64)
                out = rows.rows_tMBK + (((t - start) * M + (step - window_steps) * 64) * blocks + head // 64) * K
                at = gl.arange(0, 64, OUT) * blocks
                real = s.unseen.index(tiles % 2).load(OUT) == 0.0
                # First dq, so that the next columns have the time of the rows to come.
                flying = _add_to_dq(s, dq, tiles, W, K, ENTRIES)
                piece = _rows_of_picks(s, unknown_zero(tiles), W * OWN, WIDTH)
                dq = _dq_landed(s, flying, 4, tiles, W, K, ENTRIES)
                for p in gl.static_range(OWN):
                    landed = warpgroup_mma_wait(0, [piece])
                    if last:
                        tell(s.heads_read.index(W * OWN + p))
                    if p + 1 == OWN:
                        tell(s.pairs_read.index(W))
                    store(out, at, real, (W * OWN + p) * WIDTH, _as_it_lies(landed), K)
                    if p + 1 < OWN:
                        piece = _rows_of_picks(s, unknown_zero(tiles), W * OWN + p + 1, WIDTH)
            else:
                if last:
                    for p in gl.static_range(OWN):
                        tell(s.heads_read.index(W * OWN + p))
                dq = _dq_landed(s, _add_to_dq(s, dq, tiles, W, K, ENTRIES), 0, tiles, W, K, ENTRIES)
                tell(s.pairs_read.index(W))
            tiles += 1
        row = gl.arange(0, 64, OUT)
        for p in gl.static_range(OWN):
            store(rows.dq_THK + (t * H + head) * K, row, head + row < H, (W * OWN + p) * WIDTH, dq[p], K)
        count += 1


@gluon.jit(do_not_specialize=["start"])
def sparse_attention_bwd_queries_hopper_kernel(
    q_THK, do_THK, tail_THR, stride, o_THK, keys_XK, entries_CK, picked_TM,
    first_key_T, last_key_T, first_entry_T, visible_T, lse_TH,
    dq_THK, inner_TH, rows_tMBK, start, items, H, M, scale,
    K: gl.constexpr, ENTRIES: gl.constexpr,
):  # fmt: skip
    """dq, and inner = do . o, which a rotation of both does not change. items: queries from `start` on x blocks of 64
    heads. tail_THR: where the last columns of do are, at the end of rows of `stride` values. With picks also `rows`:
    what each pick contributes to the gradient of its entry, summed over 64 heads; B blocks of heads."""
    dtype: gl.constexpr = q_THK.dtype.element_ty
    PLACES: gl.constexpr = _places(K, ENTRIES)
    s = Queries(
        heads=gl.allocate_shared_memory(dtype, [1, 128, K], SHARED),
        pieces=gl.allocate_shared_memory(dtype, [PLACES, 64, K // _pieces(K)], SHARED),
        gradients=gl.allocate_shared_memory(dtype, [1, 64, 64], SHARED),
        weights=gl.allocate_shared_memory(dtype, [1, 64 if ENTRIES == "picked" else 8, 64], SHARED),
        lse=gl.allocate_shared_memory(gl.float32, [2, 32], VECTOR),
        inner=gl.allocate_shared_memory(gl.float32, [2, 32], VECTOR),
        unseen=gl.allocate_shared_memory(gl.float32, [2, 64], VECTOR),
        steps=gl.allocate_shared_memory(gl.int32, [2, 1], VECTOR),
        window_steps=gl.allocate_shared_memory(gl.int32, [2, 1], VECTOR),
        heads_loaded=new_mbarriers(_pieces(K), 256),
        heads_read=new_mbarriers(_pieces(K), 1),
        full=new_mbarriers(PLACES, 128),
        empty=new_mbarriers(PLACES, 1),
        unseen_done=new_mbarriers(2, 1),
        pairs_done=new_mbarriers(2, 1),
        pairs_read=new_mbarriers(2, 1),
        steps_done=new_mbarriers(2, 1),
    )
    barrier()
    sources = Sources(keys_XK, entries_CK, picked_TM, first_key_T, last_key_T, first_entry_T, visible_T, M)
    rows = Rows(q_THK, do_THK, tail_THR, stride, o_THK, lse_TH, dq_THK, inner_TH, rows_tMBK)
    gl.warp_specialize(
        [
            (_sum_columns, (s, rows, start, items, H, M, scale, 0, K, ENTRIES)),
            (_sum_columns, (s, rows, start, items, H, M, scale, 1, K, ENTRIES)),
            (_load_columns, (s, rows, sources, start, items, H, K, ENTRIES)),
        ],
        [4, 4],
        [232, 48],  # two sums in registers
    )
