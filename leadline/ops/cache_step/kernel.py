"""A step's keys and entries in Triton: one program for each vector, from its parts to its row in the cache.

A step makes a few vectors in each layer, of 512 values or 128. What is done to one is a few thousand operations, and as
separate kernels it was thirty starts of a microsecond or two; so a program keeps its vector in registers from pooling
to packed bytes. Every step that has a dtype of its own rounds to it, in the order of the ops that prefill uses.

An entry pools up to 128 tokens, 512 KiB of values and scores, by one program: about 10 us, but only one step in 128 has
that to do for a sequence, and a program whose entry is not finished ends after reading so. The new tokens that an entry
pools are read where the products left them and not in the tails: so the same launch can put them into the tails,
without waiting. Floors: 8 KiB in and out for each token of a CSA layer, 32 KiB in for each entry.

Slots are walked through in blocks, with a running maximum of the scores for each channel, as in attention.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.formats import fp4, fp8
from leadline.formats.cache_entry import KEY_BLOCK, SCALES_ALIGNMENT
from leadline.ops.cache_rows.format_kernel import e2m1_codes, e4m3_codes, e8m0_inverse, largest_magnitude, scale_codes
from leadline.ops.cache_rows.kernel import rotary_view
from leadline.ops.early_start import begin, starts_early
from leadline.ops.norm_rope.kernel import VALUES_PER_WARP, hadamard_rows, rotate_rows, round_index_rows, round_key_rows
from leadline.ops.opaque import opaque
from leadline.ops.rms_norm.kernel import load_weight, norm_rows

SLOTS = 16  # of a block, at most
ALIGNMENT = tl.constexpr(SCALES_ALIGNMENT)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _finished(
    x, weight, cos_XP, sin_XP, at, eps,
    K: tl.constexpr, R: tl.constexpr, ROUNDING: tl.constexpr, SCALED: tl.constexpr, LARGEST: tl.constexpr,
    FLOOR: tl.constexpr, LOG: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """x [1, columns], FP32 with zeros from K on, after norm, rotation by the angle `at`, and rounding, as `norm_rope`
    does it."""
    weight = load_weight(weight, tl.arange(0, x.shape[1]), K)
    x = norm_rows(x.to(DTYPE).to(tl.float32), weight, eps, K, DTYPE).to(DTYPE).to(tl.float32)
    at = at + tl.zeros((1,), tl.int64)
    x = rotate_rows(x, cos_XP, sin_XP, at, at >= 0, K, R, False).to(DTYPE).to(tl.float32)
    if ROUNDING == "fp8":
        x = round_key_rows(x, K, R, SCALED, LARGEST, FLOOR)
    elif ROUNDING == "fp4":
        x = round_index_rows(hadamard_rows(x, LOG).to(DTYPE).to(tl.float32), SCALED, LARGEST, FLOOR)
    return x.to(DTYPE)


@triton.jit
def _store(
    x, row, target, rotary, scales,
    K: tl.constexpr, R: tl.constexpr, ROUNDING: tl.constexpr, SCALED: tl.constexpr, LARGEST: tl.constexpr,
    FLOOR: tl.constexpr,
):  # fmt: skip
    """Put x [1, columns] into a row, in the format of the target: the bytes of `write_rows`."""
    columns: tl.constexpr = x.shape[1]
    column = tl.arange(0, columns)[None, :]
    if scales is None:
        tl.store(target + row * K + column, x.to(target.dtype.element_ty), mask=column < K)
    else:
        coded: tl.constexpr = K if ROUNDING == "fp4" else K - R
        used: tl.constexpr = (coded + SCALED - 1) // SCALED
        blocks = tl.reshape(tl.where(column < coded, x.to(tl.float32), 0.0), (columns // SCALED, SCALED))
        codes = scale_codes(largest_magnitude(blocks), LARGEST, FLOOR)
        blocks *= e8m0_inverse(codes)[:, None]
        block = tl.arange(0, columns // SCALED)
        if ROUNDING == "fp4":
            tl.store(scales + row * used + block, codes.to(tl.uint8))
            even, odd = tl.split(tl.reshape(e2m1_codes(blocks), (columns // 2, 2)))
            tl.store(target + row * (K // 2) + tl.arange(0, columns // 2), (even | (odd << 4)).to(tl.uint8))
        else:
            groups: tl.constexpr = (used + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
            tl.store(scales + row * groups + block, codes.to(tl.uint8), mask=block < used)
            for filler in tl.static_range(used, groups):
                tl.store(scales + row * groups + filler, tl.zeros((), tl.uint8))
            codes = tl.reshape(e4m3_codes(blocks), (1, columns))
            tl.store(target + row * (K + R) + column, codes, mask=column < coded)
            place = rotary + row * ((K + R) // 2) + (coded // 2 + column - coded)
            tl.store(place, x.to(tl.bfloat16), mask=(column >= coded) & (column < K))


@triton.jit
def store_keys_fwd_kernel(
    x_TK, weight, cos_TP, sin_TP, rows_T, target, rotary, scales, eps,
    K: tl.constexpr, R: tl.constexpr, ROUNDING: tl.constexpr, COLUMNS: tl.constexpr, SCALED: tl.constexpr,
    LARGEST: tl.constexpr, FLOOR: tl.constexpr, LOG: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One vector. SCALED, LARGEST, FLOOR: of the format that ROUNDING names, values of a block among them."""
    begin(EARLY)
    t = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_T + t).to(tl.int64)
    if row < 0:
        return
    column = tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_TK + t * K + column, mask=column < K, other=0.0).to(tl.float32)
    dtype: tl.constexpr = x_TK.dtype.element_ty
    x = _finished(x, weight, cos_TP, sin_TP, t, eps, K, R, ROUNDING, SCALED, LARGEST, FLOOR, LOG, dtype)
    _store(x, row, target, rotary, scales, K, R, ROUNDING, SCALED, LARGEST, FLOOR)


@triton.jit
def _keep_token(
    values_TE, scores_TE, ape_RE, positions_T, values_YE, scores_YE, tail_rows_T, t,
    RATIO: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Values and biased scores of a new token to their row of the tails."""
    row = tl.load(tail_rows_T + t).to(tl.int64)
    place = tl.load(positions_T + t) % RATIO
    column = tl.arange(0, BLOCK_E)
    real = column < E
    values = tl.load(values_TE + t * E + column, mask=real, other=0.0)
    scores = tl.load(scores_TE + t * E + column, mask=real, other=0.0)
    scores += tl.load(ape_RE + place * E + column, mask=real, other=0.0)
    tl.store(values_YE + row * E + column, values, mask=real)
    tl.store(scores_YE + row * E + column, scores, mask=real)


@triton.jit
def _pooled(
    values_TE, scores_TE, ape_RE, positions_T, values_YE, scores_YE, slots_G, Y,
    RATIO: tl.constexpr, G: tl.constexpr, K: tl.constexpr, E: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """An entry [COLUMNS]: `gated_pool` of its slots, the new tokens among them taken from where they are."""
    column = tl.arange(0, COLUMNS)
    most = tl.full((COLUMNS,), -1e30, tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    pooled = tl.zeros((COLUMNS,), tl.float32)
    for at in range(0, G, SLOTS):
        slot = at + tl.arange(0, SLOTS)
        row = tl.load(slots_G + slot, mask=slot < G, other=-1).to(tl.int64)
        filled = (row >= 0)[:, None] & (column < K)[None, :]
        old, new = filled & (row < Y)[:, None], filled & (row >= Y)[:, None]
        # With two halves in a row, the last G/2 slots read the second.
        half = tl.where(slot >= G // 2, E - K, 0)
        token = row - Y
        place = tl.load(positions_T + token, mask=token >= 0, other=0) % RATIO
        in_tails = (row * E + half)[:, None] + column[None, :]
        in_step = (token * E + half)[:, None] + column[None, :]
        bias = tl.load(ape_RE + (place * E + half)[:, None] + column[None, :], mask=new, other=0.0)
        new_scores = tl.load(scores_TE + in_step, mask=new, other=0.0) + bias
        scores = tl.where(new, new_scores, tl.load(scores_YE + in_tails, mask=old, other=-1e30))
        new_values = tl.load(values_TE + in_step, mask=new, other=0.0)
        values = tl.where(new, new_values, tl.load(values_YE + in_tails, mask=old, other=0.0))
        # A large negative number instead of infinity: the first slots may all be empty.
        higher = tl.maximum(most, tl.max(scores, 0))
        weights = tl.where(filled, tl.exp(scores - higher[None, :]), 0.0)
        shrink = tl.exp(most - higher)
        total = total * shrink + tl.sum(weights, 0)
        pooled = pooled * shrink + tl.sum(weights * values, 0)
        most = higher
    return pooled / tl.maximum(total, 1e-30)


@triton.jit(do_not_specialize=["C", "Y"])
def store_entries_fwd_kernel(
    values_TE, scores_TE, ape_RE, positions_T, values_YE, scores_YE, tail_rows_T, slots_CG,
    weight, cos_CP, sin_CP, rows_C, target, rotary, scales, eps, C, Y,
    RATIO: tl.constexpr, G: tl.constexpr, E: tl.constexpr, SLOTS: tl.constexpr, BLOCK_E: tl.constexpr,
    K: tl.constexpr, R: tl.constexpr, ROUNDING: tl.constexpr, COLUMNS: tl.constexpr, SCALED: tl.constexpr,
    LARGEST: tl.constexpr, FLOOR: tl.constexpr, LOG: tl.constexpr, DTYPE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One entry, or, from program C on, one token for the tails."""
    begin(EARLY)
    c = tl.program_id(0).to(tl.int64)
    if c >= C:
        _keep_token(
            values_TE, scores_TE, ape_RE, positions_T, values_YE, scores_YE, tail_rows_T, c - C, RATIO, E, BLOCK_E
        )
        return
    row = tl.load(rows_C + c).to(tl.int64)
    if row < 0:
        return
    x = _pooled(
        values_TE, scores_TE, ape_RE, positions_T, values_YE, scores_YE, slots_CG + c * G, Y,
        RATIO, G, K, E, SLOTS, COLUMNS,
    )[None, :]  # fmt: skip
    x = _finished(x, weight, cos_CP, sin_CP, c, eps, K, R, ROUNDING, SCALED, LARGEST, FLOOR, LOG, DTYPE)
    _store(x, row, target, rotary, scales, K, R, ROUNDING, SCALED, LARGEST, FLOOR)


def _shape(width: int, cos: Tensor, rounding: str | None, device: torch.device) -> dict[str, Any]:
    """What both kernels are compiled for."""
    block, number_format = (fp4.BLOCK, fp4) if rounding == "fp4" else (KEY_BLOCK, fp8)
    early = starts_early(device)
    return {
        "K": width,
        "R": 2 * cos.shape[1],
        "ROUNDING": rounding,
        "COLUMNS": max(block, triton.next_power_of_2(width)),
        "SCALED": block,
        "LARGEST": number_format.LARGEST,
        "FLOOR": number_format.AMAX_FLOOR,
        "LOG": width.bit_length() - 1,
        "EARLY": early,
        "launch_pdl": early,
    }


@opaque(lambda *_: None, changes=("values", "scales"))
def store_keys_kernel(
    x_TK: Tensor,
    weight_K: Tensor,
    eps: float,
    cos_TP: Tensor,
    sin_TP: Tensor,
    rounding: str | None,
    rows_T: Tensor,
    values: Tensor,
    scales: Tensor | None,
) -> None:
    """`store_keys` for a target as `cache_rows.operands` gives it."""
    store_keys_fwd_kernel[(len(x_TK),)](
        x_TK.contiguous(), weight_K.contiguous(), cos_TP.contiguous(), sin_TP.contiguous(), rows_T.contiguous(),
        values, rotary_view(values, scales), scales, eps,
        **_shape(x_TK.shape[1], cos_TP, rounding, x_TK.device), num_warps=max(1, x_TK.shape[1] // VALUES_PER_WARP),
    )  # fmt: skip


@opaque(lambda *_: None, changes=("values_YE", "scores_YE", "values", "scales"))
def store_entries_kernel(
    values_TE: Tensor,
    scores_TE: Tensor,
    ape_RE: Tensor,
    positions_T: Tensor,
    values_YE: Tensor,
    scores_YE: Tensor,
    tail_rows_T: Tensor,
    slots_CG: Tensor,
    dtype: torch.dtype,
    weight_K: Tensor,
    eps: float,
    cos_CP: Tensor,
    sin_CP: Tensor,
    rounding: str | None,
    rows_C: Tensor,
    values: Tensor,
    scales: Tensor | None,
) -> None:
    """`store_entries` with everything taken apart, as an operation of torch has to be, and a target as
    `cache_rows.operands` gives it."""
    (tokens, columns), (entries, slots), width = values_TE.shape, slots_CG.shape, len(weight_K)
    store_entries_fwd_kernel[(entries + tokens,)](
        values_TE.contiguous(), scores_TE.contiguous(), ape_RE.contiguous(), positions_T.contiguous(),
        values_YE, scores_YE, tail_rows_T.contiguous(), slots_CG.contiguous(),
        weight_K.contiguous(), cos_CP.contiguous(), sin_CP.contiguous(), rows_C.contiguous(),
        values, rotary_view(values, scales), scales, eps, entries, len(values_YE),
        RATIO=len(ape_RE), G=slots, E=columns, SLOTS=min(SLOTS, triton.next_power_of_2(slots)),
        BLOCK_E=triton.next_power_of_2(columns), DTYPE=DTYPES[dtype],
        **_shape(width, cos_CP, rounding, values_TE.device), num_warps=8 if width > 256 else 4,
    )  # fmt: skip
