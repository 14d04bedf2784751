"""Sinkhorn normalisation: a small matrix made doubly stochastic."""

from __future__ import annotations

from torch import Tensor

from leadline.ops.sinkhorn.reference import Sinkhorn


def sinkhorn(logits_TSS: Tensor, rounds: int, eps: float) -> Tensor:
    """comb = softmax over the last axis + eps, then `rounds` of normalisation that end on the columns (report 2.2).

    logits_TSS: FP32, one S x S matrix per token, rows j (stream read) by columns k (stream written). The first round
    divides by column sums only, the other rounds - 1 divide by row sums, then by column sums; every divisor has eps
    added. Returns FP32 [T, S, S] whose columns sum to 1 (rows only where the logits are moderate). Differentiable; the
    backward recomputes the rounds, so memory does not grow with their number.
    """
    return Sinkhorn.apply(logits_TSS, rounds, eps)
