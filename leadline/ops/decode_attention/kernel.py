"""Attention of single queries in Triton, straight from packed rows.

With one query there are H rows (heads) of a matrix product and up to 8,320 keys, and nothing else to fill the card with
but the keys. So the keys are cut into splits. A program has a block of heads and one split; it leaves the weighted sum
of its keys, their largest score and the sum of their weights, all FP32, and a second kernel adds the splits up in their
order. With K = 512 the sum of a split is 128 KiB for 64 heads, as much as 224 packed keys: more splits than one query
needs to fill the card would move more bytes than the cache holds.

Floors at a million tokens, one query of 64 heads of 512. HCA: 8,320 keys of 584 bytes and 1.1 GFLOP, 1.7 us and 1.4 us
on an H100. CSA: 640 keys, 0.1 us. Both are less than what starting two kernels takes, so the wait for lists, then rows,
then products, one behind the other, is what counts.

How the keys are split depends on the lengths W and M of the lists and on the number of queries, and on nothing that is
in them; a block of heads computes the same for each of its heads whatever its size. There are no more splits than
programs can run at the same time, because one more costs a whole round, and because the sums of splits would be most
of the bytes: 84 MB for 64 queries of 640 keys, which are 24 MB. So a query gets the same bits among as many others,
whoever they are; and among fewer as well, as long as there is a split for each tile, in CSA layers up to 6 queries.

Lists are padded with -1 to their greatest length, so that shapes are static. A program whose rows are all -1 is done
when it has read them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.ops.cache_rows.kernel import chunk_of, load_rows, rotary_view
from leadline.ops.early_start import begin, starts_early
from leadline.ops.opaque import opaque
from leadline.ops.rope.kernel import turn_pairs

LOG2_E = math.log2(math.e)
MOST_SPLITS = 66
ENOUGH_PROGRAMS = 132  # of 32 heads: one for each multiprocessor of a large card; the same everywhere, as bits must be
# Columns of a tile, and warps of a program that has one: on Hopper, elsewhere, and of FP32, which has no matrix unit.
HOPPER_TILES, TILES, FP32_TILES = ((64, 4), (128, 8)), ((64, 4),), ((16, 4),)
COLUMNS_OF_SUM = 128


@triton.jit
def list_rows(window_rows, entry_rows, tile, place, W, M, COLUMNS: tl.constexpr):
    """Whether a tile of the two lists lies in the window, and the rows at its places; each list begins with a tile."""
    window_tiles = tl.cdiv(W, COLUMNS)
    in_window = tile < window_tiles
    at = tile * COLUMNS + place
    window_row = tl.load(window_rows + at, mask=at < W, other=-1)
    at -= window_tiles * COLUMNS
    entry_row = tl.load(entry_rows + at, mask=(at >= 0) & (at < M), other=-1)
    return in_window, tl.where(in_window, window_row, entry_row).to(tl.int64)


@triton.jit
def _inner_products(q, keys):
    """q keys^T, summed over the chunks."""
    products = tl.dot(q[0], keys[0].T, input_precision="ieee")
    for c in tl.static_range(1, len(q)):
        products = tl.dot(q[c], keys[c].T, products, input_precision="ieee")
    return products


@triton.jit
def _weighted_sums(sums, shrink_H, weights, keys):
    """sums shrink + weights keys, chunk by chunk."""
    added = ()
    for c in tl.static_range(len(keys)):
        added += (tl.dot(weights, keys[c], sums[c] * shrink_H[:, None], input_precision="ieee"),)
    return added


@triton.jit
def decode_attention_fwd_kernel(
    q_THK, window, window_rotary, window_scales, window_rows, entries, entry_rotary, entry_scales, entry_rows,
    sums_TSHK, most_TSH, total_TSH, H, W, M, tiles, scale,
    K: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One split of one query for a block of heads. scale: K^-0.5 log2 e. tiles: of COLUMNS rows in a split."""
    begin(EARLY)
    split, splits = tl.program_id(0), tl.num_programs(0)
    t = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    real_H = head < H
    place = tl.arange(0, COLUMNS)
    window_rows += t * W
    entry_rows += t * M

    q = ()
    for at in tl.static_range(0, K, CHUNK):
        column = at + tl.arange(0, CHUNK)
        mask = real_H[:, None] & (column < K)[None, :]
        q += (tl.load(q_THK + ((t * H + head) * K)[:, None] + column[None, :], mask=mask, other=0.0),)
    most_H = tl.full((HEADS,), float("-inf"), tl.float32)
    total_H = tl.zeros((HEADS,), tl.float32)
    sums = ()
    for _ in tl.static_range(0, K, CHUNK):
        sums += (tl.zeros((HEADS, CHUNK), tl.float32),)

    last = tl.full((), -1, tl.int64)
    for tile in range(split * tiles, (split + 1) * tiles):
        in_window, row = list_rows(window_rows, entry_rows, tile, place, W, M, COLUMNS)
        last = tl.maximum(last, tl.max(row))
        if tl.max(row) >= 0:
            source = tl.where(in_window, window, entries)
            rotary = tl.where(in_window, window_rotary, entry_rotary)
            scales = window_scales
            if window_scales is not None:
                scales = tl.where(in_window, window_scales, entry_scales)
            keys = ()
            for at in tl.static_range(0, K, CHUNK):
                keys += (load_rows(source, rotary, scales, row, row >= 0, K, R, CHUNK, at).to(q[0].dtype),)
            scores = tl.where((row >= 0)[None, :], _inner_products(q, keys) * scale, float("-inf"))
            new_H = tl.maximum(most_H, tl.max(scores, 1))
            weights = tl.exp2(scores - new_H[:, None])
            shrink_H = tl.exp2(most_H - new_H)
            total_H = total_H * shrink_H + tl.sum(weights, 1)
            # The published kernel rounds the probabilities to the dtype of the values before the second product.
            sums = _weighted_sums(sums, shrink_H, weights.to(q[0].dtype), keys)
            most_H = new_H

    at_H = (t * splits + split) * H + head
    tl.store(most_TSH + at_H, most_H, mask=real_H)
    tl.store(total_TSH + at_H, total_H, mask=real_H)
    if last >= 0:
        for c in tl.static_range(len(sums)):
            column = c * CHUNK + tl.arange(0, CHUNK)
            mask = real_H[:, None] & (column < K)[None, :]
            tl.store(sums_TSHK + (at_H * K)[:, None] + column[None, :], sums[c], mask=mask)


@triton.jit
def decode_attention_combine_kernel(
    sums_TSHK, most_TSH, total_TSH, sink_H, cos, sin, o_THK, lse_TH, S, H,
    K: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """o of some columns of one head of one query, and its lse. S splits; one without a key has the total 0, no sums.
    R: the last columns, which are turned back by the angles of cos and sin [T, R / 2]; 0 if none are."""
    begin(EARLY)
    t, h = tl.program_id(2).to(tl.int64), tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    s = tl.arange(0, SPLITS)
    at_S = (t * S + s) * H + h
    most_S = tl.load(most_TSH + at_S, mask=s < S, other=float("-inf"))
    total_S = tl.load(total_TSH + at_S, mask=s < S, other=0.0)
    # All loads at once: what an empty split has in the place of sums is read too, and dropped.
    mask = (s < S)[:, None] & (column < K)[None, :]
    sums_SK = tl.load(sums_TSHK + (at_S * K)[:, None] + column[None, :], mask=mask, other=0.0)
    sums_SK = tl.where((total_S != 0)[:, None], sums_SK, 0.0)
    if R > 0:
        pair = (tl.program_id(0) * COLUMNS - (K - R)) // 2 + tl.arange(0, COLUMNS // 2)
        turned = (pair >= 0) & (pair < R // 2)
        cosines = tl.load(cos + t * (R // 2) + pair, mask=turned, other=1.0)
        sines = tl.load(sin + t * (R // 2) + pair, mask=turned, other=0.0)

    sink = tl.load(sink_H + h)
    most = tl.max(most_S)
    # Without any key the maximum is -inf, and -inf - -inf would be NaN.
    base = tl.where(most > float("-inf"), most, 0.0)
    weight_S = tl.exp2(most_S - base)
    total = tl.sum(total_S * weight_S)
    # A sink far above all scores makes the denominator infinite: the output is rightly 0, but its log must not be
    # taken from there.
    factor = tl.where(total != 0, 1.0 / (total + tl.exp2(sink * 1.4426950408889634 - base)), 0.0)
    o = (tl.sum(sums_SK * weight_S[:, None], 0) * factor).to(o_THK.dtype.element_ty)
    if R > 0:
        o = turn_pairs(o.to(tl.float32)[None, :], cosines[None, :], -sines[None, :])
        o = tl.reshape(o, (COLUMNS,)).to(o_THK.dtype.element_ty)
    tl.store(o_THK + (t * H + h) * K + column, o, mask=column < K)
    log = (base + tl.log2(total)) * 0.6931471805599453
    top = tl.maximum(log, sink)
    tl.store(lse_TH + t * H + h, tl.where(total != 0, top + tl.log(tl.exp(log - top) + tl.exp(sink - top)), sink))


class Split(NamedTuple):
    """How the two lists are cut: tiles of `columns` rows, `tiles` of them in each of `splits`; and the warps of a
    program that has a tile of this size on Hopper."""

    columns: int
    tiles: int
    splits: int
    warps: int = 4

    @classmethod
    def of(cls, window: int, entries: int, shapes: Sequence[tuple[int, int]], blocks: int) -> Split:
        """For lists of these lengths: at most MOST_SPLITS, so that what they leave stays small beside the cache, and
        for many queries no more than make ENOUGH_PROGRAMS, which then run at the same time.

        shapes: columns and warps, the smallest first. The first is taken of which one tile in a split is enough, else
        several of the last. blocks: of 32 heads, of all queries.
        """
        most = min(MOST_SPLITS, max(1, ENOUGH_PROGRAMS // blocks))
        sizes = [(x, warps, max(1, triton.cdiv(window, x) + triton.cdiv(entries, x))) for x, warps in shapes]
        columns, warps, total = next((size for size in sizes if size[2] <= most), sizes[-1])
        tiles = triton.cdiv(total, most)
        return cls(columns, tiles, triton.cdiv(total, tiles), warps)


def heads_per_program(splits: int, num_heads: int) -> int:
    """Heads of a block, 16 or 32: the fewer where the splits of all queries then run at the same time all the same."""
    return 16 if splits * triton.cdiv(num_heads, 16) <= ENOUGH_PROGRAMS else 32


def for_hopper(q_THK: Tensor, rotary_width: int | None) -> bool:
    """Whether the kernel of `hopper.py` runs: bfloat16, wide keys, and a GPU of that generation. rotary_width: of
    packed keys, None for floats."""
    suits = q_THK.dtype == torch.bfloat16 and q_THK.shape[2] in (128, 256, 512) and rotary_width in (None, 64)
    return suits and q_THK.is_cuda and torch.cuda.get_device_capability(q_THK.device) == (9, 0)


def as_words(values: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Packed keys with four bytes in an integer and all scales of a row in one; floats as they are."""
    return (values, None) if scales is None else (values.view(torch.int32), scales.view(torch.int64))


def _shapes_only(
    q_THK: Tensor,
    window: Tensor,
    window_scales: Tensor | None,
    window_rows_TW: Tensor,
    entries: Tensor | None,
    entry_scales: Tensor | None,
    entry_rows_TM: Tensor | None,
    sink_H: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return q_THK.new_empty(q_THK.shape), q_THK.new_empty(q_THK.shape[:2], dtype=torch.float32)


@opaque(_shapes_only)
def decode_attention_kernel(
    q_THK: Tensor,
    window: Tensor,
    window_scales: Tensor | None,
    window_rows_TW: Tensor,
    entries: Tensor | None,
    entry_scales: Tensor | None,
    entry_rows_TM: Tensor | None,
    sink_H: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The operation for q of 16 or 32 bits; sources as `cache_rows.operands` gives them."""
    q_THK, window_rows_TW = q_THK.contiguous(), window_rows_TW.contiguous()
    if entries is None or entry_rows_TM is None:  # a list of no length
        entries, entry_scales, entry_rows_TM = window, window_scales, window_rows_TW[:, :0]
    entry_rows_TM = entry_rows_TM.contiguous()
    num_queries, num_heads, width = q_THK.shape
    rotary_width = None if window_scales is None else window.shape[1] - width
    lengths = window_rows_TW.shape[1], entry_rows_TM.shape[1]
    hopper = for_hopper(q_THK, rotary_width)
    shapes = HOPPER_TILES if hopper else FP32_TILES if q_THK.dtype == torch.float32 else TILES
    split = Split.of(*lengths, shapes, num_queries * triton.cdiv(num_heads, 32))
    most_TSH = q_THK.new_empty((num_queries, split.splits, num_heads), dtype=torch.float32)
    total_TSH = torch.empty_like(most_TSH)
    sums_TSHK = most_TSH.new_empty((*most_TSH.shape, width))
    rest = sums_TSHK, most_TSH, total_TSH, num_heads, *lengths, split.tiles, width**-0.5 * LOG2_E
    early = starts_early(q_THK.device)
    shape = {"K": width, "R": rotary_width or 0, "EARLY": early, "launch_pdl": early}
    if hopper:
        from leadline.ops.decode_attention.hopper import decode_attention_fwd_hopper_kernel

        heads = heads_per_program(num_queries * split.splits, num_heads)
        grid = split.splits, triton.cdiv(num_heads, heads), num_queries
        decode_attention_fwd_hopper_kernel[grid](
            q_THK, *as_words(window, window_scales), window_rows_TW, *as_words(entries, entry_scales), entry_rows_TM,
            *rest, **shape, TILE=split.columns, SINGLE=split.tiles == 1, HEADS=heads,
            WARPS=split.warps, num_warps=split.warps,
        )  # fmt: skip
    else:
        grid = split.splits, triton.cdiv(num_heads, 16), num_queries
        decode_attention_fwd_kernel[grid](
            q_THK,
            window, rotary_view(window, window_scales), window_scales, window_rows_TW,
            entries, rotary_view(entries, entry_scales), entry_scales, entry_rows_TM,
            *rest, **shape, HEADS=16, COLUMNS=split.columns, CHUNK=chunk_of(width),
            num_warps=8 if width > 256 else 4, num_stages=1,
        )  # fmt: skip
    o_THK, lse_TH = torch.empty_like(q_THK), most_TSH.new_empty((num_queries, num_heads))
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    columns = min(COLUMNS_OF_SUM, triton.next_power_of_2(width))
    decode_attention_combine_kernel[(triton.cdiv(width, columns), num_heads, num_queries)](
        sums_TSHK, most_TSH, total_TSH, sink_H.contiguous(), cos, sin, o_THK, lse_TH, split.splits, num_heads,
        K=width, R=0 if cos is None else 2 * cos.shape[1], SPLITS=triton.next_power_of_2(split.splits), COLUMNS=columns,
        EARLY=early, launch_pdl=early, num_warps=4,
    )  # fmt: skip
    return o_THK, lse_TH
