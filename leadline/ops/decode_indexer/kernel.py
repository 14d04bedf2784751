"""The indexer for single queries in Triton: scores of all keys of a sequence, straight from its pages, and their best.

Floor at a million tokens: one query reads 262,144 packed keys of 68 bytes, 17.8 MB, 6 us on an H100, and multiplies them
with 64 heads, 4.3 GFLOP, another 5 us; decoding four-bit codes and summing over the heads keeps the ordinary units busy
for as long. So the scores run at the speed of all three together, and the choice, which is small, must not add to it.

Scores. A tile is 64 keys, two pages. Tiles are dealt out to the programs in turn, so that the card is full at every
length, and a score does not depend on who computes it. Keys are the rows of a product with the heads for columns, so that
the sum over heads stays within a row. A score is kept as the integer that is ordered like it.

Choice. A group is 16 keys, and the scores kernel leaves the best score of each. Of the groups in the order of their best
(ties to the lower number), those behind the first k hold none of the k best entries: each group before brings one that
comes first. So one program per query picks groups, 16 times fewer than entries, and then entries among the scores of
these groups only. Both choices halve the interval of scores around the k-th until it is found; the first stops as soon
as few enough groups are left. Sums of integers are exact, so the result does not depend on their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.ops.cache_rows.kernel import load_index_rows
from leadline.ops.decode_indexer.reference import PAGE_KEYS

TILE = 64  # keys
GROUP = 16  # keys
COLUMNS = 256  # a multiple of which scores have, so that each query's begin at an address that suits wide loads
CHOSEN = 1024  # groups that are left at most, unless there are more picks
PROGRAMS_PER_MULTIPROCESSOR = 4
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
    I: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Ordered scores of the keys of one query, and the best of each group of them; nothing for a query whose visible
    entries are all picked."""
    t = tl.program_id(1).to(tl.int64)
    visible = tl.load(visible_T + t).to(tl.int32)
    if visible <= M:
        return
    pages_NP += tl.load(sequence_T + t).to(tl.int64) * P
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
def _reaching(score, threshold):
    return tl.sum((score >= threshold.to(tl.int32)).to(tl.int32))


@triton.jit
def _threshold(score, low, at_low, k, most):
    """The largest number that at least k scores reach, or any that at least k and at most `most` reach; and how many
    reach it. low: a number that at least k reach, at_low: how many, or too large a count."""
    low = low.to(tl.int64)
    high = tl.max(score).to(tl.int64) + 1
    at_low = tl.full((), 0, tl.int32) + at_low
    at_high = at_low * 0
    halve = at_low >= 0
    while (high - low > 1) & (at_low > most):
        # By turns the middle, which bounds the number of turns, and the place where k would be if the scores were
        # spread evenly, which is close to it before long.
        share = tl.where(halve, 0.5, (at_low - k + 0.5) / (at_low - at_high))
        step = ((high - low).to(tl.float32) * share).to(tl.int64)
        middle = low + tl.minimum(tl.maximum(step, 1), high - low - 1)
        reached = _reaching(score, middle)
        enough = reached >= k
        low = tl.where(enough, middle, low)
        at_low = tl.where(enough, reached, at_low)
        high = tl.where(enough, high, middle)
        at_high = tl.where(enough, at_high, reached)
        halve = halve == 0
    return low.to(tl.int32), at_low


@triton.jit
def _without_late_ties(score, number, threshold, reached, most):
    """The scores, lowered where otherwise more than `most` would reach the threshold: of those right at it only the ones
    with the lowest numbers stay. Numbers are below 2^30."""
    if reached > most:
        allowed = most - tl.sum((score > threshold).to(tl.int32))
        low = tl.full((), -1, tl.int32)
        high = tl.full((), 2**30, tl.int32)
        while high - low > 1:
            middle = low + (high - low) // 2
            few = tl.sum(((score == threshold) & (number <= middle)).to(tl.int32)) <= allowed
            low = tl.where(few, middle, low)
            high = tl.where(few, high, middle)
        score = tl.where((score == threshold) & (number > low), LOWEST, score)
    return score


@triton.jit
def _places(taken):
    """Where each of those that are taken stands among them. taken [4, A]: number 4 a + b at [b, a]. A thread loads four
    numbers at once, so their sum stays within it, and only one for all four goes through the other threads."""
    counts = taken.to(tl.int32)
    together_A = tl.sum(counts, 0)
    return tl.cumsum(counts, 0) - counts + (tl.cumsum(together_A, 0) - together_A)[None, :]


@triton.jit
def decode_select_kernel(
    scores_TC, best_TG, pages_NP, sequence_T, visible_T, chosen_TG, picked_TM, rows_TM, P, M, C, G,
    PICKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """Picks of one query. chosen: the numbers of the groups that are left, at most CHOSEN."""
    t = tl.program_id(0).to(tl.int64)
    visible = tl.load(visible_T + t).to(tl.int32)
    pages_NP += tl.load(sequence_T + t).to(tl.int64) * P
    picked_TM += t * M
    rows_TM += t * M
    pick = tl.arange(0, PICKS)
    if visible > M:
        scores_TC += t * C
        best_TG += t * G
        chosen_TG += t * CHOSEN
        # Whole tiles were scored: four groups of 16 keys each. In steps of four, masks let a thread load four at once.
        groups = tl.cdiv(visible, 4 * GROUP) * 4
        four = tl.arange(0, 4)[:, None]
        # With few groups every one of them is left.
        threshold, reached = tl.full((), LOWEST, tl.int32), tl.full((), 0, tl.int32)
        if groups > CHOSEN:
            group = tl.arange(0, 16)[:, None] * (GROUPS // 16) + tl.arange(0, GROUPS // 16)[None, :]
            best = tl.load(best_TG + group, mask=group < groups, other=LOWEST)
            # What k columns reach is reached by k groups, and with many columns not by many more.
            if GROUPS // 16 >= PICKS:
                threshold, _ = _threshold(tl.max(best, 0), threshold, GROUPS, M, M + M // 8)
            threshold, reached = _threshold(best, threshold, _reaching(best, threshold), M, CHOSEN)
        group = 4 * tl.arange(0, GROUPS // 4)[None, :]
        real = group < groups
        group += four
        best = tl.load(best_TG + group, mask=real, other=LOWEST)
        taken = (_without_late_ties(best, group, threshold, reached, CHOSEN) >= threshold) & real
        tl.store(chosen_TG + _places(taken), group, mask=taken)
        count = tl.sum(taken.to(tl.int32))
        tl.debug_barrier()

        place = tl.arange(0, CHOSEN * GROUP // 4)[None, :]
        slot = place // (GROUP // 4)
        number = tl.load(chosen_TG + slot, mask=slot < count, other=0) * GROUP + place % (GROUP // 4) * 4 + four
        score = tl.load(scores_TC + number, mask=slot < count, other=LOWEST)
        threshold, reached = _threshold(score, threshold, CHOSEN * GROUP, M, M)
        taken = _without_late_ties(score, number, threshold, reached, M) >= threshold
        tl.store(picked_TM + _places(taken), number, mask=taken)
        tl.debug_barrier()
        number = tl.load(picked_TM + pick, mask=pick < M, other=-1)
    else:
        number = tl.where(pick < visible, pick, -1)
        tl.store(picked_TM + pick, number, mask=pick < M)
    page = tl.load(pages_NP + number // 32, mask=number >= 0, other=0)
    tl.store(rows_TM + pick, tl.where(number >= 0, page * 32 + number % 32, -1), mask=pick < M)


def for_hopper(q_TJI: Tensor, scales: Tensor | None) -> bool:
    """Whether the scores kernel of `hopper.py` runs: bfloat16 queries and packed keys of the published widths, and a GPU
    of that generation."""
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
    on_device = q_TJI.is_cuda
    multiprocessors = torch.cuda.get_device_properties(q_TJI.device).multi_processor_count if on_device else 2
    programs = triton.cdiv(multiprocessors * PROGRAMS_PER_MULTIPROCESSOR, num_queries)
    grid = min(columns // TILE, programs), num_queries
    rest = scales, pages_NP, sequence_T, visible_T, scores_TC, best_TG
    sizes = pages, picks, columns, columns // GROUP
    if for_hopper(q_TJI, scales):
        from leadline.ops.decode_indexer.hopper import decode_index_scores_hopper_kernel

        decode_index_scores_hopper_kernel[grid](q_TJI, weight_TJ, keys.view(torch.int32), *rest, *sizes, num_warps=4)
    else:
        decode_index_scores_kernel[grid](
            q_TJI, weight_TJ, keys, *rest, heads, *sizes,
            I=width, HEADS=max(16, triton.next_power_of_2(heads)), TILE=TILE, GROUP=GROUP, num_warps=4,
        )  # fmt: skip
    return scores_TC, best_TG


@torch.library.custom_op("leadline::decode_pick_entries", mutates_args=())
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
    scores_TC, best_TG = _scores(q_TJI, weight_TJ, keys, scales, pages_NP, sequence_T, visible_T, picks)
    picked_TM = torch.empty(num_queries, picks, dtype=torch.int32, device=q_TJI.device)
    rows_TM = torch.empty_like(picked_TM)
    most = triton.next_power_of_2(picks)
    groups = max(GROUP, triton.next_power_of_2(best_TG.shape[1]))
    chosen = min(max(CHOSEN, most), groups)
    chosen_TG = torch.empty(num_queries, chosen, dtype=torch.int32, device=q_TJI.device)
    decode_select_kernel[(num_queries,)](
        scores_TC, best_TG, pages_NP, sequence_T, visible_T, chosen_TG, picked_TM, rows_TM,
        pages, picks, scores_TC.shape[1], best_TG.shape[1],
        PICKS=most, GROUPS=groups, GROUP=GROUP, CHOSEN=chosen, num_warps=4 if groups * GROUP <= 2**14 else 8,
    )  # fmt: skip
    return picked_TM, rows_TM


@decode_pick_entries_kernel.register_fake
def _(
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
