"""Cases of sparse attention: CSA with picked entries, HCA with all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leadline.ops.reach import Reach
from leadline.ops.sparse_attention import sparse_attention
from leadline.recipes.bench_ops.case import BF16, Case, Cost, H, Inputs, K, random


def _attention(tokens: int, ratio: int, picks: int, gate: bool = True) -> Case:
    """One sequence at V4-Flash's width: window 128, 64 heads of 512, and picked entries (CSA) or all of them (HCA)."""

    def inputs(count: int, device: torch.device, heads: int = H) -> Inputs:
        position_T = torch.arange(count, device=device)
        visible_T = (position_T + 1) // ratio
        vectors = [random(count, heads, K, device=device), random(count, K, device=device)]
        vectors.append(random(max(1, count // ratio), K, device=device))
        runs = (position_T - 127).clamp_min(0), position_T, torch.zeros_like(position_T), visible_T
        return [*vectors, torch.randn(heads, device=device), *runs, _spread_picks(visible_T, picks) if picks else None]

    def run(q: Tensor, keys: Tensor, entries: Tensor, sink: Tensor, *rest: Any) -> Tensor:
        *runs, picked_TM = rest
        return sparse_attention(q, keys, entries, sink, Reach((len(q),), *runs), picked_TM)[0]

    seen = sum(min(t + 1, 128) + min((t + 1) // ratio, picks or tokens) for t in range(tokens))
    flops = 4 * H * K * seen
    return Case(
        "sparse_attention",
        f"{'CSA' if picks else 'HCA'}, {tokens:,} tokens, {H} heads of {K}",
        inputs,
        run,
        Cost(flops, 2 * tokens * H * K * BF16),
        Cost(2.5 * flops, 4 * tokens * H * K * BF16),
        ceiling="matmul",
        tokens=tokens,
        gate_tokens=(1, 127, 4001) if gate else (257,),
        gate_inputs=lambda count, device: inputs(count, device, 16 if count > 1000 else H),
        # A single token has one key for all heads: what is rounded in its gradient is not averaged over others.
        tolerance=8e-3,
        fp32_tolerance=4e-3,  # of the sink: a sum over gradients in bfloat16
    )


def _spread_picks(visible_T: Tensor, picks: int) -> Tensor:
    """Entries spread evenly over what each query sees, all of them while they are few: ascending, -1 behind."""
    place = torch.arange(picks, device=visible_T.device)
    few = torch.where(place < visible_T[:, None], place, -1)
    return torch.where(visible_T[:, None] > picks, place * visible_T[:, None] // picks, few)


CASES = (
    _attention(8192, 4, 512),
    _attention(8192, 128, 0),
    _attention(32768, 4, 512, gate=False),
    _attention(32768, 128, 0, gate=False),
)
