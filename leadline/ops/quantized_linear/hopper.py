"""Quantised products for Hopper, in Gluon: one kernel for both formats, dense and grouped, for one token and thousands.

The product is computed transposed, y^T = W x^T: 64 rows of the weight are what a matrix instruction of a warp group
takes at least, while its other side may be 16 tokens as well as 128. So one token wastes nothing, and every number of
tokens runs the same instructions over the slabs in the same order: a row's result does not depend on its batch.

FLOPs are the floor for many tokens, 2 T O N of them at the rate of eight-bit matrix units; the bytes of the weight for
few, O N for FP8 and 17 / 32 of it for FP4. A program therefore is a pipeline of three parts that run at once:

- One warp copies: it asks the copy engine (TMA) for the next slab of weight, activations and their scales, or, for few
  tokens, the next DEPTH of them, as long as one of the STAGES buffers is free.
- One or two warp groups multiply, each 64 rows of the weight with all tokens of the tile: a slab of 128 columns in the
  matrix units, then scaled and added to FP32 sums in registers. While one group adds, the other has the matrix units,
  which is why tiles have two groups where there are enough of them; for few tokens one group makes twice the programs,
  and works on the codes of one slab of a buffer while the matrix units have the one before.

Programs are persistent: each takes every so-manyth tile, and the copies for its next tile begin while it stores the
last one. In a grouped product the kernel that rounds the activations (`round_kernel.py`) lists the tiles, because only
the device knows how many rows an expert has.

An FP4 weight comes as bytes and is turned into E4M3 in registers. Eight codes of a sub-block are looked up in a table
of eight bytes, the E4M3 codes of the E2M1 magnitudes times sub-scale / block scale, by byte permutations; a difference
of d in the exponents subtracts d from the exponent field of all entries but zero. The magnitude bits of a nibble are
the index, and its sign bit drives the sign replication of a second permutation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from leadline.ops.early_start import starts_early
from leadline.ops.quantized_linear.round_kernel import Activations, Weight

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # as Triton 3.6 calls it

SLAB = gl.constexpr(128)  # columns that share a scale
ROWS = gl.constexpr(64)  # of the weight, for one warp group
CODES = gl.constexpr(gl.NVMMASharedLayout(128, 8))
PAIRS = gl.constexpr(gl.NVMMASharedLayout(64, 8))
SCALES = gl.constexpr(gl.NVMMASharedLayout(0, 32, 1))
# Bytes of a slab of FP4, [64, 64]: a thread has the 16 bytes of one sub-block of a row, and of the row eight below.
WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]],
        [[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 64],
    )
)
# Two words of E4M3 codes, $0 and $1, for one of E2M1 pairs, $2, with the table in $3 and $7.
LOOK_UP = gl.constexpr("""{
    .reg .b32 low, high, later, first, second, minus, minus2, mask;
    mov.b32 mask, 0x80808080;
    and.b32 low, $2, 0x77777777;
    shr.u32 high, low, 16;
    shr.u32 later, $2, 16;
    prmt.b32 first, $3, $7, low;
    prmt.b32 second, $3, $7, high;
    prmt.b32 minus, mask, mask, $2;
    prmt.b32 minus2, mask, mask, later;
    shl.b32 minus, minus, 1;
    shl.b32 minus2, minus2, 1;
    lop3.b32 $0, first, minus, mask, 0xF8;
    lop3.b32 $1, second, minus2, mask, 0xF8;
}""")


@gluon.jit
def _entry(tiles, number, max_tiles, O, HEIGHT: gl.constexpr, MATRICES: gl.constexpr):  # noqa: E741
    """Fields of the list of tiles for tile `number` of the product; of a grouped product alone."""
    if tiles is None:
        return 0, 0, 0, 0
    else:
        entry = tiles + 4 + gl.minimum(number // MATRICES // (O // HEIGHT), max_tiles - 1) * 4
        return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 3)


@gluon.jit
def _number_of_tiles(tiles, max_tiles, O, HEIGHT: gl.constexpr, MATRICES: gl.constexpr):  # noqa: E741
    if tiles is None:
        return max_tiles * (O // HEIGHT) * MATRICES
    else:
        return gl.load(tiles) * (O // HEIGHT) * MATRICES


@gluon.jit
def _tile(
    entry, tiles, number, max_tiles, T, O, TOKENS: gl.constexpr, HEIGHT: gl.constexpr, MATRICES: gl.constexpr  # noqa: E741
):  # fmt: skip
    """Where a tile is: first row of the weight in its stack, first row of the tile in its matrix, first token, and the
    tokens begin .. end - 1 that are stored."""
    rows = O // HEIGHT
    number = number // MATRICES
    if tiles is None:
        # Eight tiles of tokens walk down the weight together, so that both stay in the cache.
        group = number // (8 * rows)
        width = gl.minimum(max_tiles - group * 8, 8)
        within = number - group * 8 * rows
        row = within // width * HEIGHT
        token = (group * 8 + within % width) * TOKENS
        return row, row, token, token, gl.minimum(token + TOKENS, T)
    else:
        expert, token, begin, end = entry
        row = number % rows * HEIGHT
        return expert * O + row, row, token, begin, end


@gluon.jit
def _copy(
    weight, other_weight, x, x_scale, w_tiles, x_tiles, scale_tiles, full, empty, tiles, max_tiles, T, stride, O, N,  # noqa: E741
    TOKENS: gl.constexpr, HEIGHT: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr, MATRICES: gl.constexpr,
):  # fmt: skip
    """Fill the buffers, DEPTH slabs after each other and tile after tile, as they become free."""
    WIDTH: gl.constexpr = w_tiles.shape[2]
    SIZE: gl.constexpr = DEPTH * (HEIGHT * WIDTH + TOKENS * SLAB + 4 * scale_tiles.shape[1])
    count = 0
    first, step = gl.program_id(0), gl.num_programs(0)
    entry = _entry(tiles, first, max_tiles, O, HEIGHT, MATRICES)
    for number in range(first, _number_of_tiles(tiles, max_tiles, O, HEIGHT, MATRICES), step):
        row, _, token, _, _ = _tile(entry, tiles, number, max_tiles, T, O, TOKENS, HEIGHT, MATRICES)
        entry = _entry(tiles, number + step, max_tiles, O, HEIGHT, MATRICES)
        for first_slab in range(0, N // SLAB, DEPTH):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), (count // STAGES + 1) & 1)
            ready = full.index(stage)
            mbarrier.expect(ready, SIZE)
            for place in gl.static_range(DEPTH):
                slab, buffer = first_slab + place, stage * DEPTH + place
                if number % MATRICES == 0:
                    tma.async_copy_global_to_shared(weight, [row, slab * WIDTH], ready, w_tiles.index(buffer))
                else:
                    tma.async_copy_global_to_shared(other_weight, [row, slab * WIDTH], ready, w_tiles.index(buffer))
                tma.async_copy_global_to_shared(x, [token, slab * SLAB], ready, x_tiles.index(buffer))
                tma.async_copy_global_to_shared(x_scale, [slab * stride + token], ready, scale_tiles.index(buffer))
            count += 1


@gluon.jit
def _scale(scale, at):
    """A scale in float32, which may be stored as E8M0."""
    value = gl.load(scale + at)
    if scale.dtype.element_ty == gl.uint8:
        bits = gl.where(value == 0, 1 << 22, value.to(gl.int32) << 23)
        return bits.to(gl.float32, bitcast=True)
    else:
        return value


@gluon.jit
def _codes(pairs, sub_scale, block_scale, OPERAND: gl.constexpr):
    """E4M3 codes [64, 128] of a slab of FP4, [64, 64] in shared memory, in the order of columns that `_place` in
    `round_kernel.py` gives the activations. sub_scale: E8M0 [64, 4]."""
    words = pairs.load(WORDS)
    # 6 is the headroom of the block scale. Sub-blocks of zeros may have any scale.
    difference = (block_scale.to(gl.int32, bitcast=True) >> 23) + 6 - sub_scale.to(gl.int32)
    difference = gl.minimum(gl.maximum(difference, 0), 11)
    low = (0x6C686000 - difference * 0x08080800)[:, :, None].broadcast_to([64, 4, 16]).reshape([64, 64])
    high = (0x7C787470 - difference * 0x08080808)[:, :, None].broadcast_to([64, 4, 16]).reshape([64, 64])
    low, high = gl.convert_layout(low, WORDS, assert_trivial=True), gl.convert_layout(high, WORDS, assert_trivial=True)
    first, second = gl.inline_asm_elementwise(
        LOOK_UP, "=r,=r,r,r,r,r,r,r,r,r,r", [words, low, high], (gl.int8, gl.int8), True, 4
    )
    both = gl.join(first, second).reshape([64, 4, 4, 4, 2]).permute([0, 2, 4, 1, 3]).reshape([64, 128])
    return gl.convert_layout(both, OPERAND, assert_trivial=True).to(gl.float8e4nv, bitcast=True)


@gluon.jit
def _multiply(
    y, other_y, w_scale, other_w_scale, sub_scale, other_sub_scale,
    w_tiles, x_tiles, scale_tiles, full, empty, tiles, max_tiles, T, O, N,  # noqa: E741
    GROUP: gl.constexpr, TOKENS: gl.constexpr, HEIGHT: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr,
    MATRICES: gl.constexpr,
):  # fmt: skip
    """Rows 64 GROUP .. 64 GROUP + 63 of every tile."""
    CHUNK: gl.constexpr = min(TOKENS, 128)  # tokens of one matrix instruction
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4)
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    FP4: gl.constexpr = sub_scale is not None
    if FP4:
        SUB: gl.constexpr = gl.zeros([64, 64], gl.int8, WORDS).reshape([64, 4, 16]).type.layout
        sub_row = gl.arange(0, 64, gl.SliceLayout(1, gl.SliceLayout(2, SUB)))
        sub = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, SUB)))
    slabs = N // SLAB
    count = 0
    start, step = gl.program_id(0), gl.num_programs(0)
    entry = _entry(tiles, start, max_tiles, O, HEIGHT, MATRICES)
    for number in range(start, _number_of_tiles(tiles, max_tiles, O, HEIGHT, MATRICES), step):
        row, out_row, token, begin, end = _tile(entry, tiles, number, max_tiles, T, O, TOKENS, HEIGHT, MATRICES)
        entry = _entry(tiles, number + step, max_tiles, O, HEIGHT, MATRICES)
        row = row + ROWS * GROUP
        out_row = out_row + ROWS * GROUP
        first = gl.zeros([ROWS, CHUNK], gl.float32, SUMS)
        second = first
        # Scales that no copy brings are loaded two buffers ahead.
        scales = gl.where(number % MATRICES == 0, w_scale, other_w_scale) + (row // 128).to(gl.int64) * slabs
        subs = sub_scale
        if FP4:
            subs = gl.where(number % MATRICES == 0, sub_scale, other_sub_scale)
            subs = subs + ((row + sub_row).to(gl.int64) * slabs * 4)[:, None] + sub[None, :]
        these, those = _scales(scales, subs, 0, slabs, DEPTH), _scales(scales, subs, DEPTH, slabs, DEPTH)
        for slab in range(0, slabs, DEPTH):
            later = _scales(scales, subs, slab + 2 * DEPTH, slabs, DEPTH)
            stage = count % STAGES
            mbarrier.wait(full.index(stage), (count // STAGES) & 1)
            products = ()
            for place in gl.static_range(DEPTH):
                buffer = stage * DEPTH + place
                a = w_tiles.index(buffer).slice(ROWS * GROUP, ROWS)
                if FP4:
                    a = _codes(a, these[1][place], these[0][place], OPERAND)
                products = products + (_product(a, x_tiles.index(buffer), 0, CHUNK, SUMS),)
            first = _add(first, products, scale_tiles, stage * DEPTH, these[0], 0, CHUNK)
            if TOKENS > CHUNK:  # and then DEPTH is 1
                products = (_product(a, x_tiles.index(stage), CHUNK, CHUNK, SUMS),)
                second = _add(second, products, scale_tiles, stage, these[0], CHUNK, CHUNK)
            # A barrier does not wait for loads on their way, and the copy engine could be faster than they are.
            fence_async_shared()
            barrier()
            mbarrier.arrive(empty.index(stage), count=1)
            count += 1
            these, those = those, later

        o = out_row + gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
        t = token + gl.arange(0, CHUNK, gl.SliceLayout(0, OUT))
        target = gl.where(number % MATRICES == 0, y, other_y)
        _store(target, first, o, t, begin, end, O, OUT)
        if TOKENS > CHUNK:
            _store(target, second, o, t + CHUNK, begin, end, O, OUT)


@gluon.jit
def _scales(scales, subs, slab, slabs, DEPTH: gl.constexpr):
    """Scales, and of FP4 sub-scales, of DEPTH slabs of a weight, or of its last."""
    block, sub = (), ()
    for place in gl.static_range(DEPTH):
        at = gl.minimum(slab + place, slabs - 1)
        block = block + (_scale(scales, at),)
        if subs is not None:
            sub = sub + (gl.load(subs + at * 4),)
    return block, sub


@gluon.jit
def _product(a, x_tile, START: gl.constexpr, CHUNK: gl.constexpr, SUMS: gl.constexpr):
    """Begin a x^T of tokens START .. START + CHUNK - 1."""
    b = x_tile.slice(START, CHUNK).permute([1, 0])
    zeros = gl.zeros([ROWS, CHUNK], gl.float32, SUMS)
    return warpgroup_mma(a, b, zeros, use_acc=False, max_num_imprecise_acc=SLAB, is_async=True)


@gluon.jit
def _add(sums, products, scale_tiles, buffer, w_scale, START: gl.constexpr, CHUNK: gl.constexpr):
    """sums + product x scales of each buffer, one after the other."""
    for place in gl.static_range(len(products)):
        product = warpgroup_mma_wait(len(products) - 1 - place, [products[place]])
        scale = scale_tiles.index(buffer + place).slice(START, CHUNK).load(gl.SliceLayout(0, sums.type.layout))
        sums = sums + product * (scale * w_scale[place])[None, :]
    return sums


@gluon.jit
def _store(y, sums, o, t, begin, end, O, OUT: gl.constexpr):  # noqa: E741
    values = gl.convert_layout(sums.to(y.dtype.element_ty), OUT)
    pointers = y + t.to(gl.int64)[None, :] * O + o[:, None]
    gl.store(pointers, values, mask=((t >= begin) & (t < end))[None, :])


@gluon.jit(do_not_specialize=["max_tiles", "T", "stride"])
def quantized_linear_fwd_hopper_kernel(
    weight, other_weight, x, x_scale, y, other_y, w_scale, other_w_scale, sub_scale, other_sub_scale,
    tiles, max_tiles, T, stride, O, N,  # noqa: E741
    TOKENS: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr, MATRICES: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """y [T, O] = x W^T for one or two MATRICES of the same shape; the second is given as `other`, or the first again.

    weight, x, x_scale: descriptors of the codes of the weight [E O, N] or their pairs [E O, N / 2], of the activations
    [T, N] and of their scales, one row of `stride` for each slab. w_scale: of the blocks, float32 or E8M0. sub_scale:
    E8M0 bytes [E O, N / 32] of an FP4 weight, or None. tiles: the list of a grouped product (`round_kernel.py`), or
    None; at most, or exactly, `max_tiles` of TOKENS tokens. GROUPS: warp groups of 64 rows. DEPTH: slabs of a buffer.
    """
    if EARLY:
        gdc_launch_dependents()
    HEIGHT: gl.constexpr = ROWS * GROUPS
    w_tiles = gl.allocate_shared_memory(weight.dtype, [STAGES * DEPTH, HEIGHT, weight.block_shape[1]], weight.layout)
    x_tiles = gl.allocate_shared_memory(x.dtype, [STAGES * DEPTH, TOKENS, SLAB], x.layout)
    scale_tiles = gl.allocate_shared_memory(gl.float32, [STAGES * DEPTH, x_scale.block_shape[0]], SCALES)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    fence_async_shared()
    if EARLY:
        gdc_wait()
    barrier()
    # Tuples with constants in them keep these only where they are written.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (
                    y, other_y, w_scale, other_w_scale, sub_scale, other_sub_scale,
                    w_tiles, x_tiles, scale_tiles, full, empty, tiles, max_tiles, T, O, N,
                    0, TOKENS, HEIGHT, STAGES, DEPTH, MATRICES,
                )),
                (_multiply, (
                    y, other_y, w_scale, other_w_scale, sub_scale, other_sub_scale,
                    w_tiles, x_tiles, scale_tiles, full, empty, tiles, max_tiles, T, O, N,
                    1, TOKENS, HEIGHT, STAGES, DEPTH, MATRICES,
                )),
                (_copy, (
                    weight, other_weight, x, x_scale, w_tiles, x_tiles, scale_tiles, full, empty,
                    tiles, max_tiles, T, stride, O, N, TOKENS, HEIGHT, STAGES, DEPTH, MATRICES,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (
                    y, other_y, w_scale, other_w_scale, sub_scale, other_sub_scale,
                    w_tiles, x_tiles, scale_tiles, full, empty, tiles, max_tiles, T, O, N,
                    0, TOKENS, HEIGHT, STAGES, DEPTH, MATRICES,
                )),
                (_copy, (
                    weight, other_weight, x, x_scale, w_tiles, x_tiles, scale_tiles, full, empty,
                    tiles, max_tiles, T, stride, O, N, TOKENS, HEIGHT, STAGES, DEPTH, MATRICES,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip


MOST_STAGES = 8
FEW_TOKENS = 32  # of a tile: the weight's bytes are all that counts
FEW_TOKENS_DEPTH = 2  # with which the registers of four programs suffice
SHARED_BYTES = 220 * 1024  # of a processor, for buffers
REGISTERS = {1: None, 2: 128, 4: 64}  # of a thread, by the programs side by side on a processor


def takes(rows: int, width: int) -> bool:
    """Whether the kernel multiplies matrices of this shape: whole blocks of scales."""
    return rows % 128 == 0 and width % 128 == 0


def tokens_of_a_tile(num_rows: int, experts: int) -> int:
    """Tokens of a tile, a power of two from 16 to 256. Experts have more rows than the average as often as fewer, and
    half as many again suit most of them."""
    average = num_rows * 3 // (2 * experts) if experts else num_rows
    return min(max(triton.next_power_of_2(average), 16), 256)


def multiply(rounded: Activations, weights: Sequence[Weight], results_TO: Sequence[Tensor]) -> None:
    """y = x W^T for each weight, with activations that are permuted when the weights are FP4."""
    few = rounded.tokens <= FEW_TOKENS and rounded.tiles is not None
    if few and len(weights) == 2 and results_TO[0].shape == results_TO[1].shape:
        # w1 and w3 of experts: twice as many tiles fill the processors better, and begin and end once. With many
        # tokens the two matrices would only push each other out of the cache.
        _launch(rounded, weights, results_TO)
    else:
        for weight, y_TO in zip(weights, results_TO, strict=True):
            _launch(rounded, [weight], [y_TO])


def _launch(rounded: Activations, weights: Sequence[Weight], results_TO: Sequence[Tensor]) -> None:
    (num_rows, rows), width = results_TO[0].shape, rounded.codes.shape[1]
    fp4, matrices, processors = weights[0].sub_scale is not None, len(weights), _processors(results_TO[0].device)
    tokens, tiles = rounded.tokens, rounded.max_tiles
    if rounded.tiles is None:
        # Fewer tokens a tile, rather than processors without one.
        while tokens > 128 and matrices * rows // 128 * triton.cdiv(num_rows, tokens) < processors:
            tokens //= 2
        tiles = triton.cdiv(num_rows, tokens)
    groups = 2 if tokens >= 64 and matrices * rows // 128 * tiles >= processors else 1
    height = ROWS.value * groups
    number = matrices * rows // height * tiles
    programs = 1 if groups == 2 else 4 if tokens <= FEW_TOKENS and number > 2 * processors else 2
    columns = SLAB.value // 2 if fp4 else SLAB.value  # bytes of a slab of the weight
    stage_bytes = height * columns + tokens * SLAB.value + 4 * max(tokens, 32)
    depth = FEW_TOKENS_DEPTH if tokens <= FEW_TOKENS and width % (FEW_TOKENS_DEPTH * SLAB.value) == 0 else 1
    stages = min(MOST_STAGES, SHARED_BYTES // programs // stage_bytes) // depth
    codes = [weight.codes.flatten(0, -2) for weight in weights]
    if not fp4:
        codes = [one.view(torch.float8_e4m3fn) for one in codes]
    layout = PAIRS.value if fp4 else CODES.value
    first, second, early = weights[0], weights[-1], starts_early(results_TO[0].device)
    quantized_linear_fwd_hopper_kernel[(min(number, programs * processors),)](
        TensorDescriptor.from_tensor(codes[0], [height, columns], layout),
        TensorDescriptor.from_tensor(codes[-1], [height, columns], layout),
        TensorDescriptor.from_tensor(rounded.codes.view(torch.float8_e4m3fn), [tokens, SLAB.value], CODES.value),
        # The copy engine writes to multiples of 128 bytes.
        TensorDescriptor.from_tensor(rounded.scale.flatten(), [max(tokens, 32)], SCALES.value),
        results_TO[0], results_TO[-1], first.block_scale, second.block_scale, first.sub_scale, second.sub_scale,
        rounded.tiles, tiles, num_rows, rounded.scale.shape[1], rows, width, tokens, groups, stages, depth, matrices,
        early, launch_pdl=early, num_warps=4, maxnreg=REGISTERS[programs],
    )  # fmt: skip


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
