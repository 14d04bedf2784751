"""Cases of products with weights in eight and four bits: a dense one, the experts of a long prompt and of decoding.

Against the ceiling of a bfloat16 product, an eight-bit one may reach more than all of it. Decoding is timed as it runs,
as a captured graph, over steps that pick other experts each time, so that no weight is found in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.ops.quantized_linear import QuantizedWeight, quantize, quantized_grouped_linear, quantized_linear
from leadline.recipes.bench_ops.case import BF16, TOKENS, A, Case, Cost, D, E, F, Inputs, random

STEPS = 8
FP4 = 17 / 32  # bytes of a value: half a byte, and a byte of scale for 32
GATE_WIDTH, GATE_HIDDEN = 512, 256


def _linear() -> Case:
    def inputs(tokens: int, device: torch.device) -> Inputs:
        weight = quantize(random(D, D, device=device), "fp8")
        return [random(tokens, D, device=device), weight.codes.view(torch.uint8), weight.scale.view(torch.uint8)]

    def run(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return quantized_linear(x, QuantizedWeight(codes.view(torch.float8_e4m3fn), scale))

    flops, moved = 2 * TOKENS * D * D, 2 * TOKENS * D * BF16 + D * D
    return Case(
        "quantized_linear",
        f"{TOKENS:,} x {D} to {D}, FP8",
        inputs,
        run,
        Cost(flops, moved),
        Cost(flops, moved),
        ceiling="matmul",
    )


def _experts(rows: int, columns: int, device: torch.device) -> list[Tensor]:
    """Codes, scales and block scales of a random stack in FP4."""
    codes = torch.randint(0, 256, (E, rows, columns // 2), dtype=torch.uint8, device=device)
    scale = torch.randint(118, 122, (E, rows, columns // 32), dtype=torch.uint8, device=device)
    block_scale = QuantizedWeight.of(codes, scale).block_scale
    assert block_scale is not None
    return [codes, scale, block_scale]


def _counts(tokens: int, device: torch.device) -> Tensor:
    """Rows of each expert when every token picks A different ones at random."""
    return torch.bincount(torch.rand(tokens, E, device=device).argsort(1)[:, :A].flatten(), minlength=E)


def _prompt() -> Case:
    def inputs(tokens: int, device: torch.device, width: int = D, hidden: int = F) -> Inputs:
        stacks = _experts(hidden, width, device) + _experts(hidden, width, device)
        return [random(tokens * A, width, device=device), _counts(tokens, device), *stacks]

    def run(x: Tensor, counts: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        return quantized_grouped_linear(x, [QuantizedWeight(*parts[:3]), QuantizedWeight(*parts[3:])], counts)

    pairs = TOKENS * A
    return Case(
        "quantized_linear",
        f"{TOKENS:,} x {A} rows, {E} experts, {D} to 2 x {F}, FP4",
        inputs,
        run,
        Cost(4 * pairs * D * F, pairs * (D + 2 * F) * BF16 + 2 * E * D * F * FP4),
        None,
        ceiling="matmul",
        gate_inputs=lambda tokens, device: inputs(tokens, device, GATE_WIDTH, GATE_HIDDEN),
    )


def _decode(tokens: int) -> Case:
    def inputs(tokens: int, device: torch.device, width: int = D, hidden: int = F) -> Inputs:
        return [
            random(tokens * A, width, device=device),
            random(tokens * A, hidden, device=device),
            torch.stack([_counts(tokens, device) for _ in range(STEPS)]),
            *_experts(hidden, width, device),
            *_experts(hidden, width, device),
            *_experts(width, hidden, device),
        ]

    @torch.no_grad()
    def run(x: Tensor, hidden: Tensor, counts_of_step: Tensor, *parts: Tensor) -> list[Tensor]:
        w1, w3, w2 = (QuantizedWeight(*parts[place : place + 3]) for place in (0, 3, 6))
        results: list[Tensor] = []
        for counts in counts_of_step:
            results += quantized_grouped_linear(x, [w1, w3], counts)
            results += quantized_grouped_linear(hidden, [w2], counts)
        return results

    visited = E * (1 - (1 - A / E) ** tokens)  # experts, on average
    weights, vectors = 3 * visited * D * F * FP4, tokens * A * 2 * (D + F) * BF16
    return Case(
        "quantized_linear",
        f"decoding, {tokens} token{'s' * (tokens > 1)} x {A} of {E} experts, w1, w3 and w2, FP4, {STEPS} steps",
        inputs,
        run,
        Cost(STEPS * 6 * tokens * A * D * F, STEPS * (weights + vectors)),
        None,
        tokens=tokens,
        gate_tokens=(1, 5, 16),
        gate_inputs=lambda tokens, device: inputs(tokens, device, GATE_WIDTH, GATE_HIDDEN),
        captured=1,
    )


CASES = (_linear(), _prompt(), _decode(1), _decode(4), _decode(16))
