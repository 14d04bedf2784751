"""Cases of the lightning indexer and its loss."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.ops.indexer_loss import indexer_loss
from leadline.ops.lightning_indexer import pick_entries
from leadline.ops.reach import Reach
from leadline.recipes.bench_ops.case import BF16, FP32, TOKENS, Case, Cost, H, Inputs, K, random

HEADS, WIDTH, RATIO, PICKS = 64, 128, 4, 512  # of V4-Flash's indexer


def _reach(tokens: int, past: int, device: torch.device) -> Reach:
    """The new tokens of one sequence, in a CSA layer."""
    position_T = torch.arange(past, past + tokens, device=device)
    visible_T = (position_T + 1) // RATIO
    nothing_T = torch.zeros_like(position_T)
    return Reach((tokens,), nothing_T, nothing_T, nothing_T, visible_T, (past + tokens) // RATIO)


def _entries_seen(tokens: int, past: int) -> int:
    return sum((past + t + 1) // RATIO for t in range(tokens))


def _pick_entries(tokens: int, past: int) -> Case:
    """Useful products: those with visible entries; useful bytes: the keys once, queries and picks."""

    def inputs(count: int, device: torch.device) -> Inputs:
        entries = max(1, (past + count) // RATIO)
        weight_TJ = torch.randn(count, HEADS, device=device)
        return [random(count, HEADS, WIDTH, device=device), weight_TJ, random(entries, WIDTH, device=device)]

    def whole_numbers(count: int, device: torch.device) -> Inputs:
        """Scores that are exact in FP32 whatever the order of the sum, so that the picks must be equal."""
        return [x.clamp(-3, 3).round() if x is not None else None for x in inputs(count, device)]

    def run(q_TJI: Tensor, weight_TJ: Tensor, keys_CI: Tensor) -> Tensor:
        return pick_entries(q_TJI, weight_TJ, keys_CI, _reach(len(q_TJI), past, q_TJI.device), PICKS)

    entries, seen = (past + tokens) // RATIO, _entries_seen(tokens, past)
    moved = (tokens * HEADS * WIDTH + entries * WIDTH) * BF16 + tokens * (HEADS * FP32 + min(PICKS, entries) * 8)
    return Case(
        "lightning_indexer",
        f"{tokens:,} token{'s' * (tokens > 1)}, {entries:,} entries, top {PICKS}, {HEADS} heads of {WIDTH}",
        inputs,
        run,
        Cost(2 * HEADS * WIDTH * seen, moved),
        None,
        ceiling="matmul" if tokens > HEADS else "copy",
        tokens=tokens,
        gate_tokens=(1, 127, 4001) if tokens > 1 else (1, 3),
        gate_inputs=whole_numbers,
    )


def _indexer_loss(dense: bool) -> Case:
    """Useful products forward: index scores and attention masses; backward: of the products, of queries and of keys."""

    def inputs(count: int, device: torch.device, heads: int = H) -> Inputs:
        entries = max(1, count // RATIO)
        return [
            random(count, HEADS, WIDTH, device=device),
            torch.randn(count, HEADS, device=device) * (HEADS * WIDTH) ** -0.5,
            random(entries, WIDTH, device=device),
            random(count, heads, K, device=device),
            random(entries, K, device=device),
            torch.randn(count, heads, device=device) + 7,
        ]

    def run(q: Tensor, weight: Tensor, keys: Tensor, attention_q: Tensor, entries: Tensor, lse: Tensor) -> Tensor:
        reach = _reach(len(q), 0, q.device)
        return indexer_loss(q, weight, keys, attention_q, entries, lse, reach, None if dense else _latest(reach))

    pairs = sum(min((t + 1) // RATIO, TOKENS if dense else PICKS) for t in range(TOKENS))
    index, attention = 2 * HEADS * WIDTH * pairs, 2 * H * K * pairs
    values = TOKENS * (HEADS * WIDTH + H * K) + TOKENS // RATIO * (WIDTH + K)
    return Case(
        "indexer_loss",
        f"{TOKENS:,} tokens, {'all visible entries' if dense else f'{PICKS} picks'}",
        inputs,
        run,
        Cost(index + attention, values * BF16),
        Cost(3 * index + (attention if dense else 0), 2 * values * BF16),
        ceiling="matmul",
        gate_inputs=lambda count, device: inputs(count, device, 16 if count > 1000 else H),
        tolerance=6e-3,
    )


def _latest(reach: Reach) -> Tensor:
    """The last entries that each query sees, ascending, -1 behind them."""
    assert reach.visible_T is not None
    place = torch.arange(min(PICKS, reach.most_visible or 0), device=reach.visible_T.device)
    number_TM = (reach.visible_T[:, None] - PICKS).clamp_min(0) + place
    return torch.where(number_TM < reach.visible_T[:, None], number_TM, -1)


CASES = (
    _pick_entries(65536, 0),
    _pick_entries(1, 2**20 - 1),
    _indexer_loss(dense=False),
    _indexer_loss(dense=True),
)
