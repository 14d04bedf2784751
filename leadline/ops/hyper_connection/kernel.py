"""Hyper-connections in Triton.

Bytes are the floor. With S D values in a token's streams, 32 KiB at S = 4, D = 4096 in bfloat16, the projection does 48
FLOPs for each value, and everything else a few more; tensor cores do some 500 in the time that it takes to read one. So
what counts is how often the streams cross the memory bus:

    mix_in  forward    X read twice, y written             the collapse needs pre, which needs all of X first
    mix_out forward    X and out read, X' written          at its floor
    mix_in  backward   X and dy read twice, dX written     dpre first; then dX and d fn in one pass over tiles
    mix_out backward   X, out, dX' read, dX, dout written  at its floor

Holding a token between the two reads is not possible: `fn` is 24 rows as long as the token, so tokens have to share
each piece of it, 128 at a time, and 128 tokens are twenty times the memory of a multiprocessor. What the cache holds is
used instead: `mix_out` goes through the tokens from first to last, the projection that follows it from last to first,
and the collapse again from first to last, so that each begins with what the one before it touched last.

`mix_in` forward is two kernels:

- the projection cuts the streams into slices of a fixed length, so that a token's result depends neither on how many
  tokens come along nor on the card; one program multiplies a block of tokens with a slice of fn and leaves 24 partial
  products and a partial sum of squares for each token;
- the collapse adds those up, has its coefficients in registers (Sinkhorn included: one number for each thread) and
  reads the streams again.

Products are as exact as in FP32. fn is an FP32 parameter; against bfloat16 streams it is split into three bfloat16
terms whose sum it is, for three passes of the tensor cores: a quarter of the time of FP32 arithmetic.

Sums over tokens (gradients of fn, base, scale) go through partial sums of fixed runs of tokens, added in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

SLICE = 2048  # values of a token's streams that one program of the projection multiplies
TOKENS_PER_SUM = 2048  # tokens in one partial sum of the gradient of fn
BLOCK_D = 1024


# -- exact products ------------------------------------------------------------------------------------------------


@triton.jit
def _dot(a, b, total):
    """total + a b, with FP32 b. bfloat16 a is exact as it is; b = high + middle + low, each in bfloat16."""
    if a.dtype == tl.bfloat16:
        high = b.to(tl.bfloat16)
        rest = b - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(a, low, total)
        total = tl.dot(a, middle, total)
        return tl.dot(a, high, total)
    return tl.dot(a.to(tl.float32), b, total, input_precision="ieee")


@triton.jit
def _dot_of_floats(a, b, total, SPLIT: tl.constexpr):
    """total + a b for FP32 a and b; with SPLIT to 16 bits, more than a result in bfloat16 can hold."""
    if SPLIT:
        a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
        total = tl.dot((a - a_high.to(tl.float32)).to(tl.bfloat16), b_high, total)
        total = tl.dot(a_high, (b - b_high.to(tl.float32)).to(tl.bfloat16), total)
        return tl.dot(a_high, b_high, total)
    return tl.dot(a, b, total, input_precision="ieee")


# -- mix_in, forward -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T"])
def hyper_connection_projection_fwd_kernel(
    x_ptr,
    fn_ptr,
    partial_ptr,
    T,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """partial[slice, t, :ROWS] = X_t[slice] fn[:, slice]^T; partial[slice, t, ROWS] = |X_t[slice]|^2."""
    # Slices of a block of tokens are neighbours, and the last tokens come first; see the top of the file.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    tokens = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = tl.arange(0, BLOCK_ROWS)
    products = tl.zeros((BLOCK_T, BLOCK_ROWS), tl.float32)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, SLICE, BLOCK_WIDTH):
        columns = tl.program_id(0) * SLICE + start + tl.arange(0, BLOCK_WIDTH)
        inside = columns < WIDTH
        x = tl.load(
            x_ptr + tokens[:, None] * WIDTH + columns[None, :], mask=(tokens < T)[:, None] & inside[None, :], other=0.0
        )
        fn = tl.load(
            fn_ptr + rows[None, :] * WIDTH + columns[:, None], mask=(rows < ROWS)[None, :] & inside[:, None], other=0.0
        )
        products = _dot(x, fn, products)
        x = x.to(tl.float32)
        squares += tl.sum(x * x, axis=1)
    result = tl.where((rows == ROWS)[None, :], squares[:, None], products)
    target = partial_ptr + (tl.program_id(0) * T + tokens)[:, None] * BLOCK_ROWS + rows[None, :]
    tl.store(target, result, mask=(tokens < T)[:, None])


@triton.jit
def _sum_of_slices(partial_ptr, offsets, mask, stride, SLICES: tl.constexpr):
    total = tl.load(partial_ptr + offsets, mask=mask, other=0.0)
    for number in tl.static_range(1, SLICES):  # unrolled, so that all loads are under way at once
        total += tl.load(partial_ptr + number * stride + offsets, mask=mask, other=0.0)
    return total


@triton.jit
def _softmax(logits, valid):
    """Softmax over the last axis of [tokens, S, S], 0 outside of the valid S x S."""
    logits = tl.where(valid, logits, -1e30)
    weights = tl.where(valid, tl.exp(logits - tl.max(logits, axis=2, keep_dims=True)), 0.0)
    return weights / tl.maximum(tl.sum(weights, axis=2, keep_dims=True), 1e-30)


@triton.jit(do_not_specialize=["T"])
def hyper_connection_in_fwd_kernel(
    x_ptr,
    partial_ptr,
    base_ptr,
    scale_ptr,
    y_ptr,
    post_ptr,
    comb_ptr,
    mixes_ptr,
    inverse_rms_ptr,
    T,
    eps,
    rms_eps,
    ROUNDS: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Coefficients of a block of tokens, and y for SPAN of its D columns."""
    ROWS: tl.constexpr = (2 + S) * S
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < T
    partial_ptr += tokens * BLOCK_ROWS
    stride = T.to(tl.int64) * BLOCK_ROWS
    squares = _sum_of_slices(partial_ptr, ROWS, inside, stride, SLICES)
    inverse_rms = tl.rsqrt(squares / (S * D) + rms_eps)

    pre_scale = tl.load(scale_ptr)
    pre = ()
    for j in tl.static_range(S):
        mix = _sum_of_slices(partial_ptr, j, inside, stride, SLICES) * inverse_rms
        pre = pre + (tl.sigmoid(mix * pre_scale + tl.load(base_ptr + j)) + eps,)
    for start in range(0, SPAN, BLOCK_D):
        columns = tl.program_id(1) * SPAN + start + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (columns < D)[None, :]
        y = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for j in tl.static_range(S):
            x = tl.load(x_ptr + tokens[:, None] * (S * D) + j * D + columns[None, :], mask=mask, other=0.0)
            y += pre[j][:, None] * x.to(tl.float32)
        tl.store(y_ptr + tokens[:, None] * D + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)

    if tl.program_id(1) == 0:
        tl.store(inverse_rms_ptr + tokens, inverse_rms, mask=inside)

        stream = tl.arange(0, BLOCK_S)[None, :]
        each = inside[:, None] & (stream < S)
        for part in tl.static_range(2):
            place = part * S + stream
            mixes = _sum_of_slices(partial_ptr[:, None], place, each, stride, SLICES) * inverse_rms[:, None]
            tl.store(mixes_ptr + tokens[:, None] * ROWS + place, mixes, mask=each)
            if part == 1:
                logits = mixes * tl.load(scale_ptr + 1) + tl.load(base_ptr + place, mask=stream < S, other=0.0)
                tl.store(post_ptr + tokens[:, None] * S + stream, 2 * tl.sigmoid(logits), mask=each)

        read, written = tl.arange(0, BLOCK_S)[None, :, None], tl.arange(0, BLOCK_S)[None, None, :]
        place = read * S + written
        valid = inside[:, None, None] & (read < S) & (written < S)
        mixes = _sum_of_slices(partial_ptr[:, None, None], 2 * S + place, valid, stride, SLICES)
        mixes *= inverse_rms[:, None, None]
        tl.store(mixes_ptr + tokens[:, None, None] * ROWS + 2 * S + place, mixes, mask=valid)
        base = tl.load(base_ptr + 2 * S + place, mask=(read < S) & (written < S), other=0.0)
        logits = mixes * tl.load(scale_ptr + 2) + base
        comb = tl.where(valid, _softmax(logits, valid) + eps, 0.0)
        comb /= tl.sum(comb, axis=1, keep_dims=True) + eps
        for _ in range(ROUNDS - 1):
            comb /= tl.sum(comb, axis=2, keep_dims=True) + eps
            comb /= tl.sum(comb, axis=1, keep_dims=True) + eps
        tl.store(comb_ptr + tokens[:, None, None] * (S * S) + place, comb, mask=valid)


# -- mix_in, backward ----------------------------------------------------------------------------------------------


@triton.jit
def hyper_connection_dpre_bwd_kernel(
    x_ptr,
    dy_ptr,
    dpre_ptr,
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dpre_j = dy . X_j of one token."""
    token = tl.program_id(0).to(tl.int64)
    totals = ()
    for _ in tl.static_range(S):
        totals = totals + (tl.zeros((BLOCK_D,), tl.float32),)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        dy = tl.load(dy_ptr + token * D + columns, mask=columns < D, other=0.0).to(tl.float32)
        sums = ()
        for j in tl.static_range(S):
            x = tl.load(x_ptr + (token * S + j) * D + columns, mask=columns < D, other=0.0).to(tl.float32)
            sums = sums + (totals[j] + dy * x,)
        totals = sums
    for j in tl.static_range(S):
        tl.store(dpre_ptr + token * S + j, tl.sum(totals[j], axis=0))


@triton.jit(do_not_specialize=["T"])
def hyper_connection_coefficients_bwd_kernel(
    mixes_ptr,
    inverse_rms_ptr,
    base_ptr,
    scale_ptr,
    dpre_ptr,
    dpost_ptr,
    dcomb_ptr,
    dlogits_ptr,
    dprojection_ptr,
    pull_ptr,
    T,
    eps,
    ROUNDS: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """From the gradients of pre, post and comb to those of the logits, of the raw projection X fn^T, and to the factor
    with which X itself enters dX, through its rms."""
    ROWS: tl.constexpr = (2 + S) * S
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < T
    inverse_rms = tl.load(inverse_rms_ptr + tokens, mask=inside, other=0.0)
    pull = tl.zeros((BLOCK_T,), tl.float32)

    stream = tl.arange(0, BLOCK_S)[None, :]
    each = inside[:, None] & (stream < S)
    for part in tl.static_range(2):
        place = part * S + stream
        scale = tl.load(scale_ptr + part)
        mixes = tl.load(mixes_ptr + tokens[:, None] * ROWS + place, mask=each, other=0.0)
        sigmoid = tl.sigmoid(mixes * scale + tl.load(base_ptr + place, mask=stream < S, other=0.0))
        dresult_ptr = dpre_ptr if part == 0 else dpost_ptr
        dresult = tl.load(dresult_ptr + tokens[:, None] * S + stream, mask=each, other=0.0)
        dlogits = (1 + part) * dresult * sigmoid * (1 - sigmoid)
        tl.store(dlogits_ptr + tokens[:, None] * ROWS + place, dlogits, mask=each)
        dprojection = dlogits * scale * inverse_rms[:, None]
        tl.store(dprojection_ptr + tokens[:, None] * BLOCK_ROWS + place, dprojection, mask=each)
        pull += tl.sum(dprojection * mixes, axis=1)

    read, written = tl.arange(0, BLOCK_S)[None, :, None], tl.arange(0, BLOCK_S)[None, None, :]
    place = read * S + written
    valid = inside[:, None, None] & (read < S) & (written < S)
    scale = tl.load(scale_ptr + 2)
    mixes = tl.load(mixes_ptr + tokens[:, None, None] * ROWS + 2 * S + place, mask=valid, other=0.0)
    logits = mixes * scale + tl.load(base_ptr + 2 * S + place, mask=(read < S) & (written < S), other=0.0)
    probabilities = _softmax(logits, valid)
    # The rounds again, all of their results in registers. A result y = x / s with s = sum(x) + eps gives back
    # dx = (dy - sum(dy y)) / s.
    comb = tl.where(valid, probabilities + eps, 0.0)
    sums, results = (), ()
    for step in tl.static_range(2 * ROUNDS - 1):
        total = tl.sum(comb, axis=1 + step % 2, keep_dims=True) + eps
        comb = comb / total
        sums, results = sums + (total,), results + (comb,)
    d = tl.load(dcomb_ptr + tokens[:, None, None] * (S * S) + place, mask=valid, other=0.0)
    for step in tl.static_range(2 * ROUNDS - 2, -1, -1):
        d = (d - tl.sum(d * results[step], axis=1 + step % 2, keep_dims=True)) / sums[step]
    d = tl.where(valid, d, 0.0)
    dlogits = probabilities * (d - tl.sum(d * probabilities, axis=2, keep_dims=True))
    tl.store(dlogits_ptr + tokens[:, None, None] * ROWS + 2 * S + place, dlogits, mask=valid)
    dprojection = dlogits * scale * inverse_rms[:, None, None]
    tl.store(dprojection_ptr + tokens[:, None, None] * BLOCK_ROWS + 2 * S + place, dprojection, mask=valid)
    pull += tl.sum(tl.sum(dprojection * mixes, axis=2), axis=1)

    tl.store(pull_ptr + tokens, -pull * inverse_rms / (S * D), mask=inside)


@triton.jit(do_not_specialize=["T"])
def hyper_connection_in_bwd_kernel(
    x_ptr,
    fn_ptr,
    base_ptr,
    scale_ptr,
    mixes_ptr,
    dy_ptr,
    dprojection_ptr,
    pull_ptr,
    dx_ptr,
    dfn_ptr,
    T,
    eps,
    S: tl.constexpr,
    D: tl.constexpr,
    TOKENS_PER_SUM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dX_j = pre_j dy + dprojection fn_j + pull X_j for some columns of one stream, and d fn of these columns, both
    over one run of tokens."""
    ROWS: tl.constexpr = (2 + S) * S
    # The streams of the same columns are neighbours, so that they find dy in the cache.
    stream = tl.program_id(0) % S
    columns = (tl.program_id(0) // S) * BLOCK_D + tl.arange(0, BLOCK_D)
    flat = stream * D + columns
    rows = tl.arange(0, BLOCK_ROWS)
    fn = tl.load(
        fn_ptr + rows[:, None] * (S * D) + flat[None, :],
        mask=(rows < ROWS)[:, None] & (columns < D)[None, :],
        other=0.0,
    )
    pre_scale, pre_base = tl.load(scale_ptr), tl.load(base_ptr + stream)
    dfn = tl.zeros((BLOCK_D, BLOCK_ROWS), tl.float32)
    first = tl.program_id(1) * TOKENS_PER_SUM
    for start in tl.range(first, tl.minimum(first + TOKENS_PER_SUM, T), BLOCK_T, num_stages=STAGES):
        tokens = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = tokens < T
        mask = inside[:, None] & (columns < D)[None, :]
        x = tl.load(x_ptr + tokens[:, None] * (S * D) + flat[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + tokens[:, None] * D + columns[None, :], mask=mask, other=0.0)
        dprojection = tl.load(
            dprojection_ptr + tokens[:, None] * BLOCK_ROWS + rows[None, :],
            mask=inside[:, None] & (rows < ROWS)[None, :],
            other=0.0,
        )
        mix = tl.load(mixes_ptr + tokens * ROWS + stream, mask=inside, other=0.0)
        pre = tl.sigmoid(mix * pre_scale + pre_base) + eps
        pull = tl.load(pull_ptr + tokens, mask=inside, other=0.0)
        dx = pre[:, None] * dy.to(tl.float32) + pull[:, None] * x.to(tl.float32)
        dx = _dot_of_floats(dprojection, fn, dx, SPLIT=x_ptr.dtype.element_ty == tl.bfloat16)
        tl.store(
            dx_ptr + tokens[:, None] * (S * D) + flat[None, :],
            dx.to(dx_ptr.dtype.element_ty),
            mask=mask,
        )
        dfn = _dot(tl.trans(x), dprojection, dfn)
    dfn_ptr += tl.program_id(1).to(tl.int64) * (S * D * BLOCK_ROWS)
    tl.store(dfn_ptr + flat[:, None] * BLOCK_ROWS + rows[None, :], dfn, mask=(columns < D)[:, None])


# -- mix_out -------------------------------------------------------------------------------------------------------


@triton.jit
def hyper_connection_out_fwd_kernel(
    x_ptr,
    out_ptr,
    post_ptr,
    comb_ptr,
    mixed_ptr,
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPAN: tl.constexpr,
):
    """SPAN columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    post, comb = (), ()
    for k in tl.static_range(S):
        post = post + (tl.load(post_ptr + token * S + k),)
    for place in tl.static_range(S * S):
        comb = comb + (tl.load(comb_ptr + token * S * S + place),)
    for start in range(0, SPAN, BLOCK_D):
        columns = tl.program_id(1) * SPAN + start + tl.arange(0, BLOCK_D)
        mask = columns < D
        out = tl.load(out_ptr + token * D + columns, mask=mask, other=0.0).to(tl.float32)
        x = ()
        for j in tl.static_range(S):
            x = x + (tl.load(x_ptr + (token * S + j) * D + columns, mask=mask, other=0.0).to(tl.float32),)
        for k in tl.static_range(S):
            mixed = post[k] * out
            for j in tl.static_range(S):
                mixed += comb[j * S + k] * x[j]
            tl.store(mixed_ptr + (token * S + k) * D + columns, mixed.to(mixed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def hyper_connection_out_bwd_kernel(
    x_ptr,
    out_ptr,
    post_ptr,
    comb_ptr,
    dmixed_ptr,
    dx_ptr,
    dout_ptr,
    dpost_ptr,
    dcomb_ptr,
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """All gradients of one token. The S + S x S sums over its columns are kept as one number for each run of VECTOR
    columns, which is what one thread loads at once."""
    token = tl.program_id(0).to(tl.int64)
    post, comb, dpost, dcomb = (), (), (), ()
    for k in tl.static_range(S):
        post = post + (tl.load(post_ptr + token * S + k),)
        dpost = dpost + (tl.zeros((BLOCK_D // VECTOR,), tl.float32),)
    for place in tl.static_range(S * S):
        comb = comb + (tl.load(comb_ptr + token * S * S + place),)
        dcomb = dcomb + (tl.zeros((BLOCK_D // VECTOR,), tl.float32),)
    runs = tl.arange(0, BLOCK_D // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    for start in range(0, D, BLOCK_D):
        columns = start + runs
        mask = columns < D
        out = tl.load(out_ptr + token * D + columns, mask=mask, other=0.0).to(tl.float32)
        dmixed, new_dpost, new_dcomb = (), (), ()
        dout = tl.zeros((BLOCK_D // VECTOR, VECTOR), tl.float32)
        for k in tl.static_range(S):
            d = tl.load(dmixed_ptr + (token * S + k) * D + columns, mask=mask, other=0.0).to(tl.float32)
            dmixed = dmixed + (d,)
            dout += post[k] * d
            new_dpost = new_dpost + (dpost[k] + tl.sum(out * d, axis=1),)
        tl.store(dout_ptr + token * D + columns, dout.to(dout_ptr.dtype.element_ty), mask=mask)
        for j in tl.static_range(S):
            x = tl.load(x_ptr + (token * S + j) * D + columns, mask=mask, other=0.0).to(tl.float32)
            dx = tl.zeros((BLOCK_D // VECTOR, VECTOR), tl.float32)
            for k in tl.static_range(S):
                dx += comb[j * S + k] * dmixed[k]
                new_dcomb = new_dcomb + (dcomb[j * S + k] + tl.sum(x * dmixed[k], axis=1),)
            tl.store(dx_ptr + (token * S + j) * D + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dpost, dcomb = new_dpost, new_dcomb
    for k in tl.static_range(S):
        tl.store(dpost_ptr + token * S + k, tl.sum(dpost[k], axis=0))
    for place in tl.static_range(S * S):
        tl.store(dcomb_ptr + token * S * S + place, tl.sum(dcomb[place], axis=0))


# -- launches ------------------------------------------------------------------------------------------------------


def _rows_of_block(num_streams: int) -> int:
    """The (2 + S) S rows of fn and a place for the sum of squares, as a power of two that a dot takes."""
    return max(16, triton.next_power_of_2((2 + num_streams) * num_streams + 1))


def _block_of_columns(width: int) -> int:
    return min(BLOCK_D, triton.next_power_of_2(width))


def _span(num_tokens: int, width: int) -> int:
    """Columns of a token that one program does: all of them, when the tokens are many enough to fill a card."""
    block = _block_of_columns(width)
    return triton.cdiv(width, block) * block if num_tokens >= 1024 else block


def mix_in_forward(
    x_TSD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rounds: int, eps: float, rms_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y_TD, post_TS, comb_TSS, mixes, inverse_rms_T) for contiguous inputs, parameters in FP32."""
    (num_tokens, num_streams, width), device = x_TSD.shape, x_TSD.device
    rows, block_rows = len(fn), _rows_of_block(num_streams)
    slices = triton.cdiv(num_streams * width, SLICE)
    partial = torch.empty(slices, num_tokens, block_rows, device=device)
    hyper_connection_projection_fwd_kernel[(slices, triton.cdiv(num_tokens, 128))](
        x_TSD, fn, partial, num_tokens, num_streams * width, rows, SLICE, 128, block_rows, 64,
        num_warps=8, num_stages=4,
    )  # fmt: skip
    y_TD = x_TSD.new_empty(num_tokens, width)
    post_TS = torch.empty(num_tokens, num_streams, device=device)
    comb_TSS = torch.empty(num_tokens, num_streams, num_streams, device=device)
    mixes, inverse_rms_T = torch.empty(num_tokens, rows, device=device), torch.empty(num_tokens, device=device)
    block_tokens, span = 4, _span(num_tokens, width)
    hyper_connection_in_fwd_kernel[(triton.cdiv(num_tokens, block_tokens), triton.cdiv(width, span))](
        x_TSD, partial, base, scale, y_TD, post_TS, comb_TSS, mixes, inverse_rms_T, num_tokens, eps, rms_eps, rounds,
        num_streams, width, slices, block_rows, block_tokens, triton.next_power_of_2(num_streams),
        _block_of_columns(width), span, num_warps=4,
    )  # fmt: skip
    return y_TD, post_TS, comb_TSS, mixes, inverse_rms_T


def mix_in_backward(
    x_TSD: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    mixes: Tensor,
    inverse_rms_T: Tensor,
    dy_TD: Tensor,
    dpost_TS: Tensor,
    dcomb_TSS: Tensor,
    rounds: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dfn, dbase, dscale) for contiguous inputs, parameters in FP32."""
    (num_tokens, num_streams, width), device = x_TSD.shape, x_TSD.device
    rows, block_rows = len(fn), _rows_of_block(num_streams)
    dpre_TS = torch.empty(num_tokens, num_streams, device=device)
    hyper_connection_dpre_bwd_kernel[(num_tokens,)](
        x_TSD, dy_TD, dpre_TS, num_streams, width, _block_of_columns(width), num_warps=4
    )
    dlogits, pull_T = torch.empty_like(mixes), torch.empty(num_tokens, device=device)
    dprojection = torch.empty(num_tokens, block_rows, device=device)
    # Two 4 x 4 matrices fill one warp, and sums within a warp need no barrier.
    hyper_connection_coefficients_bwd_kernel[(triton.cdiv(num_tokens, 2),)](
        mixes, inverse_rms_T, base, scale, dpre_TS, dpost_TS, dcomb_TSS, dlogits, dprojection, pull_T, num_tokens, eps,
        rounds, num_streams, width, block_rows, 2, triton.next_power_of_2(num_streams), num_warps=1,
    )  # fmt: skip
    dx_TSD = torch.empty_like(x_TSD)
    sums = triton.cdiv(num_tokens, TOKENS_PER_SUM)
    dfn = torch.empty(sums, num_streams * width, block_rows, device=device)
    # Arithmetic in FP32 takes registers that tensor cores do not need. 168 registers let 3 programs share a processor.
    edge = 64 if x_TSD.dtype == torch.bfloat16 else 32
    hyper_connection_in_bwd_kernel[(num_streams * triton.cdiv(width, edge), sums)](
        x_TSD, fn, base, scale, mixes, dy_TD, dprojection, pull_T, dx_TSD, dfn, num_tokens, eps, num_streams, width,
        TOKENS_PER_SUM, block_rows, edge, edge, 3, num_warps=4, maxnreg=168,
    )  # fmt: skip
    dgates = (dlogits * mixes).sum(0).split([num_streams, num_streams, num_streams**2])
    dscale = torch.stack([dgate.sum() for dgate in dgates])
    return dx_TSD, dfn.sum(0)[:, :rows].T.contiguous(), dlogits.sum(0), dscale


def mix_out_forward(x_TSD: Tensor, out_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor) -> Tensor:
    """The mixed streams, for contiguous inputs."""
    mixed_TSD, (num_tokens, num_streams, width) = torch.empty_like(x_TSD), x_TSD.shape
    span = _span(num_tokens, width)
    hyper_connection_out_fwd_kernel[(num_tokens, triton.cdiv(width, span))](
        x_TSD, out_TD, post_TS, comb_TSS, mixed_TSD, num_streams, width, _block_of_columns(width), span, num_warps=4
    )
    return mixed_TSD


def mix_out_backward(
    x_TSD: Tensor, out_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor, dmixed_TSD: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dout, dpost, dcomb) for contiguous inputs."""
    dx_TSD, dout_TD = torch.empty_like(x_TSD), torch.empty_like(out_TD)
    dpost_TS, dcomb_TSS = torch.empty_like(post_TS), torch.empty_like(comb_TSS)
    num_tokens, num_streams, width = x_TSD.shape
    block = _block_of_columns(width)
    vector = min(block, 16 // x_TSD.element_size())
    hyper_connection_out_bwd_kernel[(num_tokens,)](
        x_TSD, out_TD, post_TS, comb_TSS, dmixed_TSD, dx_TSD, dout_TD, dpost_TS, dcomb_TSS, num_streams, width, block,
        vector, num_warps=4,
    )  # fmt: skip
    return dx_TSD, dout_TD, dpost_TS, dcomb_TSS


# -- autograd ------------------------------------------------------------------------------------------------------


class MixIn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TSD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rounds: int, eps: float, rms_eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_TSD = x_TSD.contiguous()
        parameters = [parameter.float().contiguous() for parameter in (fn, base, scale)]
        y_TD, post_TS, comb_TSS, *saved = mix_in_forward(x_TSD, *parameters, rounds, eps, rms_eps)
        ctx.save_for_backward(x_TSD, fn, base, scale, *saved)
        ctx.rounds, ctx.eps = rounds, eps
        return y_TD, post_TS, comb_TSS

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor, dpost_TS: Tensor, dcomb_TSS: Tensor) -> tuple[Tensor | None, ...]:
        x_TSD, *parameters, mixes, inverse_rms_T = ctx.saved_tensors
        gradients = [gradient.contiguous() for gradient in (dy_TD, dpost_TS, dcomb_TSS)]
        fn, base, scale = (parameter.float().contiguous() for parameter in parameters)
        dx_TSD, *dparameters = mix_in_backward(
            x_TSD, fn, base, scale, mixes, inverse_rms_T, *gradients, ctx.rounds, ctx.eps
        )
        dparameters = [d.to(parameter.dtype) for d, parameter in zip(dparameters, parameters, strict=True)]
        return dx_TSD, *dparameters, None, None, None


class MixOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TSD: Tensor, out_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor) -> Tensor:
        inputs = [x.contiguous() for x in (x_TSD, out_TD, post_TS, comb_TSS)]
        ctx.save_for_backward(*inputs)
        return mix_out_forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmixed_TSD: Tensor) -> tuple[Tensor | None, ...]:
        return mix_out_backward(*ctx.saved_tensors, dmixed_TSD.contiguous())
