"""Tokens to experts and back in Triton.

Bytes are the floor: `dispatch` reads a token once and writes it A times, `combine` reads A rows and writes one in FP32.
Both go through the tokens in their own order, each token knowing the rows of its pairs, so that the side with fewer
bytes is read or written in one sweep. Nothing is added by two programs, and the sum over a token's experts runs in the
order of its choices. Each is the other's backward.

The order itself is a counting sort. Pairs (token, choice) come in runs of `PAIRS_PER_RUN`. One program counts a run's
pairs for each expert; in the list of all counts, expert by expert and run by run, the sum of what comes before says
where a run's pairs of an expert begin; and a pair's place is behind those of its expert that are earlier in its run.
Nothing of it goes through the host, and a pair's place does not depend on who is first. A single run, as in decoding,
is one program.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.opaque import opaque

PAIRS_PER_RUN = 128
PAIRS_AT_ONCE = 32  # compared with all pairs of a run
VALUES_PER_TILE = 4096


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
    order_ptr,
    totals_ptr,
    num_pairs,
    E: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    """Every pair of a run to its place in the order; the first run also writes the totals of all. ends: the sums of
    counts up to each of them, None when there is no other run."""
    run, runs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_E)
    pairs = run * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    experts = tl.load(experts_ptr + pairs, mask=pairs < num_pairs, other=0).to(tl.int32)
    if ends_ptr is None:
        total = tl.histogram(experts, BLOCK_E, mask=pairs < num_pairs)
        first_place = tl.cumsum(total, axis=0) - total
    else:
        here = columns * runs + run
        first_place = tl.load(ends_ptr + here, mask=columns < E, other=0)
        first_place -= tl.load(counts_ptr + here, mask=columns < E, other=0)
        last = columns * runs + runs - 1
        total = tl.load(ends_ptr + last, mask=columns < E, other=0)
        total -= tl.load(ends_ptr + last - runs, mask=(columns > 0) & (columns < E), other=0)
    if run == 0:
        tl.store(totals_ptr + columns, total.to(tl.int64), mask=columns < E)

    place = tl.gather(first_place, experts, 0)
    for start in range(0, BLOCK_PAIRS, BLOCK_OTHERS):
        others = run * BLOCK_PAIRS + start + tl.arange(0, BLOCK_OTHERS)
        their_experts = tl.load(experts_ptr + others, mask=others < num_pairs, other=-1).to(tl.int32)
        earlier = (their_experts[None, :] == experts[:, None]) & (others[None, :] < pairs[:, None])
        place += tl.sum(earlier.to(tl.int32), axis=1)
    tl.store(order_ptr + place, pairs.to(tl.int64), mask=pairs < num_pairs)


@opaque(
    lambda experts_TA, num_experts: (
        experts_TA.new_empty(experts_TA.numel(), dtype=torch.int64),
        experts_TA.new_empty(num_experts, dtype=torch.int64),
    )
)
def expert_order(experts_TA: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(order_X, counts_E) for contiguous experts."""
    num_pairs, device = experts_TA.numel(), experts_TA.device
    order_X = torch.empty(num_pairs, dtype=torch.int64, device=device)
    counts_E = torch.empty(num_experts, dtype=torch.int64, device=device)
    block_pairs = min(PAIRS_PER_RUN, max(PAIRS_AT_ONCE, triton.next_power_of_2(num_pairs)))
    runs, block_experts = max(1, triton.cdiv(num_pairs, block_pairs)), triton.next_power_of_2(num_experts)
    counts = ends = None
    if runs > 1:
        counts = torch.empty(num_experts, runs, dtype=torch.int32, device=device)
        expert_counts_fwd_kernel[(runs,)](
            experts_TA, counts, num_pairs, num_experts, block_pairs, block_experts, num_warps=4
        )
        ends = counts.flatten().cumsum(0, dtype=torch.int32)
    expert_order_fwd_kernel[(runs,)](
        experts_TA, counts, ends, order_X, counts_E, num_pairs, num_experts, block_pairs, block_experts, PAIRS_AT_ONCE,
        num_warps=4,
    )  # fmt: skip
    return order_X, counts_E


# -- rows ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_pairs"])
def inverse_order_fwd_kernel(order_ptr, place_ptr, num_pairs, BLOCK: tl.constexpr):
    """place[pair]: the row of a pair."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pairs = tl.load(order_ptr + rows, mask=rows < num_pairs, other=0)
    tl.store(place_ptr + pairs, rows, mask=rows < num_pairs)


@triton.jit(do_not_specialize=["num_tokens"])
def dispatch_fwd_kernel(
    x_ptr,
    place_ptr,
    y_ptr,
    num_tokens,
    A: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (tokens < num_tokens)[:, None] & (columns < D)[None, :]
    x = tl.load(x_ptr + tokens[:, None] * D + columns[None, :], mask=inside)
    for choice in tl.static_range(A):
        rows = tl.load(place_ptr + tokens * A + choice, mask=tokens < num_tokens, other=0).to(tl.int64)
        tl.store(y_ptr + rows[:, None] * D + columns[None, :], x, mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def combine_fwd_kernel(
    y_ptr,
    place_ptr,
    out_ptr,
    num_tokens,
    A: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (tokens < num_tokens)[:, None] & (columns < D)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for choice in tl.static_range(A):
        rows = tl.load(place_ptr + tokens * A + choice, mask=tokens < num_tokens, other=0).to(tl.int64)
        total += tl.load(y_ptr + rows[:, None] * D + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + tokens[:, None] * D + columns[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


def _places(order_X: Tensor) -> Tensor:
    """The row of every pair, int32."""
    num_pairs = len(order_X)
    place_X = torch.empty(num_pairs, dtype=torch.int32, device=order_X.device)
    inverse_order_fwd_kernel[(triton.cdiv(num_pairs, 1024),)](order_X, place_X, num_pairs, 1024, num_warps=4)
    return place_X


def _tile(width: int) -> tuple[int, int]:
    """(tokens, columns) of a tile."""
    columns = min(VALUES_PER_TILE, triton.next_power_of_2(width))
    return VALUES_PER_TILE // columns, columns


@opaque(lambda x_TD, order_X, choices: x_TD.new_empty(order_X.shape[0], x_TD.shape[1]))
def dispatch(x_TD: Tensor, order_X: Tensor, choices: int) -> Tensor:
    """[X, D] for contiguous inputs."""
    num_tokens, width = x_TD.shape
    y_XD = x_TD.new_empty(len(order_X), width)
    block_tokens, block_columns = _tile(width)
    dispatch_fwd_kernel[(triton.cdiv(num_tokens, block_tokens), triton.cdiv(width, block_columns))](
        x_TD, _places(order_X), y_XD, num_tokens, choices, width, block_tokens, block_columns, num_warps=8
    )
    return y_XD


@opaque(lambda y_XD, order_X, choices, dtype: y_XD.new_empty(order_X.shape[0] // choices, y_XD.shape[1], dtype=dtype))
def combine(y_XD: Tensor, order_X: Tensor, choices: int, dtype: torch.dtype) -> Tensor:
    """[T, D] in a dtype, summed in FP32, for contiguous inputs."""
    num_tokens, width = len(order_X) // choices, y_XD.shape[1]
    out_TD = y_XD.new_empty(num_tokens, width, dtype=dtype)
    block_tokens, block_columns = _tile(width)
    combine_fwd_kernel[(triton.cdiv(num_tokens, block_tokens), triton.cdiv(width, block_columns))](
        y_XD, _places(order_X), out_TD, num_tokens, choices, width, block_tokens, block_columns, num_warps=8
    )
    return out_TD


# -- autograd ------------------------------------------------------------------------------------------------------


class Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_X: Tensor, choices: int) -> Tensor:
        order_X = order_X.contiguous()
        ctx.save_for_backward(order_X)
        ctx.choices, ctx.dtype = choices, x_TD.dtype
        return dispatch(x_TD.contiguous(), order_X, choices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_XD: Tensor) -> tuple[Tensor | None, ...]:
        return combine(dy_XD.contiguous(), ctx.saved_tensors[0], ctx.choices, ctx.dtype), None, None


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_XD: Tensor, order_X: Tensor, choices: int) -> Tensor:
        order_X = order_X.contiguous()
        ctx.save_for_backward(order_X)
        ctx.choices, ctx.dtype = choices, y_XD.dtype
        return combine(y_XD.contiguous(), order_X, choices, torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_TD: Tensor) -> tuple[Tensor | None, ...]:
        return dispatch(dx_TD.to(ctx.dtype).contiguous(), ctx.saved_tensors[0], ctx.choices), None, None
