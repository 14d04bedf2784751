"""Cases of the residual streams' way into and out of a sublayer."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.ops.hyper_connection import mix_in, mix_out
from leadline.recipes.bench_ops.case import TOKENS, Case, D, Inputs, S, moved, random


def _streams(tokens: int, device: torch.device) -> Inputs:
    rows, width = (2 + S) * S, S * D
    return [
        random(tokens, S, D, device=device),
        torch.randn(rows, width, device=device) * width**-0.5,
        torch.randn(rows, device=device),
        1 + 0.3 * torch.randn(3, device=device),
    ]


def _mix_in() -> Case:
    stream, tokens = TOKENS * S * D, TOKENS * D
    projection = 2 * stream * (2 + S) * S
    return Case(
        "hyper_connection",
        f"into a sublayer, {TOKENS:,} x {S} x {D}",
        _streams,
        lambda x, fn, base, scale: mix_in(x, fn, base, scale, 20, 1e-6, 1e-6),
        *moved(projection, stream + tokens, 2 * stream + tokens),
    )


def _mix_out() -> Case:
    stream, tokens = TOKENS * S * D, TOKENS * D
    return Case(
        "hyper_connection",
        f"out of a sublayer, {TOKENS:,} x {S} x {D}",
        lambda tokens, device: [
            random(tokens, S, D, device=device),
            random(tokens, D, device=device),
            2 * torch.rand(tokens, S, device=device),
            torch.rand(tokens, S, S, device=device),
        ],
        mix_out,
        *moved(2 * stream * (S + 1), 2 * stream + tokens, 3 * stream + 2 * tokens),
    )


def _both_sublayers() -> Case:
    """All four stages of a block, each around a sublayer that hands its input back."""

    def run(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> Tensor:
        for _ in range(2):
            y, post, comb = mix_in(x, fn, base, scale, 20, 1e-6, 1e-6)
            x = mix_out(x, y, post, comb)
        return x

    stream, tokens = TOKENS * S * D, TOKENS * D
    return Case(
        "hyper_connection",
        f"both sublayers of a block, {TOKENS:,} x {S} x {D}",
        _streams,
        run,
        *moved(4 * stream * ((2 + S) * S + S + 1), 2 * (3 * stream + 2 * tokens), 2 * (5 * stream + 3 * tokens)),
        # The streams are rounded in between, which moves everything behind.
        tolerance=1e-2,
        fp32_tolerance=1e-2,
    )


CASES = (_mix_in(), _mix_out(), _both_sublayers())
