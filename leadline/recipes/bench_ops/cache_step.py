"""Cases of what a decoding step adds to a layer's cache: products, keys and entries of one token or of a batch.

They are captured, as a step is: the times of such kernels are mostly those of their starts. Every token finishes an
entry here, which of a true step one in four does, or one in 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.ops.cache_step import Finish, NewTokens, Tails, store_entries, store_keys
from leadline.ops.exact_linear import exact_linears
from leadline.ops.rope import rotations
from leadline.recipes.bench_ops.case import BF16, FP32, Case, Cost, D, Inputs, K, R, random

COUNTS = (1, 64)
GATE_TOKENS = (1, 3, 64)
SLOTS = {4: 8, 128: 128}  # of an entry


def _angles(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    positions = torch.randint(0, 2**20, (count,), device=device)
    return rotations(positions, torch.rand(R // 2, device=device))


def _keys(count: int) -> Case:
    def inputs(tokens: int, device: torch.device) -> Inputs:
        x_TK, weight_K = random(tokens, K, device=device), random(K, device=device)
        rows_T = torch.randperm(tokens, device=device)
        return [x_TK, weight_K, *_angles(tokens, device), rows_T, torch.zeros_like(x_TK)]

    def run(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, target: Tensor) -> Tensor:
        store_keys(x, Finish(weight, 1e-6, cos, sin, None), rows, target)
        return target

    return Case(
        "cache_step", f"{count} x {K}: window keys", inputs, run, Cost(6 * count * K, 2 * count * K * BF16), None,
        tokens=count, gate_tokens=GATE_TOKENS, captured=24,
    )  # fmt: skip


def _entries(count: int, ratio: int) -> Case:
    columns, slots = K * (2 if ratio == 4 else 1), SLOTS[ratio]

    def inputs(tokens: int, device: torch.device) -> Inputs:
        made = [torch.randn(rows, columns, device=device) for rows in (tokens, tokens, ratio)]
        tails = [torch.randn(tokens * slots, columns, device=device) for _ in range(2)]
        first_T = slots * torch.arange(tokens, device=device)
        slots_TG = first_T[:, None] + torch.arange(slots, device=device)
        slots_TG[:, -1] = tokens * slots + torch.arange(tokens, device=device)
        weight_K, positions_T = random(K, device=device), torch.full((tokens,), 1023, device=device)
        target = torch.zeros(tokens, K, dtype=torch.bfloat16, device=device)
        rest = first_T + slots - 1, slots_TG, weight_K, *_angles(tokens, device), torch.arange(tokens, device=device)
        return [*made, positions_T, *tails, *rest, target]

    def run(
        values: Tensor, scores: Tensor, ape: Tensor, positions: Tensor, tail_values: Tensor, tail_scores: Tensor,
        tail_rows: Tensor, slots: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, rows: Tensor,
        target: Tensor,
    ) -> Tensor:  # fmt: skip
        new, tails = NewTokens(values, scores, ape, positions), Tails(tail_values, tail_scores, tail_rows)
        store_entries(new, tails, slots, target.dtype, Finish(weight, 1e-6, cos, sin, None), rows, target)
        return target

    read = 2 * count * K * slots * FP32
    return Case(
        "cache_step", f"{count} x {K}: entries of {ratio} tokens", inputs, run,
        Cost(6 * count * K * slots, read + 4 * count * columns * FP32), None,
        tokens=count, gate_tokens=GATE_TOKENS, captured=24 if count == 1 else 8,
    )  # fmt: skip


def _products(count: int, columns: int) -> Case:
    def inputs(tokens: int, device: torch.device) -> Inputs:
        return [random(rows, D, device=device) for rows in (tokens, columns, columns)]

    def run(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        return exact_linears(x.detach(), (first.detach(), second.detach()))

    return Case(
        "exact_linear", f"{count} x {D} x 2 x {columns:,}", inputs, run,
        Cost(4 * count * D * columns, 2 * columns * D * BF16 + 2 * count * columns * FP32), None,
        tokens=count, gate_tokens=(1, 17, 64), captured=12,
    )  # fmt: skip


CASES = (
    *(_keys(count) for count in COUNTS),
    *(_entries(count, ratio) for ratio in SLOTS for count in COUNTS),
    *(_products(count, columns) for columns in (1024, 512, 256) for count in COUNTS),
)
