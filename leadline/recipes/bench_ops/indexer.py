"""Cases of the lightning indexer and its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leadline.ops.indexer_loss import indexer_loss
from leadline.ops.lightning_indexer import pick_entries
from leadline.ops.reach import Reach
from leadline.recipes.bench_ops.case import BF16, FP32, TOKENS, Case, Cost, H, Inputs, K, random

HEADS, WIDTH, RATIO, PICKS = 64, 128, 4, 512  # of V4-Flash's indexer


def _runs(tokens: int, past: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First entry and number of visible entries of the new tokens of one sequence, in a CSA layer."""
    visible_T = torch.arange(past + 1, past + tokens + 1, device=device) // RATIO
    return torch.zeros_like(visible_T), visible_T


def _reach(first_entry_T: Tensor, visible_T: Tensor, past: int) -> Reach:
    """The window keys play no role here."""
    tokens = len(visible_T)
    return Reach((tokens,), first_entry_T, first_entry_T, first_entry_T, visible_T, (past + tokens) // RATIO)


def _entries_seen(tokens: int, past: int) -> int:
    return sum((past + t + 1) // RATIO for t in range(tokens))


def _pick_entries(tokens: int, past: int) -> Case:
    """Useful products: those with visible entries; useful bytes: the keys once, queries and picks."""

    def inputs(count: int, device: torch.device) -> Inputs:
        entries = max(1, (past + count) // RATIO)
        weight_TJ = torch.randn(count, HEADS, device=device)
        q_TJI, keys_CI = random(count, HEADS, WIDTH, device=device), random(entries, WIDTH, device=device)
        return [q_TJI, weight_TJ, keys_CI, *_runs(count, past, device)]

    def whole_numbers(count: int, device: torch.device) -> Inputs:
        """Scores that are exact in FP32 whatever the order of the sum, so that the picks must be equal."""
        *operands, first_entry_T, visible_T = inputs(count, device)
        return [*(x.clamp(-3, 3).round() for x in operands if x is not None), first_entry_T, visible_T]

    def run(q_TJI: Tensor, weight_TJ: Tensor, keys_CI: Tensor, first_entry_T: Tensor, visible_T: Tensor) -> Tensor:
        return pick_entries(q_TJI, weight_TJ, keys_CI, _reach(first_entry_T, visible_T, past), PICKS)

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
        captured=int(tokens == 1),
    )


def _indexer_loss(dense: bool) -> Case:
    """Useful products forward: index scores and attention masses; backward: of the products, of queries and of keys."""

    def inputs(count: int, device: torch.device, heads: int = H) -> Inputs:
        entries, runs = max(1, count // RATIO), _runs(count, 0, device)
        return [
            random(count, HEADS, WIDTH, device=device),
            torch.randn(count, HEADS, device=device) * (HEADS * WIDTH) ** -0.5,
            random(entries, WIDTH, device=device),
            random(count, heads, K, device=device),
            random(entries, K, device=device),
            torch.randn(count, heads, device=device) + 7,
            *runs,
            None if dense else _latest(runs[1]),
        ]

    def run(q: Tensor, weight: Tensor, keys: Tensor, *rest: Any) -> Tensor:
        attention_q, entries, lse, first_entry_T, visible_T, picked_TM = rest
        reach = _reach(first_entry_T, visible_T, 0)
        return indexer_loss(q, weight, keys, attention_q, entries, lse, reach, picked_TM)

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


def _latest(visible_T: Tensor) -> Tensor:
    """The last entries that each query sees, ascending, -1 behind them."""
    place = torch.arange(PICKS, device=visible_T.device)
    number_TM = (visible_T[:, None] - PICKS).clamp_min(0) + place
    return torch.where(number_TM < visible_T[:, None], number_TM, -1)


CASES = (
    _pick_entries(65536, 0),
    _pick_entries(1, 2**20 - 1),
    _indexer_loss(dense=False),
    _indexer_loss(dense=True),
)
