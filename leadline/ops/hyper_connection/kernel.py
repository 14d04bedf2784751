"""Hyper-connections in Triton.

Bytes are the floor. With S D values in a token's streams, 32 KiB at S = 4, D = 4096 in bfloat16, the projection does 48
FLOPs for each value, and everything else a few more; tensor cores do some 500 in the time that it takes to read one. So
what counts is how often the streams cross the memory bus:

    mix_in   forward    X read twice, y written                     the collapse needs pre, which needs all of X
    mix_out  forward    X, out read, X' written
    mix_in   backward   X, dy read twice, dX so far read, dX written      dpre first, which needs all of X
    mix_out  backward   X, out, dX' read, dX, dout written

In `mix_in`, holding a token between the two reads is not possible: `fn` is 24 rows as long as the token, so tokens have
to share each piece of it, 64 or more at a time, and 64 tokens are ten times the memory of a multiprocessor. What the
cache holds is used instead: `mix_out` goes through the tokens from first to last, the projection that follows it from
last to first, and the collapse again from first to last, so that each begins with what the one before it touched last.

Into a sublayer there are two steps:

- the projection leaves 24 partial products and a partial sum of squares for each token and each slice of its streams.
  Few tokens need many programs, one for each slice; many tokens have one program do several. Slices add up in the same
  order either way, so that a token's result does not depend on how many tokens come along. The matrix units need 64
  tokens at once; up to `TOKENS_OF_A_STEP` are multiplied without them, which rounds the sums of a slice otherwise;
- the collapse adds those up and reads the streams; other programs of the same launch make post and comb meanwhile. Up
  to `FEW_TOKENS`, each token has programs of its own: what counts is then how soon the last of them is done, the one
  for the coefficients. Its threads therefore share the numbers of comb, which rounds their sums otherwise.

The head of the network is a `mix_in` of which only pre and y are wanted; fn has S rows there.

Products are as exact as in FP32. fn is an FP32 parameter; against bfloat16 streams it is split into three bfloat16
terms whose sum it is, for three passes of the tensor cores: a quarter of the time of FP32 arithmetic.

Not worth it, as measured: the projection of X' within `mix_out`, and in the backward `mix_out` within the `mix_in` that
follows it. Each would save a trip of the streams; the products, and the S + S x S sums over a token's columns, cost a
program more registers and barriers than the trip takes. To split fn beforehand takes as long as it saves.

Sums over tokens (gradients of fn, base, scale) go through partial sums of fixed runs of tokens, added in order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.early_start import starts_early
from leadline.ops.hyper_connection.backward_kernels import (
    hyper_connection_coefficients_bwd_kernel,
    hyper_connection_dpre_bwd_kernel,
    hyper_connection_gates_bwd_kernel,
    hyper_connection_in_bwd_kernel,
    hyper_connection_out_bwd_kernel,
    hyper_connection_parameters_bwd_kernel,
)
from leadline.ops.hyper_connection.forward_kernels import (
    hyper_connection_in_fwd_kernel,
    hyper_connection_in_step_kernel,
    hyper_connection_out_fwd_kernel,
    hyper_connection_projection_fwd_kernel,
    hyper_connection_projection_step_kernel,
)
from leadline.ops.invariance import is_batch_invariant
from leadline.ops.opaque import opaque
from leadline.ops.rms_norm import kernel as rms_norm


@dataclass(frozen=True)
class Tile:
    """Tokens and columns that a program holds at once."""

    tokens: int
    columns: int
    num_warps: int
    num_stages: int


PROJECTION = Tile(128, 64, num_warps=8, num_stages=3)
COLLAPSE = Tile(2, 2048, num_warps=8, num_stages=1)
IN_BACKWARD = Tile(16, 64, num_warps=4, num_stages=3)

SLICE = 256  # values of a token's streams in one partial sum of the projection
SLICES_TOGETHER = 16  # and as many of these are added up first
TOKENS_PER_COEFFICIENTS = 64
TOKENS_PER_SUM = 2048  # tokens in one partial sum of the gradient of fn
TOKENS_PER_GATE_SUM = 128  # and in one of the gradients of base and scale
BLOCK_D = 1024
OUT_BLOCK_D = 4096
TOKENS_OF_A_STEP = 16  # so few that fn is not worth reading for the matrix units
TOKENS_PER_SLICE = 4  # of a step, in one program
FEW_TOKENS = 64
MANY_TOKENS = 1024  # enough to fill a card when one program does all columns of a token
VERY_MANY_TOKENS = 4096  # enough when one program does several slices of a block of tokens


def norm_warps(width: int) -> int:
    """Warps of a program that has a row of y; those of `rms_norm`, so that its sum is the same."""
    return rms_norm.tile(width)[2]


def _rows_of_block(rows: int) -> int:
    """The rows of fn and a place for the sum of squares, as a power of two that a dot takes."""
    return max(16, triton.next_power_of_2(rows + 1))


def _block_of_columns(width: int, largest: int) -> int:
    return min(largest, triton.next_power_of_2(width))


def _span(num_tokens: int, width: int, block: int) -> int:
    """Columns of a token that one program does."""
    return triton.cdiv(width, block) * block if num_tokens >= MANY_TOKENS else block


def _tile(x_TSD: Tensor, tile: Tile) -> Tile:
    """`tile`, no wider than needed, and smaller in FP32, whose products need registers."""
    columns = max(16, _block_of_columns(x_TSD.shape[2], tile.columns))
    if x_TSD.dtype == torch.bfloat16:
        return replace(tile, columns=columns)
    return replace(tile, tokens=min(tile.tokens, 32), columns=min(columns, 32), num_stages=2)


# -- forward -------------------------------------------------------------------------------------------------------


def _project(x_TSD: Tensor, fn: Tensor) -> tuple[Tensor, int]:
    """(partial products and sums of squares, [parts, T, rows of a block]; how many of them to add up first)."""
    num_tokens, width, block_rows = x_TSD.shape[0], x_TSD.shape[1] * x_TSD.shape[2], _rows_of_block(len(fn))
    together = SLICES_TOGETHER if num_tokens >= VERY_MANY_TOKENS else 1
    parts = triton.cdiv(width, SLICE * together)
    partial = torch.empty(parts, num_tokens, block_rows, device=x_TSD.device)
    if together == 1 and num_tokens <= TOKENS_OF_A_STEP and not is_batch_invariant():
        early = starts_early(x_TSD.device)
        hyper_connection_projection_step_kernel[(parts, triton.cdiv(num_tokens, TOKENS_PER_SLICE))](
            x_TSD, fn, partial, num_tokens, width, len(fn), SLICE, TOKENS_PER_SLICE, block_rows, early,
            launch_pdl=early, num_warps=8,
        )  # fmt: skip
        return partial, SLICES_TOGETHER
    hyper_connection_projection_fwd_kernel[(parts, triton.cdiv(num_tokens, PROJECTION.tokens))](
        x_TSD, fn, partial, num_tokens, width, len(fn), SLICE, together, PROJECTION.tokens, block_rows,
        PROJECTION.columns, num_warps=PROJECTION.num_warps, num_stages=PROJECTION.num_stages,
    )  # fmt: skip
    return partial, SLICES_TOGETHER // together


def _collapse(
    x_TSD: Tensor,
    partial: Tensor,
    group: int,
    base: Tensor,
    scale: Tensor,
    rounds: int,
    eps: float,
    rms_eps: float,
    norm: tuple[Tensor, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y_TD, post_TS, comb_TSS, mixes, inverse_rms_T); post and comb have no elements where base is that of a head.
    `group` parts of the projection are added up first. norm: weight and eps, where `takes_norm` allows it."""
    (num_tokens, num_streams, width), device, rows = x_TSD.shape, x_TSD.device, len(base)
    y_TD = x_TSD.new_empty(num_tokens, width)
    written = num_streams if rows > num_streams else 0
    post_TS = torch.empty(num_tokens, written, device=device)
    comb_TSS = torch.empty(num_tokens, written, written, device=device)
    mixes, inverse_rms_T = torch.empty(num_tokens, rows, device=device), torch.empty(num_tokens, device=device)
    results = y_TD, post_TS, comb_TSS, mixes, inverse_rms_T
    shape = num_streams, width, rows, partial.shape[0], group, partial.shape[2]
    if num_tokens <= FEW_TOKENS and not is_batch_invariant():
        (weight, norm_eps), early = norm or (None, 0.0), starts_early(x_TSD.device)
        block = triton.next_power_of_2(width) if norm else _block_of_columns(width, BLOCK_D)
        hyper_connection_in_step_kernel[(num_tokens, triton.cdiv(width, block) + 1)](
            x_TSD, partial, base, scale, weight, *results, num_tokens, eps, rms_eps, norm_eps, rounds, *shape,
            triton.next_power_of_2(num_streams), block, early,
            launch_pdl=early, num_warps=4 if norm is None else norm_warps(width),
        )  # fmt: skip
        return results
    block = _block_of_columns(width, COLLAPSE.columns if num_tokens >= MANY_TOKENS else BLOCK_D)
    span = _span(num_tokens, width, block)
    programs = triton.cdiv(num_tokens, TOKENS_PER_COEFFICIENTS) * (TOKENS_PER_COEFFICIENTS // COLLAPSE.tokens + 1)
    hyper_connection_in_fwd_kernel[(programs, triton.cdiv(width, span))](
        x_TSD, partial, base, scale, *results, num_tokens, eps, rms_eps, rounds, *shape,
        COLLAPSE.tokens, TOKENS_PER_COEFFICIENTS, block, span, num_warps=COLLAPSE.num_warps,
    )  # fmt: skip
    return results


def takes_norm(x_TSD: Tensor) -> bool:
    """Whether the collapse also does the norm behind it: few tokens, of which a program may have a whole row without so
    many warps that the coefficients, which each of them computes, take longer."""
    return 0 < len(x_TSD) <= FEW_TOKENS and norm_warps(x_TSD.shape[2]) <= 8 and not is_batch_invariant()


def _empty_coefficients(x_TSD: Tensor, fn: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_streams, width = x_TSD.shape
    shapes = (num_streams,), (num_streams, num_streams), (fn.shape[0],), ()
    y_TD = x_TSD.new_empty(num_tokens, width)
    return y_TD, *(x_TSD.new_empty(num_tokens, *shape, dtype=torch.float32) for shape in shapes)


@opaque(_empty_coefficients)
def mix_in_forward(
    x_TSD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rounds: int, eps: float, rms_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y_TD, post_TS, comb_TSS, mixes, inverse_rms_T) for contiguous inputs, parameters in FP32."""
    return _collapse(x_TSD, *_project(x_TSD, fn), base, scale, rounds, eps, rms_eps)


@opaque(lambda x_TSD, fn, *_: _empty_coefficients(x_TSD, fn)[:3])
def mix_in_norm_forward(
    x_TSD: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    weight: Tensor,
    rounds: int,
    eps: float,
    rms_eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(norm of y_TD, post_TS, comb_TSS) for contiguous inputs, parameters but the weight of the norm in FP32."""
    partial, group = _project(x_TSD, fn)
    return _collapse(x_TSD, partial, group, base, scale, rounds, eps, rms_eps, (weight, norm_eps))[:3]


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
) -> tuple[Tensor, Tensor, Tensor]:
    """`mix_in_norm_forward` of any layouts and dtypes."""
    parameters = *_wide(fn, base, scale), weight.contiguous()
    return mix_in_norm_forward(x_TSD.contiguous(), *parameters, rounds, eps, rms_eps, norm_eps)


@opaque(lambda x_TSD, fn, *_: tuple(_empty_coefficients(x_TSD, fn)[number] for number in (0, 3, 4)))
def mix_head_forward(
    x_TSD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, rms_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y_TD, mixes, inverse_rms_T) for contiguous inputs, parameters in FP32."""
    y_TD, _, _, mixes, inverse_rms_T = _collapse(x_TSD, *_project(x_TSD, fn), base, scale, 1, eps, rms_eps)
    return y_TD, mixes, inverse_rms_T


@opaque(lambda x_TSD, out_TD, post_TS, comb_TSS: torch.empty_like(x_TSD))
def mix_out_forward(x_TSD: Tensor, out_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor) -> Tensor:
    """The mixed streams, for contiguous inputs."""
    mixed_TSD, (num_tokens, num_streams, width) = torch.empty_like(x_TSD), x_TSD.shape
    many = num_tokens >= MANY_TOKENS
    block = _block_of_columns(width, OUT_BLOCK_D if many else BLOCK_D)
    span, early = _span(num_tokens, width, block), starts_early(x_TSD.device)
    hyper_connection_out_fwd_kernel[(num_tokens, triton.cdiv(width, span))](
        x_TSD, out_TD, post_TS, comb_TSS, mixed_TSD, num_streams, width, block, span, early,
        launch_pdl=early, num_warps=8 if many else 4,
    )  # fmt: skip
    return mixed_TSD


# -- backward ------------------------------------------------------------------------------------------------------


def _into_backward(
    x_TSD: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor],
    mixes: Tensor,
    inverse_rms_T: Tensor,
    dy_TD: Tensor,
    rest: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None],
    rounds: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dfn, dbase, dscale). rest: dpassed_TSD, dpost_TS and dcomb_TSS, which a head does not have."""
    (num_tokens, num_streams, width), device = x_TSD.shape, x_TSD.device
    (fn, base, scale), (dpassed_TSD, dpost_TS, dcomb_TSS), rows = parameters, rest, mixes.shape[1]
    block_rows, block_streams = _rows_of_block(rows), triton.next_power_of_2(num_streams)
    pre_TS, dpre_TS = torch.empty(2, num_tokens, num_streams, device=device).unbind()
    hyper_connection_dpre_bwd_kernel[(num_tokens,)](
        x_TSD, dy_TD, dpre_TS, num_streams, width, _block_of_columns(width, BLOCK_D), num_warps=4
    )
    dlogits, pull_T = torch.empty_like(mixes), torch.empty(num_tokens, device=device)
    dprojection = torch.empty(num_tokens, block_rows, device=device)
    # Two 4 x 4 matrices fill one warp, and sums within a warp need no barrier.
    hyper_connection_coefficients_bwd_kernel[(triton.cdiv(num_tokens, 2),)](
        mixes, inverse_rms_T, base, scale, dpre_TS, dpost_TS, dcomb_TSS, pre_TS, dlogits, dprojection, pull_T,
        num_tokens, eps, rounds, num_streams, width, rows, block_rows, 2, block_streams, num_warps=1,
    )  # fmt: skip

    dx_TSD, tile, sums = torch.empty_like(x_TSD), _tile(x_TSD, IN_BACKWARD), triton.cdiv(num_tokens, TOKENS_PER_SUM)
    parts = torch.empty(sums, num_streams * width, block_rows, device=device)
    hyper_connection_in_bwd_kernel[(triton.cdiv(width, tile.columns), sums)](
        x_TSD, fn, pre_TS, dprojection, pull_T, dy_TD, dpassed_TSD, parts, dx_TSD, num_tokens, num_streams, width, rows,
        TOKENS_PER_SUM, block_rows, tile.tokens, tile.columns, tile.num_stages, num_warps=tile.num_warps,
    )  # fmt: skip
    return dx_TSD, *_sums_over_tokens(parts, dlogits, mixes, parameters, num_streams)


def _sums_over_tokens(
    fn_parts: Tensor, dlogits: Tensor, mixes: Tensor, parameters: tuple[Tensor, Tensor, Tensor], num_streams: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(dfn, dbase, dscale), dfn from its sums over runs of tokens."""
    (num_tokens, rows), (sums, width, block_rows) = mixes.shape, fn_parts.shape
    gate_sums = triton.cdiv(num_tokens, TOKENS_PER_GATE_SUM)
    gate_parts = torch.empty(gate_sums, 2, block_rows, device=mixes.device)
    hyper_connection_gates_bwd_kernel[(gate_sums,)](
        dlogits, mixes, gate_parts, num_tokens, num_streams, rows, block_rows, TOKENS_PER_GATE_SUM, num_warps=4
    )
    dfn, dbase, dscale = (torch.empty_like(parameter) for parameter in parameters)
    hyper_connection_parameters_bwd_kernel[(triton.cdiv(width, 128),)](
        fn_parts,
        gate_parts,
        dfn,
        dbase,
        dscale,
        sums,
        gate_sums,
        num_streams,
        width,
        rows,
        block_rows,
        128,
        num_warps=4,
    )
    return dfn, dbase, dscale


@opaque(lambda x_TSD, fn, base, scale, *_: tuple(torch.empty_like(x) for x in (x_TSD, fn, base, scale)))
def mix_in_backward(
    x_TSD: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    mixes: Tensor,
    inverse_rms_T: Tensor,
    dpassed_TSD: Tensor,
    dy_TD: Tensor,
    dpost_TS: Tensor,
    dcomb_TSS: Tensor,
    rounds: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dfn, dbase, dscale) for contiguous inputs, parameters in FP32."""
    rest = dpassed_TSD, dpost_TS, dcomb_TSS
    return _into_backward(x_TSD, (fn, base, scale), mixes, inverse_rms_T, dy_TD, rest, rounds, eps)


@opaque(lambda x_TSD, fn, base, scale, *_: tuple(torch.empty_like(x) for x in (x_TSD, fn, base, scale)))
def mix_head_backward(
    x_TSD: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    mixes: Tensor,
    inverse_rms_T: Tensor,
    dy_TD: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dfn, dbase, dscale) for contiguous inputs, parameters in FP32."""
    return _into_backward(x_TSD, (fn, base, scale), mixes, inverse_rms_T, dy_TD, (None, None, None), 1, eps)


@opaque(lambda *inputs: tuple(torch.empty_like(x) for x in inputs[:4]))
def mix_out_backward(
    x_TSD: Tensor, out_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor, dmixed_TSD: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dout, dpost, dcomb) for contiguous inputs."""
    dx_TSD, dout_TD = torch.empty_like(x_TSD), torch.empty_like(out_TD)
    dpost_TS, dcomb_TSS = torch.empty_like(post_TS), torch.empty_like(comb_TSS)
    num_tokens, num_streams, width = x_TSD.shape
    block = _block_of_columns(width, BLOCK_D)
    vector = min(block, 16 // x_TSD.element_size())
    hyper_connection_out_bwd_kernel[(num_tokens,)](
        x_TSD, out_TD, post_TS, comb_TSS, dmixed_TSD, dx_TSD, dout_TD, dpost_TS, dcomb_TSS, num_streams, width, block,
        vector, num_warps=4,
    )  # fmt: skip
    return dx_TSD, dout_TD, dpost_TS, dcomb_TSS


# -- autograd ------------------------------------------------------------------------------------------------------


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [x.contiguous() for x in tensors]


def _wide(*parameters: Tensor) -> list[Tensor]:
    return [parameter.float().contiguous() for parameter in parameters]


def _narrow(
    gradients: tuple[Tensor, ...] | list[Tensor], parameters: tuple[Tensor, ...] | list[Tensor]
) -> list[Tensor]:
    """Gradients in the dtypes of their parameters."""
    return [gradient.to(parameter.dtype) for gradient, parameter in zip(gradients, parameters, strict=True)]


class MixIn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TSD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rounds: int, eps: float, rms_eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        streams = x_TSD.contiguous()
        y_TD, post_TS, comb_TSS, *saved = mix_in_forward(streams, *_wide(fn, base, scale), rounds, eps, rms_eps)
        ctx.save_for_backward(streams, fn, base, scale, *saved)
        ctx.rounds, ctx.eps = rounds, eps
        return x_TSD, y_TD, post_TS, comb_TSS

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_TSD, *parameters, mixes, inverse_rms_T = ctx.saved_tensors
        dx_TSD, *dparameters = mix_in_backward(
            x_TSD, *_wide(*parameters), mixes, inverse_rms_T, *_contiguous(*gradients), ctx.rounds, ctx.eps
        )
        return dx_TSD, *_narrow(dparameters, parameters), None, None, None


class MixOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TSD: Tensor, out_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor) -> Tensor:
        inputs = _contiguous(x_TSD, out_TD, post_TS, comb_TSS)
        ctx.save_for_backward(*inputs)
        return mix_out_forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmixed_TSD: Tensor) -> tuple[Tensor | None, ...]:
        return mix_out_backward(*ctx.saved_tensors, dmixed_TSD.contiguous())


class MixHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TSD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, rms_eps: float) -> Tensor:
        x_TSD = x_TSD.contiguous()
        y_TD, *saved = mix_head_forward(x_TSD, *_wide(fn, base, scale), eps, rms_eps)
        ctx.save_for_backward(x_TSD, fn, base, scale, *saved)
        ctx.eps = eps
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TSD, *parameters, mixes, inverse_rms_T = ctx.saved_tensors
        dx_TSD, *dparameters = mix_head_backward(
            x_TSD, *_wide(*parameters), mixes, inverse_rms_T, dy_TD.contiguous(), ctx.eps
        )
        return dx_TSD, *_narrow(dparameters, parameters), None, None
