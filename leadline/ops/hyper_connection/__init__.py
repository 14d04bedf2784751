"""Hyper-connections: S residual streams into a sublayer, out of it, and together at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.ops.dispatch import use_kernel
from leadline.ops.hyper_connection import reference
from leadline.ops.hyper_connection.reference import collapse, projection
from leadline.ops.rms_norm import rms_norm

__all__ = ["collapse", "mix_head", "mix_in", "mix_in_norm", "mix_out", "projection"]


def mix_in(
    x_TSD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rounds: int, eps: float, rms_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Into a sublayer: (the streams again, its input y_TD, the coefficients post_TS and comb_TSS of the way out)
    (report 2.2).

        logits = scale x projection(X) + base           one row of fn and base, and one of 3 scales, for each of
        pre    = sigmoid(logits) + eps                  S rows pre,
        post   = 2 sigmoid(logits)                      S rows post,
        comb   = sinkhorn(logits, rounds, eps)          S x S rows comb, row-major [j, k]
        y      = sum_j pre_j X_j

    x_TSD: the streams, any float dtype. fn: [(2 + S) S, S D], base: [(2 + S) S], scale: [3]. y comes in the dtype of
    the streams; post, comb and everything in between are FP32. Differentiable in x, fn, base and scale. For the
    backward it keeps its inputs and (2 + S) S + 1 numbers for each token; the rest is computed again.

    The streams that come back are x itself. Use them further on: their gradient then joins the others within the
    backward of this op, where it would otherwise be added in a pass of its own.
    """
    if use_kernel("hyper_connection", x_TSD):
        from leadline.ops.hyper_connection import kernel

        return kernel.MixIn.apply(x_TSD, fn, base, scale, rounds, eps, rms_eps)
    return reference.MixIn.apply(x_TSD, fn, base, scale, rounds, eps, rms_eps)


def mix_in_norm(
    x_TSD: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    weight: Tensor,
    rounds: int,
    eps: float,
    rms_eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`mix_in`, and the RMS norm of y in its place: rms_norm(y, weight, norm_eps), [T, D].

    Of few tokens without a gradient it is one pass; which tokens are few depends on the shape alone.
    """
    tensors = x_TSD, fn, base, scale, weight
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not recorded and use_kernel("hyper_connection", x_TSD):
        from leadline.ops.hyper_connection import kernel

        if kernel.takes_norm(x_TSD):
            return x_TSD, *kernel.mix_in_norm(*tensors, rounds, eps, rms_eps, norm_eps)
    x_TSD, y_TD, post_TS, comb_TSS = mix_in(x_TSD, fn, base, scale, rounds, eps, rms_eps)
    return x_TSD, rms_norm(y_TD, weight, norm_eps), post_TS, comb_TSS


def mix_out(x_TSD: Tensor, out_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor) -> Tensor:
    """X'_k = post_k out + sum_j comb_jk X_j, the streams after the sublayer (report 2.2).

    The sum runs over the first index of comb. out_TD: what the sublayer returned. FP32 inside, dtype of X returned.
    Differentiable in all four; keeps its inputs only.
    """
    if use_kernel("hyper_connection", x_TSD):
        from leadline.ops.hyper_connection import kernel

        return kernel.MixOut.apply(x_TSD, out_TD, post_TS, comb_TSS)
    return reference.MixOut.apply(x_TSD, out_TD, post_TS, comb_TSS)


def mix_head(x_TSD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, rms_eps: float) -> Tensor:
    """y = sum_j pre_j X_j with pre = sigmoid(scale x projection(X) + base) + eps, the end of the streams.

    fn: [S, S D], base: [S], scale: [1]. FP32 inside, dtype of X returned. Differentiable in x, fn, base and scale.
    """
    if use_kernel("hyper_connection", x_TSD):
        from leadline.ops.hyper_connection import kernel

        return kernel.MixHead.apply(x_TSD, fn, base, scale, eps, rms_eps)
    return reference.mix_head(x_TSD, fn, base, scale, eps, rms_eps)
