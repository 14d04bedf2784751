"""The indexer for single queries in Triton: scores of all keys of a sequence, straight from its pages, and their best.

Floor at a million tokens: one query reads 262,144 packed keys of 68 bytes, 17.8 MB, 6 us on an H100, and multiplies
them with 64 heads, 4.3 GFLOP, another 5 us; decoding four-bit codes and summing over the heads keeps the ordinary units
busy for as long. So the scores run at the speed of all three together, and the choice, which is small, must not add to
it: a single multiprocessor that looked at a quarter of a million scores would take several times as long.

Scores. A tile is 64 keys, two pages. Tiles are dealt out to the programs in turn, so that the card is full at every
length, and a score does not depend on who computes it. Keys are the rows of a product with the heads for columns, so
that the sum over heads stays within a row. A score is kept as the integer that is ordered like it, and the best of
every 16 neighbours, a group, is kept beside it.

Candidates. Groups are dealt out to columns, at least 1,024. A number that the best groups of k columns reach is reached
by k scores, so nothing below it is picked; and since columns are many, few others reach it. Every program finds this
bound anew, which is cheaper than to wait for one that does, and lists what reaches it in a region of the sequence, in
order.

Choice. One program for each query finds the k-th score among the candidates, a few hundred more than k when the best
are spread out. Both searches cut an interval of integers into quarters until it holds what they look for. Sums of
integers are exact, so no result depends on their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.ops.cache_rows.kernel import load_index_rows, multiprocessors
from leadline.ops.decode_indexer.reference import PAGE_KEYS
from leadline.ops.early_start import begin, starts_early
from leadline.ops.opaque import opaque

TILE = 64  # keys
GROUP = 16  # keys
COLUMNS = 256  # a multiple of which scores have, so that each query's begin at an address that suits wide loads
PROGRAMS_PER_MULTIPROCESSOR = 5
LOWEST = tl.constexpr(-(2**31))


@triton.jit
def ordered(score):
    """int32 that are ordered like the scores; 0 and -0 are equal. The two outermost numbers stay free: the lowest for
    what is not there, so that it is never picked."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), -(2**31) + 1), 2**31 - 2)


@triton.jit
def decode_index_scores_kernel(
    q_TJI, weight_TJ, keys, scales, pages_NP, sequence_T, visible_T, scores_TC, best_TG, J, P, M, C, G,
    I: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,  # noqa: E741
):  # fmt: skip
    """Ordered scores of the keys of one query, and the best of each group of them; nothing for a query whose visible
    entries are all picked."""
    begin(EARLY)
    t = tl.program_id(1).to(tl.int64)
    visible = tl.load(visible_T + t).to(tl.int32)
    pages_NP += tl.load(sequence_T + t).to(tl.int64) * P
    if visible <= M:
        return
    head = tl.arange(0, HEADS)
    real_J = head < J
    weight_J = tl.load(weight_TJ + t * J + head, mask=real_J, other=0.0)
    q_TJI += t * J * I
    if scales is not None:
        pair = head[:, None] * I + 2 * tl.arange(0, I // 2)[None, :]
        q_even = tl.load(q_TJI + pair, mask=real_J[:, None], other=0.0)
        q_odd = tl.load(q_TJI + pair + 1, mask=real_J[:, None], other=0.0)
    else:
        q = tl.load(q_TJI + head[:, None] * I + tl.arange(0, I)[None, :], mask=real_J[:, None], other=0.0)
    for tile in range(tl.program_id(0), tl.cdiv(visible, TILE), tl.num_programs(0)):
        key = tile * TILE + tl.arange(0, TILE)
        real_X = key < visible
        row = tl.load(pages_NP + key // 32, mask=real_X, other=0).to(tl.int64) * 32 + key % 32
        if scales is not None:
            even, odd = load_index_rows(keys, scales, row, real_X, I)
            products = tl.dot(even.to(q_even.dtype), q_even.T, input_precision="ieee")
            products = tl.dot(odd.to(q_odd.dtype), q_odd.T, products, input_precision="ieee")
        else:
            vectors = tl.load(keys + row[:, None] * I + tl.arange(0, I)[None, :], mask=real_X[:, None], other=0.0)
            products = tl.dot(vectors, q.T, input_precision="ieee")
        score = tl.sum(tl.maximum(products, 0.0) * weight_J[None, :], 1)
        score = tl.where(real_X, ordered(score), LOWEST)
        tl.store(scores_TC + t * C + key, score)
        group = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
        best = tl.max(tl.reshape(score, (TILE // GROUP, GROUP)), 1)
        tl.store(best_TG + t * G + group, best)


@triton.jit
def _quarters(low, high):
    """Three numbers that cut the way from low to high, int64, into four equal parts."""
    way = high - low
    return low + (way >> 2), low + (way >> 1), high - (way >> 2)


@triton.jit
def _counts(score, first, second, third):
    """How many scores reach each of three ascending numbers, in one integer with 20 bits for each."""
    first, second, third = first.to(tl.int32), second.to(tl.int32), third.to(tl.int32)
    counts = (score >= first).to(tl.int64) + ((score >= second).to(tl.int64) << 20)
    return tl.sum(counts + ((score >= third).to(tl.int64) << 40))


@triton.jit
def _narrowed(counts, low, at_low, high, at_high, first, second, third, k):
    """The quarter in which k scores are reached: its ends, each with how many reach it."""
    reach_1, reach_2, reach_3 = counts & 0xFFFFF, (counts >> 20) & 0xFFFFF, counts >> 40
    high = tl.where(reach_1 < k, first, tl.where(reach_2 < k, second, tl.where(reach_3 < k, third, high)))
    low = tl.where(reach_3 >= k, third, tl.where(reach_2 >= k, second, tl.where(reach_1 >= k, first, low)))
    at_high = tl.where(reach_1 < k, reach_1, tl.where(reach_2 < k, reach_2, tl.where(reach_3 < k, reach_3, at_high)))
    at_low = tl.where(reach_3 >= k, reach_3, tl.where(reach_2 >= k, reach_2, tl.where(reach_1 >= k, reach_1, at_low)))
    return low, at_low, high, at_high


@triton.jit
def _bound(best, k, most):
    """A number that at least k of the scores `best` [A] reach, and no more than `most` unless more are equal; and one
    above all of them."""
    # The lowest of k or more is reached by all of them; fewer leave open which scores beside the best are picked.
    low = tl.where(k <= best.shape[0], tl.min(best), LOWEST).to(tl.int64)
    top = tl.max(best).to(tl.int64) + 1
    at_low, high, at_high = tl.full((), best.shape[0], tl.int64), top, tl.full((), 0, tl.int64)
    while (high - low > 1) & (at_low > most):
        first, second, third = _quarters(low, high)
        counts = _counts(best, first, second, third)
        low, at_low, high, at_high = _narrowed(counts, low, at_low, high, at_high, first, second, third, k)
    return low.to(tl.int32), top.to(tl.int32)


@triton.jit
def decode_candidates_kernel(
    scores_TC, best_TG, visible_T, numbers_TRX, candidates_TRX, counts_TR, bounds_T2, M, C, G,
    BEST: tl.constexpr, COLUMNS: tl.constexpr, REGION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The keys of one region of one query that may be picked: their numbers in ascending order and ordered scores, how
    many they are, the bound that they reach, and one that none does. BEST: groups of a query, COLUMNS: columns that
    they are dealt out to, REGION: keys of a region; powers of two that the true numbers may fall short of."""
    begin(EARLY)
    t = tl.program_id(1).to(tl.int64)
    region, regions = tl.program_id(0), tl.num_programs(0)
    visible = tl.load(visible_T + t).to(tl.int32)
    group = tl.arange(0, BEST // COLUMNS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    best = tl.load(best_TG + t * G + group, mask=group < G, other=LOWEST)  # before it is known how many were scored
    if visible <= M:
        return
    tiles = tl.cdiv(visible, 64)
    best = tl.where(group // 4 < tiles, best, LOWEST)
    of_region = tl.cdiv(tiles, regions)
    tiles = tl.minimum(tl.maximum(tiles - region * of_region, 0), of_region)
    # Whole tiles were scored, so masks may go in steps of four, which lets a thread load four at once.
    four = 4 * tl.arange(0, REGION // 4)[:, None]
    number = region * of_region * 64 + four + tl.arange(0, 4)[None, :]
    score = tl.load(scores_TC + t * C + number, mask=four < tiles * 64, other=LOWEST)

    bound, top = _bound(tl.max(best, 0), M, M + M // 8)

    taken = (score >= bound) & (score > LOWEST)
    counts = taken.to(tl.int32)
    of_four = tl.sum(counts, 1)
    place = tl.cumsum(counts, 1) - counts + (tl.cumsum(of_four, 0) - of_four)[:, None]
    at = (t * regions + region) * REGION
    tl.store(numbers_TRX + at + place, number, mask=taken)
    tl.store(candidates_TRX + at + place, score, mask=taken)
    tl.store(counts_TR + t * regions + region, tl.sum(counts))
    if region == 0:
        tl.store(bounds_T2 + 2 * t, bound)
        tl.store(bounds_T2 + 2 * t + 1, top)


@triton.jit
def _slots(SLOTS: tl.constexpr):
    """Places of a region. The compiler is told not to load neighbours by one thread: then all that follows has one
    layout, and nothing is exchanged between threads but sums."""
    return tl.max_contiguous(tl.arange(0, SLOTS)[None, :], (1, 1))


@triton.jit
def _block(values, count_R, at, REGION: tl.constexpr, REGIONS: tl.constexpr, SLOTS: tl.constexpr):
    """What stands in places `at` to at + SLOTS - 1 of every region, and which of them hold a candidate."""
    slot = at + _slots(SLOTS)
    real = slot < count_R[:, None]
    return tl.load(values + tl.arange(0, REGIONS)[:, None] * REGION + slot, mask=real, other=LOWEST), real


@triton.jit
def _last_tie(
    score, number, candidates, numbers, count_R, most, threshold, allowed,
    REGION: tl.constexpr, REGIONS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The largest number so that at most `allowed` candidates right at the threshold have one up to it. score, number:
    of the first block."""
    low, high = tl.full((), -1, tl.int32), tl.full((), 2**30, tl.int32)
    while high - low > 1:
        middle = low + (high - low) // 2
        tied = tl.sum(((score == threshold) & (number <= middle)).to(tl.int32))
        for at in range(SLOTS, most, SLOTS):
            score_here, real = _block(candidates, count_R, at, REGION, REGIONS, SLOTS)
            number_here, _ = _block(numbers, count_R, at, REGION, REGIONS, SLOTS)
            tied += tl.sum((real & (score_here == threshold) & (number_here <= middle)).to(tl.int32))
        low, high = tl.where(tied <= allowed, middle, low), tl.where(tied <= allowed, high, middle)
    return low


@triton.jit
def _taken(score, number, real, threshold, last):
    """Which candidates are picked, 1 or 0: those above the threshold, and those right at it up to the last tie."""
    return (real & (score >= threshold + (number > last).to(tl.int32))).to(tl.int32)


@triton.jit
def _store_picks(picked_TM, rows_TM, taken, before_R, number, page):
    """Store what is taken of a block, in each region behind what was taken before."""
    place = before_R[:, None] + tl.cumsum(taken, 1) - taken
    tl.store(picked_TM + place, number, mask=taken != 0)
    tl.store(rows_TM + place, page * 32 + number % 32, mask=taken != 0)


@triton.jit
def decode_select_kernel(
    numbers_TRX, candidates_TRX, counts_TR, bounds_T2, pages_NP, sequence_T, visible_T, picked_TM, rows_TM, P, M,
    PICKS: tl.constexpr, REGION: tl.constexpr, REGIONS: tl.constexpr, SLOTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Picks of one query: of its candidates the M best. Usually the first block, SLOTS candidates of every region, is
    all of them and stays in registers; when scores are crowded, the others are read again in each step."""
    begin(EARLY)
    t = tl.program_id(0).to(tl.int64)
    numbers, candidates = numbers_TRX + t * REGIONS * REGION, candidates_TRX + t * REGIONS * REGION
    visible = tl.load(visible_T + t).to(tl.int32)
    pages_NP += tl.load(sequence_T + t).to(tl.int64) * P
    count_R = tl.load(counts_TR + t * REGIONS + tl.arange(0, REGIONS))
    low, high = tl.load(bounds_T2 + 2 * t).to(tl.int64), tl.load(bounds_T2 + 2 * t + 1).to(tl.int64)
    # All loads at once: what stands behind the candidates of a region is read too, and dropped.
    slot = _slots(SLOTS)
    score = tl.load(candidates + tl.arange(0, REGIONS)[:, None] * REGION + slot)
    number = tl.load(numbers + tl.arange(0, REGIONS)[:, None] * REGION + slot)
    picked_TM += t * M
    rows_TM += t * M
    # This sum stands before the branch, because no load is moved behind it.
    at_low, at_high = tl.sum(tl.where(visible > M, count_R, 0)).to(tl.int64), tl.full((), 0, tl.int64)
    if visible > M:
        real = slot < count_R[:, None]
        score = tl.where(real, score, LOWEST)
        page = tl.load(pages_NP + number // 32, mask=real, other=0)
        most = tl.max(count_R)
        while (high - low > 1) & (at_low > M):
            first, second, third = _quarters(low, high)
            counts = _counts(score, first, second, third)
            for at in range(SLOTS, most, SLOTS):
                score_here, _ = _block(candidates, count_R, at, REGION, REGIONS, SLOTS)
                counts += _counts(score_here, first, second, third)
            low, at_low, high, at_high = _narrowed(counts, low, at_low, high, at_high, first, second, third, M)
        threshold = low.to(tl.int32)
        last = tl.full((), 2**30, tl.int32)
        if at_low > M:
            allowed = M - at_high.to(tl.int32)
            last = _last_tie(
                score, number, candidates, numbers, count_R, most, threshold, allowed, REGION, REGIONS, SLOTS
            )

        taken = _taken(score, number, real, threshold, last)
        taken_R = tl.sum(taken, 1)
        of_first_R = taken_R
        for at in range(SLOTS, most, SLOTS):
            score_here, real = _block(candidates, count_R, at, REGION, REGIONS, SLOTS)
            number_here, _ = _block(numbers, count_R, at, REGION, REGIONS, SLOTS)
            taken_R += tl.sum(_taken(score_here, number_here, real, threshold, last), 1)
        before_R = tl.cumsum(taken_R, 0) - taken_R
        _store_picks(picked_TM, rows_TM, taken, before_R, number, page)
        before_R += of_first_R
        for at in range(SLOTS, most, SLOTS):
            score_here, real = _block(candidates, count_R, at, REGION, REGIONS, SLOTS)
            number_here, _ = _block(numbers, count_R, at, REGION, REGIONS, SLOTS)
            taken = _taken(score_here, number_here, real, threshold, last)
            page = tl.load(pages_NP + number_here // 32, mask=taken != 0, other=0)
            _store_picks(picked_TM, rows_TM, taken, before_R, number_here, page)
            before_R += tl.sum(taken, 1)
    else:
        pick = tl.arange(0, PICKS)
        number_M = tl.where(pick < visible, pick, -1)
        page_M = tl.load(pages_NP + number_M // 32, mask=number_M >= 0, other=0)
        tl.store(picked_TM + pick, number_M, mask=pick < M)
        tl.store(rows_TM + pick, tl.where(number_M >= 0, page_M * 32 + number_M % 32, -1), mask=pick < M)


def for_hopper(q_TJI: Tensor, scales: Tensor | None) -> bool:
    """Whether the scores kernel of `hopper.py` runs: bfloat16 queries and packed keys of the published widths, and a
    GPU of that generation."""
    suits = q_TJI.dtype == torch.bfloat16 and scales is not None and q_TJI.shape[1:] == (64, 128)
    return suits and q_TJI.is_cuda and torch.cuda.get_device_capability(q_TJI.device) == (9, 0)


def _scores(
    q_TJI: Tensor, weight_TJ: Tensor, keys: Tensor, scales: Tensor | None,
    pages_NP: Tensor, sequence_T: Tensor, visible_T: Tensor, picks: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Ordered scores int32 [T, C] and the best of each group; written as far as is visible."""
    num_queries, heads, width = q_TJI.shape
    pages = pages_NP.shape[1]
    columns = triton.cdiv(pages * PAGE_KEYS, COLUMNS) * COLUMNS
    scores_TC = torch.empty(num_queries, columns, dtype=torch.int32, device=q_TJI.device)
    best_TG = torch.empty(num_queries, columns // GROUP, dtype=torch.int32, device=q_TJI.device)
    programs = max(1, multiprocessors(q_TJI.device) * PROGRAMS_PER_MULTIPROCESSOR // num_queries)
    grid = min(columns // TILE, programs), num_queries
    rest = scales, pages_NP, sequence_T, visible_T, scores_TC, best_TG
    sizes = pages, picks, columns, columns // GROUP
    early = starts_early(q_TJI.device)
    if for_hopper(q_TJI, scales):
        from leadline.ops.decode_indexer.hopper import decode_index_scores_hopper_kernel

        decode_index_scores_hopper_kernel[grid](
            q_TJI,
            weight_TJ,
            keys.view(torch.int32),
            *rest,
            *sizes,
            EARLY=early,
            launch_pdl=early,
            num_warps=4,
            maxnreg=96,
        )
    else:
        decode_index_scores_kernel[grid](
            q_TJI, weight_TJ, keys, *rest, heads, *sizes,
            I=width, HEADS=max(16, triton.next_power_of_2(heads)), TILE=TILE, GROUP=GROUP,
            EARLY=early, launch_pdl=early, num_warps=4,
        )  # fmt: skip
    return scores_TC, best_TG


def _shapes_only(
    q_TJI: Tensor,
    weight_TJ: Tensor,
    keys: Tensor,
    scales: Tensor | None,
    pages_NP: Tensor,
    sequence_T: Tensor,
    visible_T: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    picked_TM = q_TJI.new_empty((len(q_TJI), min(k, PAGE_KEYS * pages_NP.shape[1])), dtype=torch.int32)
    return picked_TM, torch.empty_like(picked_TM)


@opaque(_shapes_only)
def decode_pick_entries_kernel(
    q_TJI: Tensor,
    weight_TJ: Tensor,
    keys: Tensor,
    scales: Tensor | None,
    pages_NP: Tensor,
    sequence_T: Tensor,
    visible_T: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    """The operation for q of 16 or 32 bits; keys as `cache_rows.operands` gives them."""
    q_TJI, weight_TJ, pages_NP = q_TJI.contiguous(), weight_TJ.contiguous(), pages_NP.contiguous()
    num_queries, pages = len(q_TJI), pages_NP.shape[1]
    picks = min(k, PAGE_KEYS * pages)
    early = starts_early(q_TJI.device)
    scores_TC, best_TG = _scores(q_TJI, weight_TJ, keys, scales, pages_NP, sequence_T, visible_T, picks)
    picked_TM = torch.empty(num_queries, picks, dtype=torch.int32, device=q_TJI.device)
    rows_TM = torch.empty_like(picked_TM)
    most, groups = triton.next_power_of_2(picks), triton.next_power_of_2(best_TG.shape[1])
    # Candidates are looked for in several regions at the same time, half as many as there are multiprocessors.
    regions = triton.next_power_of_2(multiprocessors(q_TJI.device) // 4 + 1)
    region = triton.next_power_of_2(triton.cdiv(scores_TC.shape[1], regions * TILE)) * TILE
    numbers_TRX = torch.empty(num_queries, regions, region, dtype=torch.int32, device=q_TJI.device)
    candidates_TRX = torch.empty_like(numbers_TRX)
    counts_TR, bounds_T2 = numbers_TRX.new_empty(num_queries, regions), numbers_TRX.new_empty(num_queries, 2)
    decode_candidates_kernel[(regions, num_queries)](
        scores_TC, best_TG, visible_T, numbers_TRX, candidates_TRX, counts_TR, bounds_T2,
        picks, scores_TC.shape[1], best_TG.shape[1],
        BEST=groups, COLUMNS=min(groups, max(1024, 2 * most)), REGION=region,
        EARLY=early, launch_pdl=early, num_warps=4 if region < 2048 else 8,
    )  # fmt: skip
    decode_select_kernel[(num_queries,)](
        numbers_TRX, candidates_TRX, counts_TR, bounds_T2, pages_NP, sequence_T, visible_T, picked_TM, rows_TM,
        pages, picks, PICKS=most, REGION=region, REGIONS=regions, SLOTS=32,
        EARLY=early, launch_pdl=early, num_warps=8,
    )  # fmt: skip
    return picked_TM, rows_TM
