"""Manifold-constrained hyper-connections (report 2.2): S residual streams instead of one.

Around every sublayer F, per token:

    pre, post, comb = coefficients(X)         from the S streams X themselves
    y  = sum_j pre_j X_j                      the streams collapse into the sublayer's input
    X'_k = post_k F(norm(y)) + sum_j comb_jk X_j

comb is made doubly stochastic by Sinkhorn normalisation: mixing then neither grows nor shrinks the streams however deep
the model is, which is the "manifold constraint". The sum runs over the FIRST index of comb; the transpose also looks
doubly stochastic and fails silently.

All coefficients are computed in FP32 from the streams divided by their joint RMS. The row layout of `fn` and `base` is
S pre, S post, S x S comb (row-major [j, k]); `scale` holds one gate for each of the three.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leadline.model.config import ModelConfig
from leadline.ops.precision import wide
from leadline.ops.sinkhorn import sinkhorn


def _mixes(x_TSD: Tensor, fn: Tensor, rms_norm_eps: float) -> Tensor:
    """(flatten(X) / rms(flatten(X))) fn^T, FP32 [T, rows of fn]. Dividing after the product is the same and cheaper."""
    flat = wide(x_TSD.flatten(1))
    mean_square = torch.linalg.vector_norm(flat, dim=-1, keepdim=True).square() / flat.shape[-1]
    return nn.functional.linear(flat, wide(fn)) * torch.rsqrt(mean_square + rms_norm_eps)


def _collapse(x_TSD: Tensor, pre_TS: Tensor) -> Tensor:
    """sum_j pre_j X_j, FP32 inside, dtype of X."""
    return torch.bmm(pre_TS[:, None], wide(x_TSD)).squeeze(1).to(x_TSD.dtype)


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

    def logits(self, x_TSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What pre, post [T, S] and comb [T, S, S] are made of, FP32: gate x projection of the streams + base."""
        s = self.num_streams
        scale = self.scale.repeat_interleave(torch.tensor([s, s, s * s], device=self.scale.device))
        logits = _mixes(x_TSD, self.fn, self.rms_norm_eps) * scale + self.base
        pre_TS, post_TS, comb = logits.split([s, s, s * s], dim=-1)
        return pre_TS, post_TS, comb.unflatten(-1, (s, s))

    def mix_in(self, x_TSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Collapse the streams: (y_TD in the dtype of X, post_TS FP32, comb_TSS FP32)."""
        pre_TS, post_TS, comb_TSS = self.logits(x_TSD)
        pre_TS = torch.sigmoid(pre_TS) + self.eps
        post_TS = 2 * torch.sigmoid(post_TS)
        return _collapse(x_TSD, pre_TS), post_TS, sinkhorn(comb_TSS, self.rounds, self.eps)

    @staticmethod
    def mix_out(x_TSD: Tensor, out_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor) -> Tensor:
        """X'_k = post_k F(y) + sum_j comb_jk X_j, FP32 inside, dtype of X."""
        mixed_TSD = torch.bmm(comb_TSS.mT, wide(x_TSD))
        return mixed_TSD.addcmul_(post_TS[..., None], wide(out_TD)[:, None]).to(x_TSD.dtype)


class StreamHead(nn.Module):
    """The streams' last collapse, before the final norm. Parameters FP32: fn [S, S D], base [S], scale [1]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps, self.rms_norm_eps = config.hc_eps, config.rms_norm_eps
        self.fn = nn.Parameter(torch.empty(config.hc_mult, config.hc_mult * config.hidden_size))
        self.base = nn.Parameter(torch.empty(config.hc_mult))
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, x_TSD: Tensor) -> Tensor:
        mixes = _mixes(x_TSD, self.fn, self.rms_norm_eps)
        return _collapse(x_TSD, torch.sigmoid(mixes * self.scale + self.base) + self.eps)


def spread(embedding_TD: Tensor, num_streams: int) -> Tensor:
    """The streams at the bottom of the network: S equal copies of the embedding."""
    return embedding_TD[:, None].expand(-1, num_streams, -1).contiguous()
