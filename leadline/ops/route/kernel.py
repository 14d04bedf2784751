"""The choice of experts in Triton.

A token's E scores fit into the registers of a warp, so a program is one token and one pass over its logits: bytes are
the floor, E values in and E out for each token, next to A picks of some twenty instructions. With one token neither
counts, only the length of the chain from logits to weights, and how many kernels stand between the router's product
and the experts' products.

A pick is a maximum of 64-bit numbers: the bits of score + bias, in the order of the floats, above the number of the
expert, counted downwards. Equal scores therefore go to the lower expert, a number is there only once, and NaN is above
all others, so that whatever a token holds, it gets A different experts that exist.

The tokens of a step fit into one program, which knows all experts that are visited. It then writes the experts' order
as well (`token_permutation`): a pair's row is the number of pairs with a lower expert, or with the same one and an
earlier place.

The backward picks nothing: with s the chosen scores of a token, their sum S and dw the gradients of the weights,

    ds_a = (dw_a - sum_b dw_b s_b / S) x route scale / S,     dlogit_e = ds_e sigmoid(logit_e) / (2 score_e)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.early_start import let_next_start, starts_early, wait_for_earlier
from leadline.ops.opaque import opaque
from leadline.ops.route.reference import SOFTPLUS_FLOOR, SUM_FLOOR

TOKENS_OF_A_STEP = 8  # of one program, which orders the experts
TOKENS_PER_PROGRAM = 4  # of the backward
LOWEST = tl.constexpr(-(2**63))


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), to the last bits of small results too."""
    small = tl.exp(-tl.abs(x))
    one_more = 1.0 + small
    lost = one_more == 1.0
    log = tl.where(lost, small, tl.log(one_more) * (small / tl.where(lost, 1.0, one_more - 1.0)))
    return tl.where(x > 0, x, 0.0) + log


@triton.jit
def _ranks(keys, experts, E: tl.constexpr):
    """Numbers in the order of the keys, and of equal keys in the reverse order of the experts; none is -2^63. Zero has
    one sign, and NaN is above all others."""
    keys = tl.where(keys == 0.0, 0.0, keys)
    bits = tl.where(keys == keys, keys, float("nan")).to(tl.int32, bitcast=True)
    bits = tl.where(keys == keys, bits, 0x7FFFFFFF)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) + (E - 1 - experts)


@triton.jit
def _write_order(
    picks, real, t, a, chosen, pair_ptr, row_ptr, counts_ptr, A: tl.constexpr, E: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The order of all pairs, which this program has. picks, real [BLOCK_T, BLOCK_A]: experts, and which of them are
    meant; chosen [BLOCK_T, BLOCK_E]: how often each token chose each expert."""
    PAIRS: tl.constexpr = BLOCK_T * BLOCK_A
    keys = tl.where(real, picks, BLOCK_E) * PAIRS + t[:, None] * BLOCK_A + a[None, :]
    keys = tl.reshape(keys, (PAIRS,))
    row = tl.sum((keys[None, :] < keys[:, None]).to(tl.int32), axis=1)
    row = tl.reshape(row, (BLOCK_T, BLOCK_A)).to(tl.int64)
    pair = t[:, None] * A + a[None, :]
    tl.store(row_ptr + pair, row, mask=real)
    tl.store(pair_ptr + row, pair.to(tl.int64), mask=real)
    experts = tl.arange(0, BLOCK_E)
    tl.store(counts_ptr + experts, tl.sum(chosen, axis=0).to(tl.int64), mask=experts < E)


@triton.jit(do_not_specialize=["T"])
def route_fwd_kernel(
    logits_ptr, bias_ptr, given_ptr, experts_ptr, weights_ptr, scores_ptr, pair_ptr, row_ptr, counts_ptr, T,
    route_scale, SOFTPLUS_FLOOR: tl.constexpr, SUM_FLOOR: tl.constexpr, A: tl.constexpr, E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens. given: the experts of the tokens, None when they are picked with the help of the bias. pair, row,
    counts: the order, None when this is not the only program."""
    let_next_start(EARLY)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_E)
    if given_ptr is None:
        bias = tl.load(bias_ptr + columns, mask=columns < E, other=0.0)[None, :]
    wait_for_earlier(EARLY)
    a = tl.arange(0, BLOCK_A)
    here = tokens < T
    inside = here[:, None] & (columns < E)[None, :]
    at = tokens[:, None] * E + columns[None, :]
    softplus = _softplus(tl.load(logits_ptr + at, mask=inside, other=0.0))
    scores = tl.sqrt_rn(tl.where(softplus < SOFTPLUS_FLOOR, SOFTPLUS_FLOOR, softplus))
    tl.store(scores_ptr + at, scores, mask=inside)
    if given_ptr is None:
        ranks = tl.where(inside, _ranks(scores + bias, columns[None, :], E), LOWEST)

    picks = tl.zeros((BLOCK_T, BLOCK_A), tl.int32)
    weights = tl.zeros((BLOCK_T, BLOCK_A), tl.float32)
    chosen = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for choice in tl.static_range(A):
        if given_ptr is None:
            best = tl.max(ranks, axis=1)
            pick = E - 1 - (best & 0xFFFFFFFF).to(tl.int32)
            pick = tl.where(here, pick, 0)
        else:
            pick = tl.load(given_ptr + tokens * A + choice, mask=here, other=0).to(tl.int32)
        picked = (columns[None, :] == pick[:, None]) & inside
        if given_ptr is None:
            ranks = tl.where(picked, LOWEST, ranks)
        score = tl.sum(tl.where(picked, scores, 0.0), axis=1)
        total += score
        chosen += picked.to(tl.int32)
        picks = tl.where((a == choice)[None, :], pick[:, None], picks)
        weights = tl.where((a == choice)[None, :], score[:, None], weights)

    real = here[:, None] & (a < A)[None, :]
    pairs = tokens[:, None] * A + a[None, :]
    tl.store(experts_ptr + pairs, picks.to(tl.int64), mask=real)
    tl.store(weights_ptr + pairs, weights / (total + SUM_FLOOR)[:, None] * route_scale, mask=real)
    if pair_ptr is not None:
        t = tl.arange(0, BLOCK_T)
        _write_order(picks, real, t, a, chosen, pair_ptr, row_ptr, counts_ptr, A, E, BLOCK_T, BLOCK_A, BLOCK_E)


@triton.jit(do_not_specialize=["T"])
def route_bwd_kernel(
    logits_ptr, scores_ptr, experts_ptr, dweights_ptr, dscores_ptr, dlogits_ptr, T,
    route_scale, SOFTPLUS_FLOOR: tl.constexpr, SUM_FLOOR: tl.constexpr, A: tl.constexpr, E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dlogits of BLOCK_T tokens."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_E)
    here = tokens < T
    total = tl.full((BLOCK_T,), SUM_FLOOR, tl.float32)
    inner = tl.zeros((BLOCK_T,), tl.float32)
    for choice in tl.static_range(A):
        pick = tl.load(experts_ptr + tokens * A + choice, mask=here, other=0)
        score = tl.load(scores_ptr + tokens * E + pick, mask=here, other=0.0)
        total += score
        inner += score * tl.load(dweights_ptr + tokens * A + choice, mask=here, other=0.0)
    inner = inner / total

    inside = here[:, None] & (columns < E)[None, :]
    at = tokens[:, None] * E + columns[None, :]
    dscores = tl.load(dscores_ptr + at, mask=inside, other=0.0)
    for choice in tl.static_range(A):
        pick = tl.load(experts_ptr + tokens * A + choice, mask=here, other=0)
        dweight = tl.load(dweights_ptr + tokens * A + choice, mask=here, other=0.0)
        dscore = (dweight - inner) * (route_scale / total)
        dscores += tl.where(columns[None, :] == pick[:, None], dscore[:, None], 0.0)
    logits = tl.load(logits_ptr + at, mask=inside, other=0.0)
    scores = tl.load(scores_ptr + at, mask=inside, other=1.0)
    small = tl.exp(-tl.abs(logits))
    sigmoid = tl.where(logits < 0, small, 1.0) / (1.0 + small)
    dlogits = tl.where(_softplus(logits) < SOFTPLUS_FLOOR, 0.0, dscores * sigmoid / (2.0 * scores))
    tl.store(dlogits_ptr + at, dlogits, mask=inside)


def _tile(num_tokens: int) -> int:
    """Tokens of a program: all of a step, otherwise one, whose scores one warp has without asking another."""
    return triton.next_power_of_2(max(num_tokens, 1)) if num_tokens <= TOKENS_OF_A_STEP else 1


def _results(
    logits_TE: Tensor, bias_E: Tensor | None, given_TA: Tensor | None, choices: int, route_scale: float
) -> list[Tensor]:
    num_tokens, num_experts = logits_TE.shape
    pairs = num_tokens, choices
    results = [logits_TE.new_empty(pairs, dtype=torch.int64), logits_TE.new_empty(pairs), torch.empty_like(logits_TE)]
    if num_tokens <= TOKENS_OF_A_STEP:
        sizes = (num_tokens * choices,), pairs, (num_experts,)
        results += [logits_TE.new_empty(size, dtype=torch.int64) for size in sizes]
    return results


@opaque(_results)
def forward(
    logits_TE: Tensor, bias_E: Tensor | None, given_TA: Tensor | None, choices: int, route_scale: float
) -> list[Tensor]:
    """[experts_TA, weights_TA, scores_TE] for contiguous inputs and, for the few tokens of a step, the fields of their
    `ExpertOrder`."""
    results, (num_tokens, num_experts) = _results(logits_TE, bias_E, given_TA, choices, route_scale), logits_TE.shape
    block_tokens, early = _tile(num_tokens), starts_early(logits_TE.device)
    order = results[3:] or [None] * 3
    route_fwd_kernel[(max(1, triton.cdiv(num_tokens, block_tokens)),)](
        logits_TE, bias_E, given_TA, *results[:3], *order, num_tokens, route_scale, SOFTPLUS_FLOOR, SUM_FLOOR, choices,
        num_experts, block_tokens, triton.next_power_of_2(choices), triton.next_power_of_2(num_experts), early,
        launch_pdl=early, num_warps=min(block_tokens, 4),
    )  # fmt: skip
    return results


@opaque(lambda logits_TE, *_: torch.empty_like(logits_TE))
def backward(
    logits_TE: Tensor,
    scores_TE: Tensor,
    experts_TA: Tensor,
    dweights_TA: Tensor,
    dscores_TE: Tensor,
    route_scale: float,
) -> Tensor:
    """dlogits_TE for contiguous inputs."""
    dlogits_TE, (num_tokens, num_experts) = torch.empty_like(logits_TE), logits_TE.shape
    route_bwd_kernel[(triton.cdiv(num_tokens, TOKENS_PER_PROGRAM),)](
        logits_TE, scores_TE, experts_TA, dweights_TA, dscores_TE, dlogits_TE, num_tokens, route_scale, SOFTPLUS_FLOOR,
        SUM_FLOOR, experts_TA.shape[1], num_experts, TOKENS_PER_PROGRAM, triton.next_power_of_2(num_experts),
        num_warps=4,
    )  # fmt: skip
    return dlogits_TE


class Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, bias_E: Tensor | None, given_TA: Tensor | None, choices: int, route_scale: float
    ) -> tuple[Tensor, ...]:
        logits_TE = logits_TE.contiguous()
        bias_E, given_TA = (None if x is None else x.contiguous() for x in (bias_E, given_TA))
        experts_TA, weights_TA, scores_TE, *order = forward(logits_TE, bias_E, given_TA, choices, route_scale)
        ctx.save_for_backward(logits_TE, scores_TE, experts_TA)
        ctx.route_scale = route_scale
        ctx.mark_non_differentiable(experts_TA, *order)
        return experts_TA, weights_TA, scores_TE, *order

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dweights_TA, dscores_TE = (gradient.contiguous() for gradient in gradients[1:3])
        dlogits_TE = backward(*ctx.saved_tensors, dweights_TA, dscores_TE, ctx.route_scale)
        return dlogits_TE, None, None, None, None
