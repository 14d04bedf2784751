"""Cases of a decoding step: what a layer does with one token around its attention and its experts' products.

Each is a few microseconds long and is called once or twice in every layer, with weights of its own. So it is timed in a
captured graph of several calls, whose weights together are larger than the L2 cache where there are any. The floor is
the bytes of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.ops.exact_linear import exact_linear
from leadline.ops.hyper_connection import mix_in_norm
from leadline.ops.route import route
from leadline.recipes.bench_ops.case import BF16, FP32, A, Case, Cost, D, E, Inputs, S, random
from leadline.recipes.bench_ops.hyper_connection import EPS, ROUNDS, into

GATE_TOKENS = (1, 3, 8, 16, 17, 64)
LAYERS = 43


def _separate(tokens: int, device: torch.device) -> Inputs:
    """Logits and a bias that leave no two scores so near to each other that rounding could swap them."""
    places = torch.rand(tokens, E, device=device).argsort(1)
    return [places * (8.0 / E) - 4.0, (torch.arange(E, device=device) % 4 == 1) * 10.0]


def _route_of(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    found = route(logits, bias.detach(), None, A, 1.5)
    return *found[:3], *found.order


def _route(tokens: int) -> Case:
    values = tokens * (2 * E + A) * FP32
    return Case(
        "route",
        f"{tokens:,} x {A} of {E} experts",
        _separate,
        _route_of,
        Cost(0, values),
        Cost(0, values + tokens * E * FP32) if tokens > 1 else None,
        tokens=tokens,
        gate_tokens=(1, 8, 9, 127, 4001),
        captured=LAYERS if tokens == 1 else 0,
    )


def _router_product() -> Case:
    return Case(
        "exact_linear",
        f"1 x {D} to {E} logits",
        lambda tokens, device: [random(tokens, D, device=device), random(E, D, device=device)],
        lambda x, weight: exact_linear(x.detach(), weight.detach()),
        Cost(2 * D * E, E * D * BF16 + E * FP32),
        None,
        tokens=1,
        gate_tokens=(1, 3, 4),
        fp32_tolerance=1e-5,
        captured=LAYERS,
    )


def _mix_in_norm() -> Case:
    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        x, fn, base, scale, weight = (x.detach() for x in inputs)
        return mix_in_norm(x, fn, base, scale, weight, ROUNDS, EPS, EPS, EPS)[1:]

    values = (2 + S) * S * S * D
    return Case(
        "hyper_connection",
        f"into a sublayer with its norm, 1 x {S} x {D}",
        lambda tokens, device: [*into(tokens, device), random(D, device=device)],
        run,
        Cost(2 * values, values * FP32 + (S + 2) * D * BF16),
        None,
        tokens=1,
        gate_tokens=GATE_TOKENS,
        tolerance=8e-3,  # two roundings
        captured=LAYERS,
    )


CASES = (_route(1), _route(8192), _router_product(), _mix_in_norm())
