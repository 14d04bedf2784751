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
def hyper_connection_terms_fwd_kernel(
    fn_ptr,
    terms_ptr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The terms whose sum fn is, in the dtype of `terms_ptr`, one below the other, BLOCK_ROWS rows each."""
    rows = tl.arange(0, BLOCK_ROWS)[:, None]
    columns = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)[None, :]
    inside = columns < WIDTH
    rest = tl.load(fn_ptr + rows * WIDTH + columns, mask=inside & (rows < ROWS), other=0.0)
    for term in tl.static_range(TERMS):
        part = rest.to(terms_ptr.dtype.element_ty)
        rest -= part.to(tl.float32)
        tl.store(terms_ptr + (term * BLOCK_ROWS + rows) * WIDTH + columns, part, mask=inside)


@triton.jit(do_not_specialize=["T"])
def hyper_connection_through_fwd_kernel(
    x_ptr,
    out_ptr,
    post_ptr,
    comb_ptr,
    terms_ptr,
    mixed_ptr,
    partial_ptr,
    T,
    S: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TERMS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TERMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """SPAN columns of all streams of a block of tokens out of one sublayer, and what these columns contribute to the
    projection for the next. A slice of the projection is a span of every stream here."""
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    tokens = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < T
    post, comb = (), ()
    for k in tl.static_range(S):
        post = post + (tl.load(post_ptr + tokens * S + k, mask=inside, other=0.0)[:, None],)
    for place in tl.static_range(S * S):
        comb = comb + (tl.load(comb_ptr + tokens * S * S + place, mask=inside, other=0.0)[:, None],)
    terms = tl.arange(0, BLOCK_TERMS * BLOCK_ROWS)[:, None]
    products = tl.zeros((BLOCK_TERMS * BLOCK_ROWS, BLOCK_T), tl.float32)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, SPAN, BLOCK_D):
        columns = tl.program_id(0) * SPAN + start + tl.arange(0, BLOCK_D)[None, :]
        mask = inside[:, None] & (columns < D)
        out = tl.load(out_ptr + tokens[:, None] * D + columns, mask=mask, other=0.0).to(tl.float32)
        places = tokens[:, None] * (S * D) + columns
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
                terms_ptr + terms * (S * D) + k * D + columns,
                mask=(terms < TERMS * BLOCK_ROWS) & (columns < D),
                other=0.0,
            )
            # The streams on the left would be computed a second time, in another layout.
            products = tl.dot(fn, tl.trans(mixed), products, input_precision="ieee")
            mixed = mixed.to(tl.float32)
            squares += tl.sum(mixed * mixed, axis=1)
    products = tl.sum(tl.reshape(products, (BLOCK_TERMS, BLOCK_ROWS, BLOCK_T)), axis=0)
    rows = tl.arange(0, BLOCK_ROWS)[:, None]
    result = tl.where(rows == ROWS, squares[None, :], products)
    target = partial_ptr + (tl.program_id(0) * T + tokens)[None, :] * BLOCK_ROWS + rows
    tl.store(target, result, mask=inside[None, :])


# -- into a sublayer, with the projection at hand ------------------------------------------------------------------


@triton.jit
def _projections(
    tokens,
    partial_ptr,
    T,
    rms_eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """(projections of a block of tokens [tokens, BLOCK_ROWS], 1 / rms). All parts are summed, each GROUP of them by
    itself first; unrolled, so that all loads are under way at once."""
    rows = tl.arange(0, BLOCK_ROWS)[None, :]
    partial_ptr += tokens[:, None] * BLOCK_ROWS + rows
    inside = (tokens < T)[:, None]
    stride = T.to(tl.int64) * BLOCK_ROWS
    total = 0.0
    for first in tl.static_range(0, PARTS, GROUP):
        group = tl.load(partial_ptr + first * stride, mask=inside, other=0.0)
        for number in tl.static_range(first + 1, min(first + GROUP, PARTS)):
            group += tl.load(partial_ptr + number * stride, mask=inside, other=0.0)
        total += group
    squares = tl.sum(tl.where(rows == ROWS, total, 0.0), axis=1)
    inverse_rms = tl.rsqrt(squares / WIDTH + rms_eps)
    return total * inverse_rms[:, None], inverse_rms


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
    mixes, _ = _projections(tokens, partial_ptr, T, rms_eps, S * D, ROWS, PARTS, GROUP, BLOCK_ROWS)
    rows, scale = tl.arange(0, BLOCK_ROWS)[None, :], tl.load(scale_ptr)
    pre = ()
    for j in tl.static_range(S):
        mix = tl.sum(tl.where(rows == j, mixes, 0.0), axis=1)
        pre = pre + (tl.sigmoid(mix * scale + tl.load(base_ptr + j)) + eps,)
    for start in range(0, SPAN, BLOCK_D):
        columns = tl.program_id(1) * SPAN + start + tl.arange(0, BLOCK_D)
        mask = (tokens < T)[:, None] & (columns < D)[None, :]
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
    mixes, inverse_rms = _projections(tokens, partial_ptr, T, rms_eps, S * D, ROWS, PARTS, GROUP, BLOCK_ROWS)
    tl.store(inverse_rms_ptr + tokens, inverse_rms, mask=inside)
    rows = tl.arange(0, BLOCK_ROWS)[None, :]
    tl.store(mixes_ptr + tokens[:, None] * ROWS + rows, mixes, mask=inside[:, None] & (rows < ROWS))

    if ROWS > S:
        tl.debug_barrier()  # other threads read now, in the shapes of post and comb, what was written above
        stream = tl.arange(0, BLOCK_S)[None, :]
        each = inside[:, None] & (stream < S)
        mixes = tl.load(mixes_ptr + tokens[:, None] * ROWS + S + stream, mask=each, other=0.0)
        logits = mixes * tl.load(scale_ptr + 1) + tl.load(base_ptr + S + stream, mask=stream < S, other=0.0)
        tl.store(post_ptr + tokens[:, None] * S + stream, 2 * tl.sigmoid(logits), mask=each)

        read, written = tl.arange(0, BLOCK_S)[None, :, None], tl.arange(0, BLOCK_S)[None, None, :]
        place = read * S + written
        valid = inside[:, None, None] & (read < S) & (written < S)
        mixes = tl.load(mixes_ptr + tokens[:, None, None] * ROWS + 2 * S + place, mask=valid, other=0.0)
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
