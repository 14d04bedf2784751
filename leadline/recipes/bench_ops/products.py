"""Cases of the large matrix products: experts, and the vocabulary with its loss."""

from __future__ import annotations

import torch

from leadline.ops.cross_entropy import cross_entropy
from leadline.ops.grouped_linear import grouped_linear
from leadline.recipes.bench_ops.case import TOKENS, A, Case, D, E, F, Inputs, V, moved, random


def _grouped_linear() -> Case:
    def inputs(tokens: int, device: torch.device, width: int = D, hidden: int = F) -> Inputs:
        weight_EFD = random(E, hidden, width, device=device) * width**-0.5
        # Random routing: every expert is as likely as any other.
        counts_E = torch.bincount(torch.randint(0, E, (tokens * A,), device=device), minlength=E)
        return [random(tokens * A, width, device=device), weight_EFD, counts_E]

    flops, rows = 2 * TOKENS * A * D * F, TOKENS * A * (D + F)
    return Case(
        "grouped_linear",
        f"{TOKENS:,} x {A} rows, {E} experts, {D} to {F}",
        inputs,
        grouped_linear,
        *moved(flops, rows + E * D * F, 2 * rows + 2 * E * D * F),
        ceiling="matmul",
        gate_inputs=lambda tokens, device: inputs(tokens, device, 512, 256),
    )


def _cross_entropy() -> Case:
    def inputs(tokens: int, device: torch.device, width: int = D, vocabulary: int = V) -> Inputs:
        targets_T = torch.randint(-1, vocabulary, (tokens,), device=device)
        weight_VD = random(vocabulary, width, device=device) * width**-0.5
        return [random(tokens, width, device=device), weight_VD, targets_T]

    return Case(
        "cross_entropy",
        f"{TOKENS:,} x {D}, vocabulary of {V:,}",
        inputs,
        cross_entropy,
        *moved(2 * TOKENS * D * V, D * (TOKENS + V), 2 * D * (TOKENS + V)),
        ceiling="matmul",
        gate_inputs=lambda tokens, device: inputs(tokens, device, 512, 20000),
    )


CASES = (_grouped_linear(), _cross_entropy())
