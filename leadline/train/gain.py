"""Composite gain: how much the residual mixing alone amplifies a signal over depth.

Between two sublayers the streams are multiplied by H = comb^T (`model/hyper_connections.py`), so what the residual path
alone does to a signal from the bottom up to sublayer l is the product

    C_l = H_l H_(l-1) ... H_1        S x S, one for each token

The mHC paper (arXiv 2512.24880) measures it by two numbers, both 1 for a plain residual connection:

    forward gain  = largest absolute row sum of C_l       the most that a stream can grow on the way up
    backward gain = largest absolute column sum of C_l    the most that a gradient can grow on the way down

It reports about 1.6 at most for mHC, and about 3000 for the unconstrained mixing of hyper-connections, in a 27B model.

The unconstrained counterpart here uses the very same logits A without the Sinkhorn projection: H = exp(A)^T / c, with
the one constant c that makes it doubly stochastic at the start of training. Both kinds then start as the same matrix,
and all that differs is whether the drift of A since then may change row and column sums. A drift multiplies up with
depth: sums that are 5% off in each of 64 sublayers are a gain of 1.05^64 = 23.

What this does not tell: logits trained without the projection take another path, because only then does the loss feel
their sums. The counterpart shows what the projection removes from this model, and overstates what another training run
would become (docs/decisions/0003: 10^8 and more where training without the projection gives 10^2).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp
from typing import Any

import torch
from torch import Tensor

from leadline.model.block import Block
from leadline.model.hyper_connections import HyperConnection
from leadline.model.init import COMB_DIAGONAL
from leadline.model.linear import Norm
from leadline.model.segment import Segment
from leadline.model.transformer import Transformer
from leadline.ops.sinkhorn import sinkhorn


@dataclass(frozen=True)
class Curve:
    """Means over tokens of the two gains of C_l, one number for each sublayer l = 1, 2, ..."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]

    @property
    def largest(self) -> float:
        return max(*self.forward, *self.backward)


@dataclass(frozen=True)
class ResidualGain:
    """The gains of the mixing as it is (mHC), and of the same logits without the projection."""

    constrained: Curve
    unconstrained: Curve


@torch.no_grad()
def measure_gain(model: Transformer, segment: Segment) -> ResidualGain:
    """Composite gains of the trunk over depth, on the tokens of one segment without a past.

    The constant of the unconstrained counterpart belongs to the start of `model/init.py`, so that the comparison holds
    for models that were trained from there.
    """
    with _mixing_logits(model) as logits:
        model(segment)
    return _gain(logits, model.config.hc_sinkhorn_iters, model.config.hc_eps, COMB_DIAGONAL)


def gain_under_drift(
    sigma: float,
    *,
    sublayers: int = 64,
    draws: int = 1024,
    streams: int = 4,
    rounds: int = 20,
    eps: float = 1e-6,
    diagonal: float = COMB_DIAGONAL,
    seed: int = 0,
) -> ResidualGain:
    """The same measurement on logits that left their start at random: diagonal x identity + sigma x normal noise,
    independent in every sublayer and draw. Means are over the draws."""
    generator = torch.Generator().manual_seed(seed)
    start_SS = diagonal * torch.eye(streams)
    logits = [start_SS + sigma * torch.randn(draws, streams, streams, generator=generator) for _ in range(sublayers)]
    return _gain(logits, rounds, eps, diagonal)


@contextmanager
def _mixing_logits(model: Transformer) -> Iterator[list[Tensor]]:
    """Collect the logits of comb of every trunk sublayer, in the order in which a forward pass makes them.

    `HyperConnection.mix_in` is no module of its own that a hook could watch, so it is replaced on the instances and put
    back.
    """
    collected: list[Tensor] = []
    watched: list[tuple[HyperConnection, Any]] = []

    def watch(connection: HyperConnection) -> None:
        watched.append((connection, vars(connection).get("mix_in")))
        original = connection.mix_in

        def collecting(x_TSD: Tensor, norm: Norm | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            collected.append(connection.comb_logits(x_TSD))
            return original(x_TSD, norm)

        connection.mix_in = collecting

    try:
        for block in model.layers:
            assert isinstance(block, Block)
            watch(block.hc_attn)
            watch(block.hc_ffn)
        yield collected
    finally:
        for connection, before in watched:
            del connection.mix_in
            if before is not None:  # somebody else watches this instance
                connection.mix_in = before


def _gain(logits: list[Tensor], rounds: int, eps: float, diagonal: float) -> ResidualGain:
    streams = logits[0].shape[-1]
    row_sum_at_start = exp(diagonal) + streams - 1
    return ResidualGain(
        constrained=_curve([sinkhorn(each_TSS, rounds, eps) for each_TSS in logits]),
        unconstrained=_curve([each_TSS.double().exp() / row_sum_at_start for each_TSS in logits]),
    )


def _curve(combs: list[Tensor]) -> Curve:
    """Gains of the composite after each sublayer; FP64, because an unconstrained one leaves the range of FP32."""
    composite_TSS = torch.eye(combs[0].shape[-1], dtype=torch.float64, device=combs[0].device)
    forward, backward = [], []
    for comb_TSS in combs:
        composite_TSS = comb_TSS.double().mT @ composite_TSS
        absolute_TSS = composite_TSS.abs()
        forward.append(float(absolute_TSS.sum(-1).amax(-1).mean()))
        backward.append(float(absolute_TSS.sum(-2).amax(-1).mean()))
    return Curve(tuple(forward), tuple(backward))
