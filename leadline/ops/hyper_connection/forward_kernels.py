"""The forward kernels of the hyper-connections; `kernel.py` says how they work together."""

from __future__ import annotations

import triton
import triton.language as tl

# -- exact products ------------------------------------------------------------------------------------------------


@triton.jit
def dot(a, b, total):
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
def dot_left(a, b, total):
    """total + a b, with FP32 a: the same, the other way round."""
    if b.dtype == tl.bfloat16:
        high = a.to(tl.bfloat16)
        rest = a - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(low, b, total)
        total = tl.dot(middle, b, total)
        return tl.dot(high, b, total)
    return tl.dot(a, b.to(tl.float32), total, input_precision="ieee")


# -- out of a sublayer, and the projection for the next ------------------------------------------------------------


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
def _next_slice(begins, total, part):
    """(total + part, 0) where a slice begins, so that slices add up alike in one program and in many."""
    return total + tl.where(begins, part, 0.0), tl.where(begins, 0.0, part)


@triton.jit(do_not_specialize=["T"])
def hyper_connection_projection_fwd_kernel(
    x_ptr,
    fn_ptr,
    partial_ptr,
    T,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """partial[part, t, :ROWS] = X_t fn^T and partial[part, t, ROWS] = |X_t|^2 over TOGETHER slices of X_t, added one
    after the other."""
    # Slices of a block of tokens are neighbours, and the last tokens come first; see kernel.py.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    tokens = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = tl.arange(0, BLOCK_ROWS)
    products = tl.zeros((BLOCK_T, BLOCK_ROWS), tl.float32)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    total_products, total_squares = products, squares
    for start in range(0, TOGETHER * SLICE, BLOCK_WIDTH):
        begins = start % SLICE == 0
        total_products, products = _next_slice(begins, total_products, products)
        total_squares, squares = _next_slice(begins, total_squares, squares)
        columns = tl.program_id(0) * TOGETHER * SLICE + start + tl.arange(0, BLOCK_WIDTH)
        inside = columns < WIDTH
        x = tl.load(
            x_ptr + tokens[:, None] * WIDTH + columns[None, :], mask=(tokens < T)[:, None] & inside[None, :], other=0.0
        )
        fn = tl.load(
            fn_ptr + rows[None, :] * WIDTH + columns[:, None], mask=(rows < ROWS)[None, :] & inside[:, None], other=0.0
        )
        products = dot(x, fn, products)
        x = x.to(tl.float32)
        squares += tl.sum(x * x, axis=1)
    result = tl.where((rows == ROWS)[None, :], (total_squares + squares)[:, None], total_products + products)
    target = partial_ptr + (tl.program_id(0) * T + tokens)[:, None] * BLOCK_ROWS + rows[None, :]
    tl.store(target, result, mask=(tokens < T)[:, None])


@triton.jit(do_not_specialize=["T"])
def hyper_connection_through_fwd_kernel(
    x_ptr,
    out_ptr,
    post_ptr,
    comb_ptr,
    fn_ptr,
    mixed_ptr,
    partial_ptr,
    T,
    S: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LEFT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """TOGETHER spans of columns of all streams of a block of tokens out of one sublayer, and what these columns
    contribute to the projection for the next. A slice of the projection is a span of every stream here.

    fn stands on the left, with as many rows as a tensor core takes at once: the streams then go through shared memory
    in the layout in which they are stored, where on the left they would be computed a second time, in another layout.
    """
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    tokens = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < T
    post, comb = (), ()
    for k in tl.static_range(S):
        post = post + (tl.load(post_ptr + tokens * S + k, mask=inside, other=0.0)[:, None],)
    for place in tl.static_range(S * S):
        comb = comb + (tl.load(comb_ptr + tokens * S * S + place, mask=inside, other=0.0)[:, None],)
    rows = tl.arange(0, BLOCK_LEFT)
    products = tl.zeros((BLOCK_LEFT, BLOCK_T), tl.float32)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    total_products, total_squares = products, squares
    for start in range(0, TOGETHER * SPAN, BLOCK_D):
        begins = start % SPAN == 0
        total_products, products = _next_slice(begins, total_products, products)
        total_squares, squares = _next_slice(begins, total_squares, squares)
        columns = tl.program_id(0) * TOGETHER * SPAN + start + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (columns < D)[None, :]
        out = tl.load(out_ptr + tokens[:, None] * D + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        places = tokens[:, None] * (S * D) + columns[None, :]
        x = ()
        for j in tl.static_range(S):
            x = x + (tl.load(x_ptr + places + j * D, mask=mask, other=0.0).to(tl.float32),)
        for k in tl.static_range(S):
            mixed = post[k] * out
            for j in tl.static_range(S):
                mixed += comb[j * S + k] * x[j]
            mixed = mixed.to(mixed_ptr.dtype.element_ty)
            tl.store(mixed_ptr + places + k * D, mixed, mask=mask)
            fn = tl.load(
                fn_ptr + rows[:, None] * (S * D) + k * D + columns[None, :],
                mask=(rows < ROWS)[:, None] & (columns < D)[None, :],
                other=0.0,
            )
            products = dot_left(fn, tl.trans(mixed), products)
            mixed = mixed.to(tl.float32)
            squares += tl.sum(mixed * mixed, axis=1)
    result = tl.where((rows == ROWS)[:, None], (total_squares + squares)[None, :], total_products + products)
    target = partial_ptr + (tl.program_id(0) * T + tokens)[None, :] * BLOCK_ROWS + rows[:, None]
    tl.store(target, result, mask=inside[None, :] & (rows < BLOCK_ROWS)[:, None])


# -- into a sublayer, with the projection at hand ------------------------------------------------------------------


@triton.jit
def _sum_of_slices(partial_ptr, offsets, mask, stride, PARTS: tl.constexpr, GROUP: tl.constexpr):
    """The sum of all parts, each GROUP of them by itself first; unrolled, so that all loads are under way at once."""
    total = 0.0
    for first in tl.static_range(0, PARTS, GROUP):
        group = tl.load(partial_ptr + first * stride + offsets, mask=mask, other=0.0)
        for number in tl.static_range(first + 1, min(first + GROUP, PARTS)):
            group += tl.load(partial_ptr + number * stride + offsets, mask=mask, other=0.0)
        total += group
    return total


@triton.jit
def _inverse_rms(partial_ptr, inside, stride, rms_eps, WIDTH, ROWS, PARTS: tl.constexpr, GROUP: tl.constexpr):
    return tl.rsqrt(_sum_of_slices(partial_ptr, ROWS, inside, stride, PARTS, GROUP) / WIDTH + rms_eps)


@triton.jit
def _collapse(
    tokens,
    x_ptr,
    partial_ptr,
    base_ptr,
    scale_ptr,
    y_ptr,
    T,
    eps,
    rms_eps,
    S: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPAN: tl.constexpr,
):
    """y for SPAN columns of a block of tokens."""
    inside = tokens < T
    partial_ptr += tokens * BLOCK_ROWS
    stride = T.to(tl.int64) * BLOCK_ROWS
    inverse_rms = _inverse_rms(partial_ptr, inside, stride, rms_eps, S * D, ROWS, PARTS, GROUP)
    scale = tl.load(scale_ptr)
    pre = ()
    for j in tl.static_range(S):
        mix = _sum_of_slices(partial_ptr, j, inside, stride, PARTS, GROUP) * inverse_rms
        pre = pre + (tl.sigmoid(mix * scale + tl.load(base_ptr + j)) + eps,)
    for start in range(0, SPAN, BLOCK_D):
        columns = tl.program_id(1) * SPAN + start + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (columns < D)[None, :]
        y = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for j in tl.static_range(S):
            x = tl.load(x_ptr + tokens[:, None] * (S * D) + j * D + columns[None, :], mask=mask, other=0.0)
            y += pre[j][:, None] * x.to(tl.float32)
        tl.store(y_ptr + tokens[:, None] * D + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax(logits, valid):
    """Softmax over the last axis of [tokens, S, S], 0 outside of the valid S x S."""
    logits = tl.where(valid, logits, -1e30)
    weights = tl.where(valid, tl.exp(logits - tl.max(logits, axis=2, keep_dims=True)), 0.0)
    return weights / tl.maximum(tl.sum(weights, axis=2, keep_dims=True), 1e-30)


@triton.jit
def _coefficients(
    tokens,
    partial_ptr,
    base_ptr,
    scale_ptr,
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
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """post and comb of a block of tokens, and what the backward needs of all coefficients."""
    inside = tokens < T
    partial_ptr += tokens * BLOCK_ROWS
    stride = T.to(tl.int64) * BLOCK_ROWS
    inverse_rms = _inverse_rms(partial_ptr, inside, stride, rms_eps, S * D, ROWS, PARTS, GROUP)
    tl.store(inverse_rms_ptr + tokens, inverse_rms, mask=inside)

    stream = tl.arange(0, BLOCK_S)[None, :]
    each = inside[:, None] & (stream < S)
    for part in tl.static_range(min(2, ROWS // S)):
        place = part * S + stream
        mixes = _sum_of_slices(partial_ptr[:, None], place, each, stride, PARTS, GROUP) * inverse_rms[:, None]
        tl.store(mixes_ptr + tokens[:, None] * ROWS + place, mixes, mask=each)
        if part == 1:
            logits = mixes * tl.load(scale_ptr + 1) + tl.load(base_ptr + place, mask=stream < S, other=0.0)
            tl.store(post_ptr + tokens[:, None] * S + stream, 2 * tl.sigmoid(logits), mask=each)

    if ROWS > S:
        read, written = tl.arange(0, BLOCK_S)[None, :, None], tl.arange(0, BLOCK_S)[None, None, :]
        place = read * S + written
        valid = inside[:, None, None] & (read < S) & (written < S)
        mixes = _sum_of_slices(partial_ptr[:, None, None], 2 * S + place, valid, stride, PARTS, GROUP)
        mixes *= inverse_rms[:, None, None]
        tl.store(mixes_ptr + tokens[:, None, None] * ROWS + 2 * S + place, mixes, mask=valid)
        base = tl.load(base_ptr + 2 * S + place, mask=(read < S) & (written < S), other=0.0)
        logits = mixes * tl.load(scale_ptr + 2) + base
        comb = tl.where(valid, softmax(logits, valid) + eps, 0.0)
        comb /= tl.sum(comb, axis=1, keep_dims=True) + eps
        for _ in range(ROUNDS - 1):
            comb /= tl.sum(comb, axis=2, keep_dims=True) + eps
            comb /= tl.sum(comb, axis=1, keep_dims=True) + eps
        tl.store(comb_ptr + tokens[:, None, None] * (S * S) + place, comb, mask=valid)


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
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_COEFFICIENTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Programs come in groups for BLOCK_COEFFICIENTS tokens. The last of a group makes their coefficients, which is a
    long chain of small steps; the others make y for BLOCK_T of them and keep the memory busy meanwhile."""
    MEMBERS: tl.constexpr = BLOCK_COEFFICIENTS // BLOCK_T + 1
    first = (tl.program_id(0) // MEMBERS).to(tl.int64) * BLOCK_COEFFICIENTS
    member = tl.program_id(0) % MEMBERS
    if member < MEMBERS - 1:
        tokens = first + member * BLOCK_T + tl.arange(0, BLOCK_T)
        _collapse(
            tokens, x_ptr, partial_ptr, base_ptr, scale_ptr, y_ptr, T, eps, rms_eps, S, D, ROWS, PARTS, GROUP,
            BLOCK_ROWS, BLOCK_T, BLOCK_D, SPAN,
        )  # fmt: skip
    elif tl.program_id(1) == 0:
        tokens = first + tl.arange(0, BLOCK_COEFFICIENTS)
        _coefficients(
            tokens, partial_ptr, base_ptr, scale_ptr, post_ptr, comb_ptr, mixes_ptr, inverse_rms_ptr, T, eps, rms_eps,
            ROUNDS, S, D, ROWS, PARTS, GROUP, BLOCK_ROWS, BLOCK_S,
        )  # fmt: skip
