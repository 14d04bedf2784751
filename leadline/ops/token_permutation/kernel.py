"""Tokens to experts and back in Triton.

Bytes are the floor: `dispatch` reads a token once and writes it A times, `combine` reads A rows and writes one in FP32.
Both go through the tokens in their own order, each token knowing the rows of its pairs, so that the side with fewer
bytes is read or written in one sweep. Nothing is added by two programs, and the sum over a token's experts runs in the
order of its choices. Each is the other's backward. What else a token gets, as from a shared expert, is added while the
sum is in registers.

The order itself is a counting sort. Pairs (token, choice) come in runs of `PAIRS_PER_RUN`. One program counts a run's
pairs for each expert; in the list of all counts, expert by expert and run by run, the sum of what comes before says
where a run's pairs of an expert begin; and a pair's place is behind those of its expert that are earlier in its run.
Nothing of it goes through the host, and a pair's place does not depend on who is first. Up to `PAIRS_ALONE`, as in
decoding, there is a single run and a single program.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.early_start import begin, starts_early
from leadline.ops.opaque import opaque

PAIRS_ALONE = 512
PAIRS_PER_RUN = 128
PAIRS_AT_ONCE = 32  # compared with all pairs of a run
VALUES_PER_TILE = 4096
VALUES_PER_SMALL_TILE = 512  # a step's few tokens are cut finer, so that more processors share them
FEW_TOKENS = 64


# -- order ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_pairs"])
def expert_counts_fwd_kernel(
    experts_ptr,
    counts_ptr,
    num_pairs,
    E: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """counts[e, run]: pairs of a run that chose expert e."""
    pairs = tl.program_id(0) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    experts = tl.load(experts_ptr + pairs, mask=pairs < num_pairs, other=0).to(tl.int32)
    counts = tl.histogram(experts, BLOCK_E, mask=pairs < num_pairs)
    columns = tl.arange(0, BLOCK_E)
    tl.store(counts_ptr + columns * tl.num_programs(0) + tl.program_id(0), counts, mask=columns < E)


@triton.jit(do_not_specialize=["num_pairs"])
def expert_order_fwd_kernel(
    experts_ptr,
    counts_ptr,
    ends_ptr,
    pair_ptr,
    row_ptr,
    totals_ptr,
    num_pairs,
    E: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    """The rows of a run's pairs, and the pairs of these rows; the first run also writes the totals of all. ends: the
    sums of counts up to each of them, None when there is no other run."""
    run, runs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_E)
    pairs = run * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    experts = tl.load(experts_ptr + pairs, mask=pairs < num_pairs, other=0).to(tl.int32)
    if ends_ptr is None:
        total = tl.histogram(experts, BLOCK_E, mask=pairs < num_pairs)
        first_row = tl.cumsum(total, axis=0) - total
    else:
        here = columns * runs + run
        first_row = tl.load(ends_ptr + here, mask=columns < E, other=0)
        first_row -= tl.load(counts_ptr + here, mask=columns < E, other=0)
        last = columns * runs + runs - 1
        total = tl.load(ends_ptr + last, mask=columns < E, other=0)
        total -= tl.load(ends_ptr + last - runs, mask=(columns > 0) & (columns < E), other=0)
    if run == 0:
        tl.store(totals_ptr + columns, total.to(tl.int64), mask=columns < E)

    row = tl.gather(first_row, experts, 0)
    for start in range(0, BLOCK_PAIRS, BLOCK_OTHERS):
        others = run * BLOCK_PAIRS + start + tl.arange(0, BLOCK_OTHERS)
        their_experts = tl.load(experts_ptr + others, mask=others < num_pairs, other=-1).to(tl.int32)
        earlier = (their_experts[None, :] == experts[:, None]) & (others[None, :] < pairs[:, None])
        row += tl.sum(earlier.to(tl.int32), axis=1)
    tl.store(row_ptr + pairs, row.to(tl.int64), mask=pairs < num_pairs)
    tl.store(pair_ptr + row, pairs.to(tl.int64), mask=pairs < num_pairs)


def _empty_order(experts_TA: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    num_pairs = experts_TA.numel()
    pair_X, counts_E = (experts_TA.new_empty(size, dtype=torch.int64) for size in (num_pairs, num_experts))
    return pair_X, experts_TA.new_empty(experts_TA.shape, dtype=torch.int64), counts_E


@opaque(_empty_order)
def expert_order(experts_TA: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of `ExpertOrder` for contiguous experts."""
    num_pairs = experts_TA.numel()
    pair_X, row_TA, counts_E = _empty_order(experts_TA, num_experts)
    block_pairs = max(PAIRS_AT_ONCE, triton.next_power_of_2(num_pairs)) if num_pairs <= PAIRS_ALONE else PAIRS_PER_RUN
    runs, block_experts = max(1, triton.cdiv(num_pairs, block_pairs)), triton.next_power_of_2(num_experts)
    counts = ends = None
    if runs > 1:
        counts = torch.empty(num_experts, runs, dtype=torch.int32, device=experts_TA.device)
        expert_counts_fwd_kernel[(runs,)](
            experts_TA, counts, num_pairs, num_experts, block_pairs, block_experts, num_warps=4
        )
        ends = counts.flatten().cumsum(0, dtype=torch.int32)
    expert_order_fwd_kernel[(runs,)](
        experts_TA, counts, ends, pair_X, row_TA, counts_E, num_pairs, num_experts, block_pairs, block_experts,
        PAIRS_AT_ONCE, num_warps=4 if block_pairs <= PAIRS_PER_RUN else 8,
    )  # fmt: skip
    return pair_X, row_TA, counts_E


# -- rows ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_tokens"])
def dispatch_fwd_kernel(
    x_ptr,
    row_ptr,
    y_ptr,
    num_tokens,
    A: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (tokens < num_tokens)[:, None] & (columns < D)[None, :]
    x = tl.load(x_ptr + tokens[:, None] * D + columns[None, :], mask=inside)
    for choice in tl.static_range(A):
        rows = tl.load(row_ptr + tokens * A + choice, mask=tokens < num_tokens, other=0).to(tl.int64)
        tl.store(y_ptr + rows[:, None] * D + columns[None, :], x, mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def combine_fwd_kernel(
    y_ptr,
    row_ptr,
    plus_ptr,
    out_ptr,
    num_tokens,
    A: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (tokens < num_tokens)[:, None] & (columns < D)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for choice in tl.static_range(A):
        rows = tl.load(row_ptr + tokens * A + choice, mask=tokens < num_tokens, other=0).to(tl.int64)
        total += tl.load(y_ptr + rows[:, None] * D + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if plus_ptr is not None:
        total += tl.load(plus_ptr + tokens[:, None] * D + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + tokens[:, None] * D + columns[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


def _tile(num_tokens: int, width: int) -> tuple[int, int, int]:
    """(tokens, columns, warps) of a tile."""
    few = num_tokens <= FEW_TOKENS
    values = VALUES_PER_SMALL_TILE if few else VALUES_PER_TILE
    columns = min(values, triton.next_power_of_2(width))
    return values // columns, columns, 2 if few else 8


@opaque(lambda x_TD, row_TA: x_TD.new_empty(row_TA.numel(), x_TD.shape[1]))
def dispatch(x_TD: Tensor, row_TA: Tensor) -> Tensor:
    """[X, D] for contiguous inputs."""
    num_tokens, width = x_TD.shape
    y_XD = x_TD.new_empty(row_TA.numel(), width)
    (block_tokens, block_columns, warps), early = _tile(num_tokens, width), starts_early(x_TD.device)
    dispatch_fwd_kernel[(triton.cdiv(num_tokens, block_tokens), triton.cdiv(width, block_columns))](
        x_TD, row_TA, y_XD, num_tokens, row_TA.shape[1], width, block_tokens, block_columns, early,
        launch_pdl=early, num_warps=warps,
    )  # fmt: skip
    return y_XD


@opaque(lambda y_XD, row_TA, plus_TD, dtype: y_XD.new_empty(row_TA.shape[0], y_XD.shape[1], dtype=dtype))
def combine(y_XD: Tensor, row_TA: Tensor, plus_TD: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[T, D] in a dtype, summed in FP32, for contiguous inputs."""
    (num_tokens, choices), width = row_TA.shape, y_XD.shape[1]
    out_TD = y_XD.new_empty(num_tokens, width, dtype=dtype)
    (block_tokens, block_columns, warps), early = _tile(num_tokens, width), starts_early(y_XD.device)
    combine_fwd_kernel[(triton.cdiv(num_tokens, block_tokens), triton.cdiv(width, block_columns))](
        y_XD, row_TA, plus_TD, out_TD, num_tokens, choices, width, block_tokens, block_columns, early,
        launch_pdl=early, num_warps=warps,
    )  # fmt: skip
    return out_TD


# -- autograd ------------------------------------------------------------------------------------------------------


class Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, row_TA: Tensor) -> Tensor:
        row_TA = row_TA.contiguous()
        ctx.save_for_backward(row_TA)
        ctx.dtype = x_TD.dtype
        return dispatch(x_TD.contiguous(), row_TA)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_XD: Tensor) -> tuple[Tensor | None, ...]:
        return combine(dy_XD.contiguous(), ctx.saved_tensors[0], None, ctx.dtype), None


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_XD: Tensor, row_TA: Tensor, plus_TD: Tensor | None) -> Tensor:
        row_TA = row_TA.contiguous()
        ctx.save_for_backward(row_TA)
        ctx.dtype = y_XD.dtype
        if plus_TD is None:
            return combine(y_XD.contiguous(), row_TA, None, torch.float32)
        return combine(y_XD.contiguous(), row_TA, plus_TD.contiguous(), plus_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        dy_XD = dispatch(dout_TD.to(ctx.dtype).contiguous(), ctx.saved_tensors[0])
        return dy_XD, None, dout_TD if ctx.needs_input_grad[2] else None
