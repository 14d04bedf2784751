"""Manifold-constrained hyper-connections (report 2.2): S residual streams instead of one.

Around every sublayer F, per token:

    pre, post, comb = coefficients(X)         from the S streams X themselves
    y  = sum_j pre_j X_j                      mix in: the streams collapse into the sublayer's input
    X'_k = post_k F(norm(y)) + sum_j comb_jk X_j                mix out

comb is made doubly stochastic by Sinkhorn normalisation: mixing then neither grows nor shrinks the streams however deep
the model is, which is the "manifold constraint". The sum runs over the FIRST index of comb; the transpose also looks
doubly stochastic and fails silently.

The arithmetic is that of `ops/hyper_connection`. All coefficients are computed in FP32 from the streams divided by
their joint RMS. The row layout of `fn` and `base` is S pre, S post, S x S comb (row-major [j, k]); `scale` holds one
gate for each of the three.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leadline.model.config import ModelConfig
from leadline.model.linear import Norm
from leadline.ops import hyper_connection as op


class HyperConnection(nn.Module):
    """The coefficients of one sublayer. Parameters FP32: fn [(2 + S) S, S D], base [(2 + S) S], scale [3]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_streams = config.hc_mult
        self.rounds, self.eps, self.rms_norm_eps = config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps
        rows = (2 + config.hc_mult) * config.hc_mult
        self.fn = nn.Parameter(torch.empty(rows, config.hc_mult * config.hidden_size))
        self.base = nn.Parameter(torch.empty(rows))
        self.scale = nn.Parameter(torch.empty(3))

    def mix_in(self, x_TSD: Tensor, norm: Norm | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Collapse the streams: (X to go on with, y_TD in the dtype of X, post_TS FP32, comb_TSS FP32). With a norm, y
        is normalised."""
        parameters, numbers = (self.fn, self.base, self.scale), (self.rounds, self.eps, self.rms_norm_eps)
        if norm is None:
            return op.mix_in(x_TSD, *parameters, *numbers)
        return op.mix_in_norm(x_TSD, *parameters, norm.weight, *numbers, self.rms_norm_eps)

    @staticmethod
    def mix_out(x_TSD: Tensor, out_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor) -> Tensor:
        """X'_k = post_k F(y) + sum_j comb_jk X_j, FP32 inside, dtype of X."""
        return op.mix_out(x_TSD, out_TD, post_TS, comb_TSS)

    def comb_logits(self, x_TSD: Tensor) -> Tensor:
        """What comb is made of before the Sinkhorn projection, FP32 [T, S, S]; the model itself does not need it."""
        s = self.num_streams
        mixes = op.projection(x_TSD, self.fn[2 * s :], self.rms_norm_eps)
        return (mixes * self.scale[2] + self.base[2 * s :]).unflatten(-1, (s, s))


class StreamHead(nn.Module):
    """The streams' last collapse, before the final norm. Parameters FP32: fn [S, S D], base [S], scale [1]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps, self.rms_norm_eps = config.hc_eps, config.rms_norm_eps
        self.fn = nn.Parameter(torch.empty(config.hc_mult, config.hc_mult * config.hidden_size))
        self.base = nn.Parameter(torch.empty(config.hc_mult))
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, x_TSD: Tensor) -> Tensor:
        return op.mix_head(x_TSD, self.fn, self.base, self.scale, self.eps, self.rms_norm_eps)


def spread(embedding_TD: Tensor, num_streams: int) -> Tensor:
    """The streams at the bottom of the network: S equal copies of the embedding."""
    return embedding_TD[:, None].expand(-1, num_streams, -1).contiguous()
