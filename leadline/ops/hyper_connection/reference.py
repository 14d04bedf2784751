"""Hyper-connections in plain PyTorch.

Autograd through these formulas would keep several copies of the streams, in FP32. The backwards here are written out
for everything that has the size of the streams; the small coefficients are computed again and left to autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.invariance import rows_times, rowwise
from leadline.ops.precision import wide
from leadline.ops.sinkhorn.reference import Sinkhorn


def projection(x_TSD: Tensor, fn: Tensor, rms_eps: float) -> Tensor:
    """(flatten(X) / rms(flatten(X))) fn^T, FP32 [T, rows of fn]."""
    flat = wide(x_TSD.flatten(1))
    return _raw_projection(flat, fn) * _inverse_rms(flat, rms_eps)


def collapse(x_TSD: Tensor, pre_TS: Tensor) -> Tensor:
    """sum_j pre_j X_j, FP32 inside, dtype of X."""
    return torch.bmm(pre_TS[:, None], wide(x_TSD)).squeeze(1).to(x_TSD.dtype)


def mix_head(x_TSD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, rms_eps: float) -> Tensor:
    mixes = projection(x_TSD, fn, rms_eps)
    return collapse(x_TSD, rowwise(torch.sigmoid, mixes * wide(scale) + wide(base)) + eps)


def _raw_projection(flat: Tensor, fn: Tensor) -> Tensor:
    return rows_times(flat, wide(fn))


def _inverse_rms(flat: Tensor, rms_eps: float) -> Tensor:
    # Dividing after the product is the same and cheaper; a norm needs no square of the streams in memory.
    mean_square = torch.linalg.vector_norm(flat, dim=-1, keepdim=True).square() / flat.shape[-1]
    return torch.rsqrt(mean_square + rms_eps)


def _coefficients(
    mixes: Tensor, base: Tensor, scale: Tensor, num_streams: int, rounds: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(pre_TS, post_TS, comb_TSS) from the projections."""
    s = num_streams
    gates = torch.cat([gate.expand(rows) for gate, rows in zip(scale.unbind(), (s, s, s * s), strict=True)])
    pre_TS, post_TS, comb = (mixes * gates + base).split([s, s, s * s], dim=-1)
    comb_TSS = Sinkhorn.apply(comb.unflatten(-1, (s, s)), rounds, eps)
    return torch.sigmoid(pre_TS) + eps, 2 * torch.sigmoid(post_TS), comb_TSS


class MixIn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TSD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rounds: int, eps: float, rms_eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        flat = wide(x_TSD.flatten(1))
        inverse_rms_T1 = _inverse_rms(flat, rms_eps)
        mixes = _raw_projection(flat, fn) * inverse_rms_T1
        pre_TS, post_TS, comb_TSS = rowwise(
            lambda mixes: _coefficients(mixes, base, scale, x_TSD.shape[1], rounds, eps), mixes
        )
        ctx.save_for_backward(x_TSD, fn, base, scale, mixes, inverse_rms_T1)
        ctx.rounds, ctx.eps = rounds, eps
        return x_TSD, collapse(x_TSD, pre_TS), post_TS, comb_TSS

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dpassed_TSD: Tensor, dy_TD: Tensor, dpost_TS: Tensor, dcomb_TSS: Tensor
    ) -> tuple[Tensor | None, ...]:
        x_TSD, fn, *parts, inverse_rms_T1 = ctx.saved_tensors
        base, scale, mixes = (part.detach().requires_grad_() for part in parts)
        dy_TD, streams_TSD = wide(dy_TD), wide(x_TSD)
        dpre_TS = torch.bmm(streams_TSD, dy_TD[..., None]).squeeze(-1)
        with torch.enable_grad():
            coefficients = _coefficients(mixes, base, scale, x_TSD.shape[1], ctx.rounds, ctx.eps)
        dbase, dscale, dmixes = torch.autograd.grad(coefficients, (base, scale, mixes), (dpre_TS, dpost_TS, dcomb_TSS))

        # mixes = p r with p = X fn^T and r = (mean X^2 + eps)^(-1/2): dX = (dmixes r) fn - (dmixes . mixes) r^2 X / S D
        flat = streams_TSD.flatten(1)
        dprojection = dmixes * inverse_rms_T1
        pull_T1 = (dmixes * mixes).sum(-1, keepdim=True) * inverse_rms_T1.square() / flat.shape[-1]
        dx = (dprojection @ wide(fn)).addcmul_(flat, pull_T1, value=-1.0).view_as(x_TSD)
        dx.addcmul_(coefficients[0].detach()[..., None], dy_TD[:, None]).add_(dpassed_TSD)
        return dx.to(x_TSD.dtype), (dprojection.T @ flat).to(fn.dtype), dbase, dscale, None, None, None


class MixOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TSD: Tensor, out_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor) -> Tensor:
        ctx.save_for_backward(x_TSD, out_TD, post_TS, comb_TSS)
        mixed_TSD = torch.bmm(comb_TSS.mT, wide(x_TSD))
        return mixed_TSD.addcmul_(post_TS[..., None], wide(out_TD)[:, None]).to(x_TSD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmixed_TSD: Tensor) -> tuple[Tensor | None, ...]:
        x_TSD, out_TD, post_TS, comb_TSS = ctx.saved_tensors
        dmixed_TSD = wide(dmixed_TSD)
        dx_TSD = torch.bmm(comb_TSS, dmixed_TSD).to(x_TSD.dtype)
        dout_TD = torch.bmm(post_TS[:, None], dmixed_TSD).squeeze(1).to(out_TD.dtype)
        dpost_TS = torch.bmm(dmixed_TSD, wide(out_TD)[..., None]).squeeze(-1)
        dcomb_TSS = torch.bmm(wide(x_TSD), dmixed_TSD.mT)
        return dx_TSD, dout_TD, dpost_TS, dcomb_TSS
