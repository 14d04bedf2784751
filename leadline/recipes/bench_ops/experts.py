"""Cases of the experts' way there and back: the order of the pairs, the rows of each expert, the sum for each token."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.ops.token_permutation import ExpertOrder, combine, dispatch, expert_order
from leadline.recipes.bench_ops.case import BF16, FP32, TOKENS, A, Case, Cost, D, E, Inputs, random

INT64 = 8  # bytes
PAIRS = TOKENS * A


def _choices(tokens: int, device: torch.device) -> Tensor:
    """Random routing: A different experts for each token, every one as likely as any other."""
    return torch.rand(tokens, E, device=device).argsort(1)[:, :A]


def _order(tokens: int, device: torch.device) -> Inputs:
    return list(expert_order(_choices(tokens, device), E))


def _expert_order() -> Case:
    return Case(
        "token_permutation",
        f"order of {TOKENS:,} x {A} pairs, {E} experts",
        lambda tokens, device: [_choices(tokens, device)],
        lambda experts: expert_order(experts, E),
        Cost(0, 3 * PAIRS * INT64),
        None,
    )


def _dispatch() -> Case:
    def inputs(tokens: int, device: torch.device) -> Inputs:
        return [random(tokens, D, device=device), *_order(tokens, device)]

    return Case(
        "token_permutation",
        f"to experts, {TOKENS:,} x {A} rows of {D}",
        inputs,
        lambda x, *order: dispatch(x, ExpertOrder(*order)),
        Cost(0, (TOKENS + PAIRS) * D * BF16 + PAIRS * INT64),
        Cost(PAIRS * D, (TOKENS + PAIRS) * D * BF16 + PAIRS * INT64),
    )


def _combine() -> Case:
    def inputs(tokens: int, device: torch.device) -> Inputs:
        return [random(tokens * A, D, device=device), *_order(tokens, device)]

    moved = PAIRS * D * BF16 + TOKENS * D * FP32 + PAIRS * INT64
    return Case(
        "token_permutation",
        f"from experts, {TOKENS:,} x {A} rows of {D}",
        inputs,
        lambda y, *order: combine(y, ExpertOrder(*order)),
        Cost(PAIRS * D, moved),
        Cost(0, moved),
    )


CASES = (_expert_order(), _dispatch(), _combine())
