"""Cases of norm, rotation and rounding in one pass: queries, keys and index queries, of a long segment and of a token.

The gate compares with float64, and rounding to a few bits amplifies what bfloat16 rounds on the way: about one value in
thirty lies so near to a border of E4M3, and one in a hundred of E2M1, that it falls to the other side, an eighth or a
half of itself away. So cases with a rounding are gated at 5e-2; that its bits are right is what the tests show. The
weight's gradient is FP32, but the reference rounds the gradient on its way back through the rotation to bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.ops.norm_rope import Rounding, norm_rope
from leadline.ops.rope import rotations
from leadline.recipes.bench_ops.case import TOKENS, Case, H, Inputs, K, R, moved, random

EPS = 1e-6
INDEX_HEADS, INDEX_WIDTH = 64, 128  # of V4-Flash
ROUNDED_TOLERANCE = 5e-2


def _case(
    name: str, heads: int, width: int, norm: bool, weighted: bool, rounding: Rounding | None, tokens: int, flops: int
) -> Case:
    """heads: 0 for one vector of each token. flops: of one value."""

    def inputs(count: int, device: torch.device) -> Inputs:
        x = random(count, heads, width, device=device) if heads else random(count, width, device=device)
        positions = torch.randint(0, 2**20, (count,), device=device)
        cos, sin = rotations(positions, torch.rand(R // 2, device=device))
        return [x, cos, sin, torch.rand(width, device=device) if weighted else None]

    def run(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None) -> Tensor:
        return norm_rope(x, cos, sin, weight=weight, eps=EPS if norm else None, rounding=rounding)

    vectors = tokens * max(1, heads)
    values = vectors * width
    forward, backward = moved(flops * values, 2 * values, (3 if norm else 2) * values, tokens * R)
    few = tokens == 1
    return Case(
        "norm_rope",
        f"{tokens:,} x {f'{heads} x ' if heads else ''}{width}, {name}",
        inputs,
        run,
        forward,
        None if few else backward,
        tokens=tokens,
        gate_tokens=(1, 3) if few else (1, 127, 4001),
        tolerance=ROUNDED_TOLERANCE if rounding else 5e-3,
        fp32_tolerance=2e-3,
        captured=64 if few else 0,
    )


CASES = tuple(
    case
    for tokens in (TOKENS, 1)
    for case in (
        _case("queries", H, K, True, False, None, tokens, 4),
        _case("keys in FP8", 0, K, True, True, "fp8", tokens, 8),
        _case("index queries in FP4", INDEX_HEADS, INDEX_WIDTH, False, False, "fp4", tokens, 12),
    )
)
