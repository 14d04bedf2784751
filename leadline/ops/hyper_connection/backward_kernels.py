"""The backward kernels of the hyper-connections; `kernel.py` says how they work together."""

from __future__ import annotations

import triton
import triton.language as tl

from leadline.ops.hyper_connection.forward_kernels import dot


@triton.jit
def _dot_of_floats(a, b, total, SPLIT: tl.constexpr):
    """total + a b for FP32 a and b; with SPLIT to 16 bits, more than a result in bfloat16 can hold."""
    if SPLIT:
        a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
        total = tl.dot((a - a_high.to(tl.float32)).to(tl.bfloat16), b_high, total)
        total = tl.dot(a_high, (b - b_high.to(tl.float32)).to(tl.bfloat16), total)
        return tl.dot(a_high, b_high, total)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _softmax(logits, valid):
    """Softmax over the last axis of [tokens, S, S], 0 outside of the valid S x S."""
    logits = tl.where(valid, logits, -1e30)
    weights = tl.where(valid, tl.exp(logits - tl.max(logits, axis=2, keep_dims=True)), 0.0)
    return weights / tl.maximum(tl.sum(weights, axis=2, keep_dims=True), 1e-30)


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
    pre_ptr,
    dlogits_ptr,
    dprojection_ptr,
    pull_ptr,
    T,
    eps,
    ROUNDS: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """pre again. From the gradients of pre, post and comb to those of the logits, of the raw projection X fn^T, and to
    the factor with which X itself enters dX, through its rms."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < T
    inverse_rms = tl.load(inverse_rms_ptr + tokens, mask=inside, other=0.0)
    pull = tl.zeros((BLOCK_T,), tl.float32)

    stream = tl.arange(0, BLOCK_S)[None, :]
    each = inside[:, None] & (stream < S)
    for part in tl.static_range(min(2, ROWS // S)):
        place = part * S + stream
        scale = tl.load(scale_ptr + part)
        mixes = tl.load(mixes_ptr + tokens[:, None] * ROWS + place, mask=each, other=0.0)
        sigmoid = tl.sigmoid(mixes * scale + tl.load(base_ptr + place, mask=stream < S, other=0.0))
        dresult_ptr = dpost_ptr if part == 1 else dpre_ptr
        dresult = tl.load(dresult_ptr + tokens[:, None] * S + stream, mask=each, other=0.0)
        dlogits = (1 + part) * dresult * sigmoid * (1 - sigmoid)
        if part == 0:
            tl.store(pre_ptr + tokens[:, None] * S + stream, sigmoid + eps, mask=each)
        tl.store(dlogits_ptr + tokens[:, None] * ROWS + place, dlogits, mask=each)
        dprojection = dlogits * scale * inverse_rms[:, None]
        tl.store(dprojection_ptr + tokens[:, None] * BLOCK_ROWS + place, dprojection, mask=each)
        pull += tl.sum(dprojection * mixes, axis=1)

    if ROWS > S:
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
    pre_ptr,
    dprojection_ptr,
    pull_ptr,
    dy_ptr,
    dpassed_ptr,
    dfn_ptr,
    dx_ptr,
    T,
    S: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS_PER_SUM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dX_k = pre_k dy + dprojection fn_k + pull X_k + dpassed_k for some columns of all streams, and d fn of these
    columns, both over one run of tokens."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = tl.arange(0, BLOCK_ROWS)
    fn, dfn = (), ()
    for k in tl.static_range(S):
        part = tl.load(
            fn_ptr + rows[:, None] * (S * D) + k * D + columns[None, :],
            mask=(rows < ROWS)[:, None] & (columns < D)[None, :],
            other=0.0,
        )
        fn = fn + (part,)
        dfn = dfn + (tl.zeros((BLOCK_D, BLOCK_ROWS), tl.float32),)
    first = tl.program_id(1) * TOKENS_PER_SUM
    for start in tl.range(first, tl.minimum(first + TOKENS_PER_SUM, T), BLOCK_T, num_stages=STAGES):
        tokens = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = tokens < T
        mask = inside[:, None] & (columns < D)[None, :]
        places = tokens[:, None] * (S * D) + columns[None, :]
        dy = tl.load(dy_ptr + tokens[:, None] * D + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        dprojection = tl.load(
            dprojection_ptr + tokens[:, None] * BLOCK_ROWS + rows[None, :],
            mask=inside[:, None] & (rows < ROWS)[None, :],
            other=0.0,
        )
        pull = tl.load(pull_ptr + tokens, mask=inside, other=0.0)[:, None]
        new_dfn = ()
        for k in tl.static_range(S):
            x = tl.load(x_ptr + places + k * D, mask=mask, other=0.0)
            pre = tl.load(pre_ptr + tokens * S + k, mask=inside, other=0.0)[:, None]
            dx = pre * dy + pull * x.to(tl.float32)
            if dpassed_ptr is not None:
                dx += tl.load(dpassed_ptr + places + k * D, mask=mask, other=0.0).to(tl.float32)
            dx = _dot_of_floats(dprojection, fn[k], dx, SPLIT=x_ptr.dtype.element_ty == tl.bfloat16)
            tl.store(dx_ptr + places + k * D, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            new_dfn = new_dfn + (dot(tl.trans(x), dprojection, dfn[k]),)
        dfn = new_dfn
    for k in tl.static_range(S):
        flat = (tl.program_id(1).to(tl.int64) * S + k) * D + columns
        tl.store(dfn_ptr + flat[:, None] * BLOCK_ROWS + rows[None, :], dfn[k], mask=(columns < D)[:, None])


@triton.jit(do_not_specialize=["T"])
def hyper_connection_gates_bwd_kernel(
    dlogits_ptr,
    mixes_ptr,
    parts_ptr,
    T,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The part of a block of tokens in dbase, and behind it in d scale for each row of fn."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    rows = tl.arange(0, BLOCK_ROWS)
    inside = (tokens < T) & (rows < ROWS)[None, :]
    dlogits = tl.load(dlogits_ptr + tokens * ROWS + rows[None, :], mask=inside, other=0.0)
    mixes = tl.load(mixes_ptr + tokens * ROWS + rows[None, :], mask=inside, other=0.0)
    parts_ptr += tl.program_id(0) * 2 * BLOCK_ROWS + rows
    tl.store(parts_ptr, tl.sum(dlogits, axis=0))
    tl.store(parts_ptr + BLOCK_ROWS, tl.sum(dlogits * mixes, axis=0))


@triton.jit(do_not_specialize=["fn_parts", "gate_parts"])
def hyper_connection_parameters_bwd_kernel(
    fn_parts_ptr,
    gate_parts_ptr,
    dfn_ptr,
    dbase_ptr,
    dscale_ptr,
    fn_parts,
    gate_parts,
    S: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Some columns of dfn from its parts, which are stored the other way round; the first program also makes dbase and
    dscale."""
    columns = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)[:, None]
    rows = tl.arange(0, BLOCK_ROWS)
    dfn = tl.zeros((BLOCK_WIDTH, BLOCK_ROWS), tl.float32)
    for part in range(fn_parts):
        place = (part * WIDTH + columns) * BLOCK_ROWS + rows[None, :]
        dfn += tl.load(fn_parts_ptr + place, mask=columns < WIDTH, other=0.0)
    tl.store(dfn_ptr + rows[None, :] * WIDTH + columns, dfn, mask=(columns < WIDTH) & (rows < ROWS)[None, :])
    if tl.program_id(0) == 0:
        dbase = tl.zeros((BLOCK_ROWS,), tl.float32)
        dgates = tl.zeros((BLOCK_ROWS,), tl.float32)
        for part in range(gate_parts):
            dbase += tl.load(gate_parts_ptr + 2 * part * BLOCK_ROWS + rows)
            dgates += tl.load(gate_parts_ptr + (2 * part + 1) * BLOCK_ROWS + rows)
        tl.store(dbase_ptr + rows, dbase, mask=rows < ROWS)
        gate = tl.minimum(rows // S, 2)
        for number in tl.static_range(3 if ROWS > S else 1):
            tl.store(dscale_ptr + number, tl.sum(tl.where(gate == number, dgates, 0.0), axis=0))


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
