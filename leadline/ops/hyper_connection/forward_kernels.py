"""The forward kernels of the hyper-connections; `kernel.py` says how they work together."""

from __future__ import annotations

import triton
import triton.language as tl

from leadline.ops.early_start import begin, let_next_start, wait_for_earlier

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
        inside = (tokens < T)[:, None] & (columns < WIDTH)[None, :]
        x = tl.load(x_ptr + tokens[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)
        inside = (rows < ROWS)[None, :] & (columns < WIDTH)[:, None]
        fn = tl.load(fn_ptr + rows[None, :] * WIDTH + columns[:, None], mask=inside, other=0.0)
        products = dot(x, fn, products)
        x = x.to(tl.float32)
        squares += tl.sum(x * x, axis=1)
    result = tl.where((rows == ROWS)[None, :], (total_squares + squares)[:, None], total_products + products)
    target = partial_ptr + (tl.program_id(0) * T + tokens)[:, None] * BLOCK_ROWS + rows[None, :]
    tl.store(target, result, mask=(tokens < T)[:, None])


@triton.jit(do_not_specialize=["T"])
def hyper_connection_projection_step_kernel(
    x_ptr,
    fn_ptr,
    partial_ptr,
    T,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What hyper_connection_projection_fwd_kernel leaves of one slice, for TOKENS tokens one after the other. A slice
    of fn stays in registers."""
    let_next_start(EARLY)
    rows = tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(0) * SLICE + tl.arange(0, SLICE)
    inside = (rows < ROWS)[:, None] & (columns < WIDTH)[None, :]
    fn = tl.load(fn_ptr + rows[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)
    wait_for_earlier(EARLY)
    first = tl.program_id(1) * TOKENS
    for token in range(first, min(first + TOKENS, T)):
        row = tl.cast(token, tl.int64)
        x = tl.load(x_ptr + row * WIDTH + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
        products = tl.sum(tl.where((rows == ROWS)[:, None], x, fn) * x, axis=1)
        tl.store(partial_ptr + (tl.program_id(0) * T + token) * BLOCK_ROWS + rows, products)


# -- out of a sublayer ---------------------------------------------------------------------------------------------


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
    EARLY: tl.constexpr,
):
    """SPAN columns of one token."""
    begin(EARLY)
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
def _normalized(comb, eps, S: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr):
    """comb with every sum over k made 1, where comb is a tuple of S x S vectors and [j, k] is at j ROW + k COLUMN."""
    inverse = ()
    for j in tl.static_range(S):
        total = comb[j * ROW]
        for k in tl.static_range(1, S):
            total += comb[j * ROW + k * COLUMN]
        inverse = inverse + (1.0 / (total + eps),)
    normalized = ()
    for place in tl.static_range(S * S):
        normalized = normalized + (comb[place] * inverse[place // ROW % S],)
    return normalized


@triton.jit
def _sinkhorn(logits, ROUNDS: tl.constexpr, eps, S: tl.constexpr):
    """comb of its logits, both tuples of S x S numbers or vectors."""
    weights = ()
    for place in tl.static_range(S * S):
        largest = logits[place // S * S]
        for k in tl.static_range(1, S):
            largest = tl.maximum(largest, logits[place // S * S + k])
        weights = weights + (tl.exp(logits[place] - largest),)
    weights = _normalized(weights, 0.0, S, S, 1)
    comb = ()
    for place in tl.static_range(S * S):
        comb = comb + (weights[place] + eps,)
    comb = _normalized(comb, eps, S, 1, S)
    for _ in range(ROUNDS - 1):
        comb = _normalized(_normalized(comb, eps, S, S, 1), eps, S, 1, S)
    return comb


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
):
    """post and comb of a block of tokens, and what the backward needs of all coefficients. Each thread has the whole
    comb of a token, so that no step of Sinkhorn waits for another thread."""
    inside = tokens < T
    mixes, inverse_rms = _projections(tokens, partial_ptr, T, rms_eps, S * D, ROWS, PARTS, GROUP, BLOCK_ROWS)
    tl.store(inverse_rms_ptr + tokens, inverse_rms, mask=inside)
    rows = tl.arange(0, BLOCK_ROWS)[None, :]
    tl.store(mixes_ptr + tokens[:, None] * ROWS + rows, mixes, mask=inside[:, None] & (rows < ROWS))

    if ROWS > S:
        tl.debug_barrier()  # other threads read now what was written above
        mixes_ptr += tokens * ROWS + S
        post_scale, comb_scale = tl.load(scale_ptr + 1), tl.load(scale_ptr + 2)
        for k in tl.static_range(S):
            logits = tl.load(mixes_ptr + k, mask=inside, other=0.0) * post_scale + tl.load(base_ptr + S + k)
            tl.store(post_ptr + tokens * S + k, 2 * tl.sigmoid(logits), mask=inside)
        logits = ()
        for place in tl.static_range(S * S):
            mix = tl.load(mixes_ptr + S + place, mask=inside, other=0.0)
            logits = logits + (mix * comb_scale + tl.load(base_ptr + 2 * S + place),)
        comb = _sinkhorn(logits, ROUNDS, eps, S)
        for place in tl.static_range(S * S):
            tl.store(comb_ptr + tokens * (S * S) + place, comb[place], mask=inside)


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
            ROUNDS, S, D, ROWS, PARTS, GROUP, BLOCK_ROWS,
        )  # fmt: skip


# -- into a sublayer, for few tokens -------------------------------------------------------------------------------


@triton.jit
def _projections_of_token(
    token,
    partial_ptr,
    T,
    rms_eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """_projections of one token, whose parts are few enough to be in registers together: every load is under way before
    the first sum waits for one."""
    rows = tl.arange(0, BLOCK_ROWS)
    stride = T.to(tl.int64) * BLOCK_ROWS
    parts = ()
    for number in tl.static_range(PARTS):
        parts = parts + (tl.load(partial_ptr + number * stride + token * BLOCK_ROWS + rows),)
    total = 0.0
    for first in tl.static_range(0, PARTS, GROUP):
        group = parts[first]
        for number in tl.static_range(first + 1, min(first + GROUP, PARTS)):
            group += parts[number]
        total += group
    squares = tl.sum(tl.where(rows == ROWS, total, 0.0))
    inverse_rms = tl.rsqrt(squares / WIDTH + rms_eps)
    return total * inverse_rms, inverse_rms


@triton.jit
def _normalized_tile(comb, eps, AXIS: tl.constexpr):
    """comb, a tile, with every sum along an axis made 1."""
    return comb / tl.expand_dims(tl.sum(comb, axis=AXIS) + eps, AXIS)


@triton.jit
def _sinkhorn_tile(logits, inside, ROUNDS: tl.constexpr, eps):
    """_sinkhorn of one token as a tile, of which `inside` is real: a thread has one number instead of all."""
    logits = tl.where(inside, logits, -1e30)
    weights = tl.where(inside, tl.exp(logits - tl.max(logits, axis=1)[:, None]), 0.0)
    # A real row has a weight of 1, the others are to be divided by something.
    comb = tl.where(inside, weights / tl.maximum(tl.sum(weights, axis=1), 1.0)[:, None] + eps, 0.0)
    comb = _normalized_tile(comb, eps, 0)
    for _ in range(ROUNDS - 1):
        comb = _normalized_tile(_normalized_tile(comb, eps, 1), eps, 0)
    return comb


@triton.jit
def _coefficients_of_token(
    token,
    mixes,
    inverse_rms,
    base_ptr,
    scale_ptr,
    post_ptr,
    comb_ptr,
    mixes_ptr,
    inverse_rms_ptr,
    eps,
    ROUNDS: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """_coefficients of one token."""
    rows = tl.arange(0, BLOCK_ROWS)
    tl.store(inverse_rms_ptr + token, inverse_rms)
    mixes_ptr += token * ROWS
    tl.store(mixes_ptr + rows, mixes, mask=rows < ROWS)
    if ROWS > S:
        tl.debug_barrier()  # other threads read now what was written above
        k = tl.arange(0, BLOCK_S)
        post = tl.load(mixes_ptr + S + k, mask=k < S, other=0.0) * tl.load(scale_ptr + 1)
        post += tl.load(base_ptr + S + k, mask=k < S, other=0.0)
        tl.store(post_ptr + token * S + k, 2 * tl.sigmoid(post), mask=k < S)
        place, inside = k[:, None] * S + k[None, :], (k < S)[:, None] & (k < S)[None, :]
        logits = tl.load(mixes_ptr + 2 * S + place, mask=inside, other=0.0) * tl.load(scale_ptr + 2)
        logits += tl.load(base_ptr + 2 * S + place, mask=inside, other=0.0)
        comb = _sinkhorn_tile(logits, inside, ROUNDS, eps)
        tl.store(comb_ptr + token * (S * S) + place, comb, mask=inside)


@triton.jit(do_not_specialize=["T"])
def hyper_connection_in_step_kernel(
    x_ptr,
    partial_ptr,
    base_ptr,
    scale_ptr,
    norm_ptr,
    y_ptr,
    post_ptr,
    comb_ptr,
    mixes_ptr,
    inverse_rms_ptr,
    T,
    eps,
    rms_eps,
    norm_eps,
    ROUNDS: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    """hyper_connection_in_fwd_kernel with a row of programs for each token: the last makes the coefficients, the others
    y. norm: the weight of an RMS norm that follows; a program then has a whole y, which is rounded before as if it had
    been stored."""
    let_next_start(EARLY)
    token = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) < tl.num_programs(1) - 1:
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        if norm_ptr is not None:
            norm = tl.load(norm_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
        wait_for_earlier(EARLY)
        streams = ()
        for j in tl.static_range(S):
            x = tl.load(x_ptr + (token * S + j) * D + columns, mask=columns < D, other=0.0)
            streams = streams + (x.to(tl.float32),)
        mixes, _ = _projections_of_token(
            token, partial_ptr, T, rms_eps, S * D, ROWS, PARTS, GROUP, BLOCK_ROWS
        )  # fmt: skip
        rows, scale = tl.arange(0, BLOCK_ROWS), tl.load(scale_ptr)
        y = tl.zeros((BLOCK_D,), tl.float32)
        for j in tl.static_range(S):
            mix = tl.sum(tl.where(rows == j, mixes, 0.0))
            y += (tl.sigmoid(mix * scale + tl.load(base_ptr + j)) + eps) * streams[j]
        if norm_ptr is not None:
            y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
            y *= tl.rsqrt(tl.sum(y * y, axis=0) / D + norm_eps)
            y *= norm
        tl.store(y_ptr + token * D + columns, y.to(y_ptr.dtype.element_ty), mask=columns < D)
    else:
        wait_for_earlier(EARLY)
        mixes, inverse_rms = _projections_of_token(
            token, partial_ptr, T, rms_eps, S * D, ROWS, PARTS, GROUP, BLOCK_ROWS
        )  # fmt: skip
        _coefficients_of_token(
            token, mixes, inverse_rms, base_ptr, scale_ptr, post_ptr, comb_ptr, mixes_ptr, inverse_rms_ptr, eps, ROUNDS,
            S, ROWS, BLOCK_ROWS, BLOCK_S,
        )  # fmt: skip
