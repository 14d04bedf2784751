"""Cases of the compressor's pooling, at both ratios."""

from __future__ import annotations

import torch

from leadline.ops.gated_pool import gated_pool
from leadline.recipes.bench_ops.case import FP32, TOKENS, Case, Cost, Inputs, K


def _gated_pool(ratio: int, overlap: bool) -> Case:
    columns = 2 * K if overlap else K

    def inputs(tokens: int, device: torch.device) -> Inputs:
        entries = max(1, tokens // ratio)
        first_C1 = ratio * torch.arange(entries, device=device)[:, None]
        rows_CG = first_C1 + torch.arange(-ratio if overlap else 0, ratio, device=device)
        rows_CG = rows_CG.clamp_min(-1)  # the first entry has no window before its own
        return [*(torch.randn(entries * ratio, columns, device=device) for _ in range(2)), rows_CG]

    values, entries = TOKENS * columns, TOKENS // ratio * K
    return Case(
        "gated_pool",
        f"{TOKENS:,} tokens to {TOKENS // ratio:,} entries",
        inputs,
        lambda values, scores, rows: gated_pool(values, scores, rows, K),
        Cost(8 * values, (2 * values + entries) * FP32),
        Cost(16 * values, (4 * values + entries) * FP32),
        gate_tokens=(1, 127 * ratio, 4001),
    )


CASES = (_gated_pool(4, overlap=True), _gated_pool(128, overlap=False))
