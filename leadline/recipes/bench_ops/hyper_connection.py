"""Cases of the residual streams: into a sublayer, out of it, and together at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.ops.hyper_connection import mix_head, mix_in, mix_out
from leadline.recipes.bench_ops.case import TOKENS, Case, D, Inputs, S, moved, random

ROUNDS, EPS = 20, 1e-6
STREAMS, VECTORS = TOKENS * S * D, TOKENS * D  # values of all streams, and of one vector for each token
PROJECTION = 2 * STREAMS * (2 + S) * S


def _parameters(rows: int, scales: int, device: torch.device) -> Inputs:
    width = S * D
    return [
        torch.randn(rows, width, device=device) * width**-0.5,
        torch.randn(rows, device=device),
        1 + 0.3 * torch.randn(scales, device=device),
    ]


def into(tokens: int, device: torch.device) -> Inputs:
    return [random(tokens, S, D, device=device), *_parameters((2 + S) * S, 3, device)]


def _out_of(tokens: int, device: torch.device) -> Inputs:
    return [
        random(tokens, S, D, device=device),
        random(tokens, D, device=device),
        2 * torch.rand(tokens, S, device=device),
        torch.rand(tokens, S, S, device=device) / S,
    ]


def _mix_in() -> Case:
    return Case(
        "hyper_connection",
        f"into a sublayer, {TOKENS:,} x {S} x {D}",
        into,
        lambda x, fn, base, scale: mix_in(x, fn, base, scale, ROUNDS, EPS, EPS),
        *moved(PROJECTION, STREAMS + VECTORS, 3 * STREAMS + VECTORS),
        fp32_tolerance=5e-4,  # in the gradient of scale much cancels
    )


def _mix_out() -> Case:
    return Case(
        "hyper_connection",
        f"out of a sublayer, {TOKENS:,} x {S} x {D}",
        _out_of,
        mix_out,
        *moved(2 * STREAMS * (S + 1), 2 * STREAMS + VECTORS, 3 * STREAMS + 2 * VECTORS),
    )


def _mix_head() -> Case:
    return Case(
        "hyper_connection",
        f"together at the end, {TOKENS:,} x {S} x {D}",
        lambda tokens, device: [random(tokens, S, D, device=device), *_parameters(S, 1, device)],
        lambda x, fn, base, scale: mix_head(x, fn, base, scale, EPS, EPS),
        *moved(2 * STREAMS * S, STREAMS + VECTORS, 2 * STREAMS + VECTORS),
    )


def _both_sublayers() -> Case:
    """All four stages of a block, each around a sublayer that hands its input back."""

    def run(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> Tensor:
        for _ in range(2):
            x, y, post, comb = mix_in(x, fn, base, scale, ROUNDS, EPS, EPS)
            x = mix_out(x, y, post, comb)
        return x

    return Case(
        "hyper_connection",
        f"both sublayers of a block, {TOKENS:,} x {S} x {D}",
        into,
        run,
        *moved(
            2 * (PROJECTION + 2 * STREAMS * (S + 1)), 2 * (3 * STREAMS + 2 * VECTORS), 2 * (5 * STREAMS + 3 * VECTORS)
        ),
        # The streams are rounded in between, which moves everything behind.
        tolerance=1e-2,
        fp32_tolerance=3e-2,
    )


CASES = (_mix_in(), _mix_out(), _mix_head(), _both_sublayers())
