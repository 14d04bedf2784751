"""Index scores of single queries for Hopper, in Gluon: the scores kernel of `kernel.py` with layouts chosen by hand.

The first operand of a product may come from registers, where four threads have a row of it: thread i the values 2i,
2i + 1, 2i + 8 and 2i + 9 of every 16. In memory a packed key is four times 16 bytes with one scale each. A product does
not ask for an order of the values it sums up, as long as both operands have the same. So thread i takes the i-th 16
bytes and the i-th scale, and what it decodes stands where the matrix unit wants it; only the query, once in a program,
is put into the same order. Nothing of a key ever moves between threads or through shared memory.

A word of four bytes has eight codes, and two bfloat16 fit into one register: code n goes to the lower half and code
n + 4 to the upper one, by one shift for both, with its sign at the top and the other three bits across exponent and
mantissa. That is the value times 2^-126, and two exact products, with 2^126 and with the scale, make it right.

value  k = 32 i + 8 word + 4 h + n  of quarter i   stands at place   32 word + 8 n + 2 i + h  of a product

The bytes of the next tile are loaded while one is multiplied, and their pages one tile earlier. Programs are small,
four warps, and several share a multiprocessor, so that decoding, products and sums of different tiles overlap.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # as Triton 3.6 calls it

# [pages of a tile, keys of a page, quarters of a key, words of a quarter]: the rows of a warp's threads are those of a
# product.
_LANES = [[0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 0, 2], [0, 8, 0, 0]], _LANES, [[0, 16, 0, 0], [1, 0, 0, 0]], [], [2, 32, 4, 4]
    )
)
QUARTERS = gl.constexpr(gl.SliceLayout(3, WORDS.value))
ROWS = gl.constexpr(gl.SliceLayout(2, QUARTERS.value))
PAGES = gl.constexpr(gl.SliceLayout(1, ROWS.value))
# [keys, quarters, words, values of a word]
VALUES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 1, 0], [0, 0, 2, 0], [8, 0, 0, 0]],
        [[0, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
        [[16, 0, 0, 0], [32, 0, 0, 0]], [], [64, 4, 4, 8],
    )
)  # fmt: skip
PRODUCTS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
OPERAND = gl.constexpr(gl.DotOperandLayout(0, PRODUCTS.value, 2))
KEYS = gl.constexpr(gl.SliceLayout(1, PRODUCTS.value))
QUERY = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))


@gluon.jit
def _pages(pages_NP, tile, visible):
    """The two pages of a tile. Behind the last one that has a visible key it is taken again, so that every address is
    one of the sequence."""
    return gl.load(pages_NP + gl.minimum(2 * tile + gl.arange(0, 2, PAGES), (visible - 1) // 32))


@gluon.jit
def _load(codes, scales, pages):
    """Words [2, 32, 4, 4] and scales [2, 32, 4] of the packed keys of two pages."""
    key = gl.arange(0, 32, gl.SliceLayout(0, ROWS))
    quarter = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, QUARTERS)))
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, WORDS))))
    place = key[None, :].expand_dims(2) * 4 + quarter[None, None, :]
    page = pages.to(gl.int64).expand_dims(1).expand_dims(2)
    words = gl.load((codes + page * 512 + place * 4).expand_dims(3) + word[None, None, None, :])
    return words, gl.load(scales + page * 128 + place).to(gl.int32)


@gluon.jit
def _two(words, n: gl.constexpr):
    """Codes n and n + 4 of each word as two bfloat16, times 2^-126."""
    sign = words << (12 - 4 * n)
    rest = words << (6 - 4 * n) if n < 2 else words >> (4 * n - 6)
    return (sign & -0x7FFF8000) | (rest & 0x01C001C0)


@gluon.jit
def _decode(words, scales):
    """The keys [64, 128] in bfloat16, as the first operand of a product."""
    words, scales = words.reshape([64, 4, 4]), scales.reshape([64, 4])
    two = gl.join(gl.join(_two(words, 0), _two(words, 2)), gl.join(_two(words, 1), _two(words, 3)))
    both = gl.join((two & 0xFFFF).to(gl.int16), (two >> 16).to(gl.int16))
    values = gl.convert_layout(both.reshape([64, 4, 4, 8]), VALUES, assert_trivial=True).to(gl.bfloat16, bitcast=True)
    bits = gl.where(scales == 255, 0x7FC0, gl.maximum(scales << 7, 0x40))
    scale = bits.to(gl.int16).to(gl.bfloat16, bitcast=True)
    scale = gl.convert_layout(scale, gl.SliceLayout(2, gl.SliceLayout(3, VALUES)), assert_trivial=True)
    values = values * gl.full([], 2.0**126, gl.bfloat16) * scale.expand_dims(2).expand_dims(3)
    # [keys, quarter, word, n, h] to [keys, word, n, quarter, h]
    return gl.convert_layout(
        values.reshape([64, 4, 16, 2]).permute([0, 2, 1, 3]).reshape([64, 128]), OPERAND, assert_trivial=True
    )


@gluon.jit
def decode_index_scores_hopper_kernel(
    q_TJI, weight_TJ, codes, scales, pages_NP, sequence_T, visible_T, scores_TC, best_TG, P, M, C, G,
    EARLY: gl.constexpr,
):  # fmt: skip
    """Ordered scores of the keys of one query, and the best of each 16; nothing for a query whose visible entries are
    all picked. 64 heads of 128; codes come as int32."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    t = gl.program_id(1).to(gl.int64)
    visible = gl.load(visible_T + t).to(gl.int32)
    pages_NP += gl.load(sequence_T + t).to(gl.int64) * P
    head = gl.arange(0, 64, gl.SliceLayout(1, QUERY))
    column = gl.arange(0, 128, gl.SliceLayout(0, QUERY))
    query = gl.load(q_TJI + t * 8192 + head[:, None] * 128 + column[None, :])
    weight = gl.load(weight_TJ + t * 64 + gl.arange(0, 64, gl.SliceLayout(0, PRODUCTS))) * 0.5
    if visible <= M:
        return
    step = gl.num_programs(0)
    first = gl.program_id(0)
    words, exponents = _load(codes, scales, _pages(pages_NP, first, visible))
    pages = _pages(pages_NP, first + step, visible)
    q = gl.allocate_shared_memory(gl.bfloat16, [64, 128], gl.NVMMASharedLayout(128, 16))
    # [heads, quarter, word, h, n] to [heads, word, n, quarter, h]
    q.store(query.reshape([64, 4, 4, 2, 4]).permute([0, 2, 4, 1, 3]).reshape([64, 128]))
    fence_async_shared()
    barrier()
    for tile in range(first, gl.cdiv(visible, 64), step):
        keys = _decode(words, exponents)
        words, exponents = _load(codes, scales, pages)
        pages = _pages(pages_NP, tile + 2 * step, visible)
        products = warpgroup_mma(keys, q.permute([1, 0]), gl.zeros([64, 64], gl.float32, PRODUCTS), use_acc=False)
        # Twice the positive part, by an addition: the units that compare are the busiest here.
        score = gl.sum((products + gl.abs(products)) * weight[None, :], 1)
        bits = gl.where(score == 0, 0.0, score).to(gl.int32, bitcast=True)
        ordered = gl.minimum(gl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), -(2**31) + 1), 2**31 - 2)
        key = tile * 64 + gl.arange(0, 64, KEYS)
        ordered = gl.where(key < visible, ordered, -(2**31))
        gl.store(scores_TC + t * C + key, ordered)
        best = gl.max(ordered.reshape([4, 16]), 1)
        gl.store(best_TG + t * G + tile * 4 + gl.arange(0, 4, best.type.layout), best)
