"""Cases of the ops that look at one row at a time: RMS norm, rotation, SwiGLU."""

from __future__ import annotations

import torch

from leadline.ops.rms_norm import rms_norm
from leadline.ops.rope import rope, rotations
from leadline.ops.swiglu import swiglu
from leadline.recipes.bench_ops.case import TOKENS, A, Case, D, F, H, Inputs, K, R, moved, random


def _rms_norm() -> Case:
    values = TOKENS * D
    return Case(
        "rms_norm",
        f"{TOKENS:,} x {D}",
        lambda tokens, device: [random(tokens, D, device=device), torch.randn(D, device=device)],
        lambda x, weight: rms_norm(x, weight, 1e-6),
        *moved(4 * values, 2 * values, 3 * values),
    )


def _query_norm() -> Case:
    values = TOKENS * H * K
    return Case(
        "rms_norm",
        f"{TOKENS:,} x {H} x {K}, weightless",
        lambda tokens, device: [random(tokens, H, K, device=device)],
        lambda x: rms_norm(x, None, 1e-6),
        *moved(3 * values, 2 * values, 3 * values),
    )


def _rope() -> Case:
    def inputs(tokens: int, device: torch.device) -> Inputs:
        positions = torch.randint(0, 2**20, (tokens,), device=device)
        return [random(tokens, H, K, device=device), *rotations(positions, torch.rand(R // 2, device=device))]

    values = TOKENS * H * K
    return Case(
        "rope",
        f"{TOKENS:,} x {H} x {K}, last {R} rotated",
        inputs,
        rope,
        *moved(3 * TOKENS * H * R, 2 * values, 2 * values, TOKENS * R),
    )


def _swiglu() -> Case:
    values = TOKENS * A * F
    return Case(
        "swiglu",
        f"{TOKENS * A:,} x {F}, gate weights",
        lambda tokens, device: [
            random(tokens * A, F, device=device) * 4,
            random(tokens * A, F, device=device) * 4,
            torch.rand(tokens * A, device=device),
        ],
        lambda gate, up, scale: swiglu(gate, up, 10.0, scale),
        *moved(10 * values, 3 * values, 5 * values, TOKENS * A),
    )


CASES = (_rms_norm(), _query_norm(), _rope(), _swiglu())
