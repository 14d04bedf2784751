"""Kernels of the V3.2 attention layer for decoding, in Triton: rows in eight bits, index scores, latent attention.

They are written like those of leadline's own decoding, and share with them what is the same: how codes become numbers,
the candidates and the choice of the best scores, and the sum over splits. What differs is V3.2's own. An index key has
128 eight-bit codes and one scale, so the matrix units take codes of both sides as they are. A cached latent is 512
eight-bit codes with a scale for each 128, beside 64 rotary values in bfloat16; the key is both, the value the latent
alone.

Floor at a million tokens, one query: 1,048,576 index keys of 132 bytes, 138 MB, 46 us at 3 TB/s, and 17 GFLOP, 11 us of
an H100's eight-bit products. Attention to 2,048 latents of 656 bytes is 0.4 us and 0.6 GFLOP.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.formats import fp8
from leadline.ops.cache_rows.kernel import e4m3_to_float, multiprocessors
from leadline.ops.decode_attention.kernel import decode_attention_combine_kernel
from leadline.ops.decode_indexer.kernel import LOWEST, decode_candidates_kernel, decode_select_kernel, ordered
from leadline.ops.early_start import begin, starts_early

LOG2_E = math.log2(math.e)
TILE, GROUP = 128, 16  # keys
PROGRAMS_PER_MULTIPROCESSOR = 3  # as many as there is shared memory for
PICKED_TILE, HEADS_OF_PROGRAM, MOST_SPLITS = 32, 64, 32
COLUMNS_OF_SUM = 128


# -- rows in eight bits --------------------------------------------------------------------------------------------


@triton.jit
def _scale(amax, LARGEST: tl.constexpr, FLOOR: tl.constexpr):
    """The power of two, FP32, that brings a block with this largest magnitude to at most LARGEST."""
    wanted = (tl.maximum(amax, FLOOR) * (1.0 / LARGEST)).to(tl.int32, bitcast=True)
    return (wanted + 0x7FFFFF & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3_codes(x):
    """Codes of FP32 values of at most 448, rounded to nearest even in integers, which the interpreter does right."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    above = bits & 0x7FFFFFFF
    normal = ((above + 0x7FFFF + ((above >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) & 0x1F  # 2^14 rounds at the smallest subnormal
    return (tl.where(magnitude < 0.015625, subnormal, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def quantize_rows_kernel(
    x, rows_X, codes, scales, X, stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LARGEST: tl.constexpr, FLOOR: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One block of columns of some rows: codes[rows] and scales[rows] of x, or those of all rows in their places."""
    begin(EARLY)
    x_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real_R = x_R < X
    row_R = x_R.to(tl.int64)
    if rows_X is not None:
        row_R = tl.load(rows_X + x_R, mask=real_R, other=0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + x_R[:, None] * stride + column[None, :], mask=real_R[:, None], other=0.0).to(tl.float32)
    scale_R = _scale(tl.max(tl.abs(values), 1), LARGEST, FLOOR)
    tl.store(scales + row_R * (WIDTH // BLOCK) + tl.program_id(1), scale_R, mask=real_R)
    code = _e4m3_codes(values / scale_R[:, None])
    tl.store(codes + row_R[:, None] * WIDTH + column[None, :], code, mask=real_R[:, None])


def quantize_rows(x_XK: Tensor, rows_X: Tensor | None, codes: Tensor, scales: Tensor, block: int) -> None:
    """codes[rows], scales[rows] = x in blocks; codes uint8 [.., K], scales FP32 [.., K / block]."""
    early, (num_rows, width) = starts_early(x_XK.device), x_XK.shape
    rows = min(16, triton.next_power_of_2(num_rows))
    quantize_rows_kernel[(triton.cdiv(num_rows, rows), width // block)](
        x_XK, rows_X, codes, scales, num_rows, x_XK.stride(0),
        WIDTH=width, BLOCK=block, ROWS=rows, LARGEST=fp8.LARGEST, FLOOR=fp8.AMAX_FLOOR,
        EARLY=early, launch_pdl=early, num_warps=4,
    )  # fmt: skip


# -- the indexer ---------------------------------------------------------------------------------------------------


@triton.jit
def index_scores_kernel(
    q_TJI, q_scale_TJ, weight_TJ, keys, scales, visible_T, scores_TC, best_TG, M, C, G,
    J: tl.constexpr, I: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,  # noqa: E741
):  # fmt: skip
    """Ordered scores of all keys of one query, and the best of each group. Keys of query t: rows t C to t C + C - 1."""
    begin(EARLY)
    t = tl.program_id(1).to(tl.int64)
    visible = tl.load(visible_T + t).to(tl.int32)
    if visible <= M:
        return
    head = tl.arange(0, J)
    q = tl.load(q_TJI + (t * J + head)[:, None] * I + tl.arange(0, I)[None, :])
    weight_J = tl.load(weight_TJ + t * J + head) * tl.load(q_scale_TJ + t * J + head)
    keys += t * C * I
    scales += t * C
    for tile in tl.range(tl.program_id(0), tl.cdiv(visible, TILE), tl.num_programs(0), num_stages=4):
        key = tile * TILE + tl.arange(0, TILE)
        vectors = tl.load(keys + key[:, None] * I + tl.arange(0, I)[None, :])
        products = tl.dot(vectors, q.T)
        score = tl.sum(tl.maximum(products, 0.0) * weight_J[None, :], 1) * tl.load(scales + key)
        score = tl.where(key < visible, ordered(score), LOWEST)
        tl.store(scores_TC + t * C + key, score)
        best = tl.max(tl.reshape(score, (TILE // GROUP, GROUP)), 1)
        tl.store(best_TG + t * G + tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP), best)


def pick(
    q_TJI: Tensor,
    q_scale_TJ: Tensor,
    weight_TJ: Tensor,
    keys: Tensor,
    scales: Tensor,
    pages_NP: Tensor,
    sequence_T: Tensor,
    visible_T: Tensor,
    k: int,
) -> Tensor:
    """Rows of the k best visible keys of each query, int32 [T, k], -1 behind them. q, keys: float8_e4m3fn; the keys of
    query t are C rows, C a multiple of 256, and pages_NP [T, C / 32] says that they lie in order."""
    (num_queries, heads, width), early = q_TJI.shape, starts_early(q_TJI.device)
    columns = len(keys) // num_queries
    scores_TC = torch.empty(num_queries, columns, dtype=torch.int32, device=q_TJI.device)
    best_TG = scores_TC.new_empty(num_queries, columns // GROUP)
    programs = max(1, multiprocessors(q_TJI.device) * PROGRAMS_PER_MULTIPROCESSOR // num_queries)
    index_scores_kernel[(min(columns // TILE, programs), num_queries)](
        q_TJI, q_scale_TJ, weight_TJ, keys, scales, visible_T, scores_TC, best_TG, k, columns, columns // GROUP,
        J=heads, I=width, TILE=TILE, GROUP=GROUP, EARLY=early, launch_pdl=early, num_warps=4,
    )  # fmt: skip
    return select(scores_TC, best_TG, pages_NP, sequence_T, visible_T, k)


def select(
    scores_TC: Tensor, best_TG: Tensor, pages_NP: Tensor, sequence_T: Tensor, visible_T: Tensor, k: int
) -> Tensor:
    """The choice of `ops.decode_indexer`, with programs as wide as four times its scores ask for."""
    num_queries, columns = scores_TC.shape
    groups, early = triton.next_power_of_2(best_TG.shape[1]), starts_early(scores_TC.device)
    regions = triton.next_power_of_2(multiprocessors(scores_TC.device) // 4 + 1)
    region = triton.next_power_of_2(triton.cdiv(columns, regions * 64)) * 64
    numbers_TRX = scores_TC.new_empty(num_queries, regions, region)
    candidates_TRX = torch.empty_like(numbers_TRX)
    counts_TR, bounds_T2 = scores_TC.new_empty(num_queries, regions), scores_TC.new_empty(num_queries, 2)
    decode_candidates_kernel[(regions, num_queries)](
        scores_TC, best_TG, visible_T, numbers_TRX, candidates_TRX, counts_TR, bounds_T2, k, columns, best_TG.shape[1],
        BEST=groups, COLUMNS=min(groups, max(1024, 2 * triton.next_power_of_2(k))), REGION=region,
        EARLY=early, launch_pdl=early, num_warps=min(32, max(4, groups // 2048)),
    )  # fmt: skip
    picked_TM, rows_TM = scores_TC.new_empty(num_queries, k), scores_TC.new_empty(num_queries, k)
    decode_select_kernel[(num_queries,)](
        numbers_TRX, candidates_TRX, counts_TR, bounds_T2, pages_NP, sequence_T, visible_T, picked_TM, rows_TM,
        pages_NP.shape[1], k, PICKS=triton.next_power_of_2(k), REGION=region, REGIONS=regions, SLOTS=64,
        EARLY=early, launch_pdl=early, num_warps=8,
    )  # fmt: skip
    return rows_TM


# -- attention -----------------------------------------------------------------------------------------------------


@triton.jit
def latent_attention_kernel(
    q_HTK, q_THX, codes, scales, rotary, rows_TM, sums_TSHK, most_TSH, total_TSH, T, M, scale,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, X: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    HEADS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One split of one query for a block of heads. q_HTK: absorbed; q_THX: with the rotary part last. scale: in units
    of log 2."""
    begin(EARLY)
    split, splits = tl.program_id(0), tl.num_programs(0)
    t = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    place, turn = tl.arange(0, COLUMNS), tl.arange(0, R)

    turned = tl.load(q_THX + ((t * H + head) * X + X - R)[:, None] + turn[None, :])
    q = ()
    for at in tl.static_range(0, K, BLOCK):
        q += (tl.load(q_HTK + ((head * T + t) * K)[:, None] + at + tl.arange(0, BLOCK)[None, :]),)
    most_H = tl.full((HEADS,), float("-inf"), tl.float32)
    total_H = tl.zeros((HEADS,), tl.float32)
    sums = ()
    for _ in tl.static_range(0, K, BLOCK):
        sums += (tl.zeros((HEADS, BLOCK), tl.float32),)

    for tile in range(split * TILES, (split + 1) * TILES):
        at_X = tile * COLUMNS + place
        row = tl.load(rows_TM + t * M + at_X, mask=at_X < M, other=-1).to(tl.int64)
        if tl.max(row) >= 0:
            real = (row >= 0)[:, None]
            part = tl.load(rotary + row[:, None] * R + turn[None, :], mask=real, other=0.0).to(turned.dtype)
            scores = tl.dot(turned, part.T, input_precision="ieee")
            keys = ()
            for b in tl.static_range(K // BLOCK):
                column = b * BLOCK + tl.arange(0, BLOCK)
                code = tl.load(codes + row[:, None] * K + column[None, :], mask=real, other=0)
                factor = tl.load(scales + row * (K // BLOCK) + b, mask=row >= 0, other=0.0)
                keys += ((e4m3_to_float(code) * factor[:, None]).to(turned.dtype),)
                scores = tl.dot(q[b], keys[b].T, scores, input_precision="ieee")
            scores = tl.where((row >= 0)[None, :], scores * scale, float("-inf"))
            new_H = tl.maximum(most_H, tl.max(scores, 1))
            weights = tl.exp2(scores - new_H[:, None])
            shrink_H = tl.exp2(most_H - new_H)
            total_H = total_H * shrink_H + tl.sum(weights, 1)
            added = ()
            for b in tl.static_range(K // BLOCK):
                shrunk = sums[b] * shrink_H[:, None]
                added += (tl.dot(weights.to(turned.dtype), keys[b], shrunk, input_precision="ieee"),)
            sums = added
            most_H = new_H

    at_H = (t * splits + split) * H + head
    tl.store(most_TSH + at_H, most_H)
    tl.store(total_TSH + at_H, total_H)
    for b in tl.static_range(K // BLOCK):
        column = b * BLOCK + tl.arange(0, BLOCK)
        tl.store(sums_TSHK + (at_H * K)[:, None] + column[None, :], sums[b])


def num_splits(programs: int, tiles: int, available: int) -> int:
    """Splits of the picked, where so many programs are there without: as few as give each available multiprocessor
    one, since every split leaves sums to be added up."""
    splits = 1
    while splits < min(tiles, MOST_SPLITS) and splits * programs < available:
        splits *= 2
    return splits


def attend(
    q_HTK: Tensor,
    q_THX: Tensor,
    codes: Tensor,
    scales: Tensor,
    rotary: Tensor,
    rows_TM: Tensor,
    no_sink_H: Tensor,
    scale: float,
) -> Tensor:
    """o [T, H, K] of softmax(scale q . key) over the picked rows. H: 16, 32 or a multiple of 64. no_sink_H: -inf."""
    (heads, num_queries, width), early = q_HTK.shape, starts_early(q_HTK.device)
    tiles = triton.cdiv(rows_TM.shape[1], PICKED_TILE)
    block = min(heads, HEADS_OF_PROGRAM)
    splits = num_splits(heads // block * num_queries, tiles, multiprocessors(q_HTK.device))
    most_TSH = torch.empty(num_queries, splits, heads, dtype=torch.float32, device=q_HTK.device)
    total_TSH, sums_TSHK = torch.empty_like(most_TSH), most_TSH.new_empty(*most_TSH.shape, width)
    latent_attention_kernel[(splits, heads // block, num_queries)](
        q_HTK, q_THX, codes, scales, rotary, rows_TM, sums_TSHK, most_TSH, total_TSH,
        num_queries, rows_TM.shape[1], scale * LOG2_E,
        H=heads, K=width, R=rotary.shape[1], X=q_THX.shape[2], BLOCK=width // scales.shape[1],
        TILES=triton.cdiv(tiles, splits), HEADS=block, COLUMNS=PICKED_TILE,
        EARLY=early, launch_pdl=early, num_warps=8, num_stages=1,
    )  # fmt: skip
    o_THK = q_HTK.new_empty(num_queries, heads, width)
    lse_TH = torch.empty_like(most_TSH[:, 0])
    columns = min(COLUMNS_OF_SUM, width)
    decode_attention_combine_kernel[(width // columns, heads, num_queries)](
        sums_TSHK, most_TSH, total_TSH, no_sink_H, None, None, o_THK, lse_TH, splits, heads,
        K=width, R=0, SPLITS=triton.next_power_of_2(splits), COLUMNS=columns, EARLY=early, launch_pdl=early,
        num_warps=4,
    )  # fmt: skip
    return o_THK
