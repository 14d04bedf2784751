"""Cross entropy as large matrix products with one Triton pass over each tile of logits.

FLOPs are the floor: 2 V D for each token in the forward, twice that in the backward and once more because logits are
computed again rather than kept. The products are the library's. What is left is a pass over FP32 logits, 4 V bytes for
each token against 2 V D FLOPs: at D = 4096 a tenth of the time of the product.

A tile is all tokens (up to `TOKENS_PER_TILE`) by a piece of the vocabulary. In the forward each row carries its
largest logit and its sum of exponentials from tile to tile. In the backward a piece of the vocabulary sees all tokens
before the next one comes, so the gradient of its rows of the weight is finished there and then, and no sum as large as
the weight is kept in FP32.

Nothing asks which targets exist: a token without one is computed and given no weight, so the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.opaque import opaque

VOCABULARY_PER_TILE = 8192
TOKENS_PER_TILE = 8192  # with the above: 256 MiB of logits


@triton.jit(do_not_specialize=["first"])
def cross_entropy_fwd_kernel(
    logits_ptr,
    targets_ptr,
    largest_ptr,
    sum_ptr,
    target_logit_ptr,
    first,
    width,
    FIRST_TILE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Fold the logits of entries first .. first + width of the vocabulary into the state of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_V)
    logits = tl.load(logits_ptr + token * width + columns, mask=columns < width, other=float("-inf"))
    target = tl.load(targets_ptr + token) - first
    target_logit = tl.sum(tl.where(columns == target, logits, 0.0), axis=0)
    largest = tl.max(logits, axis=0)
    if FIRST_TILE:
        total = tl.sum(tl.exp(logits - largest), axis=0)
    else:
        before = tl.load(largest_ptr + token)
        largest = tl.maximum(largest, before)
        total = tl.sum(tl.exp(logits - largest), axis=0) + tl.load(sum_ptr + token) * tl.exp(before - largest)
        target_logit += tl.load(target_logit_ptr + token)
    tl.store(largest_ptr + token, largest)
    tl.store(sum_ptr + token, total)
    tl.store(target_logit_ptr + token, target_logit)


@triton.jit(do_not_specialize=["first"])
def cross_entropy_bwd_kernel(
    logits_ptr,
    targets_ptr,
    lse_ptr,
    dnll_ptr,
    dlogits_ptr,
    first,
    width,
    BLOCK_V: tl.constexpr,
):
    """dlogits = (softmax - one at the target) dnll of one token, 0 without a target."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    offsets = token * width + columns
    logits = tl.load(logits_ptr + offsets, mask=columns < width, other=float("-inf"))
    target = tl.load(targets_ptr + token)
    dnll = tl.where(target >= 0, tl.load(dnll_ptr + token), 0.0)
    probabilities = tl.exp(logits - tl.load(lse_ptr + token))
    dlogits = (probabilities - tl.where(columns == target - first, 1.0, 0.0)) * dnll
    tl.store(dlogits_ptr + offsets, dlogits.to(dlogits_ptr.dtype.element_ty), mask=columns < width)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b with FP32 sums and an FP32 result."""
    return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def _pieces(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


@opaque(lambda hidden_TD, *_: tuple(hidden_TD.new_empty(hidden_TD.shape[0], dtype=torch.float32) for _ in range(2)))
def forward(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """(nll_T, lse_T) for contiguous inputs of one dtype."""
    largest_T, sum_T, target_logit_T = torch.empty(3, len(hidden_TD), device=hidden_TD.device)
    for rows in _pieces(len(hidden_TD), TOKENS_PER_TILE):
        for entries in _pieces(len(weight_VD), VOCABULARY_PER_TILE):
            logits = _product(hidden_TD[rows], weight_VD[entries].T)
            cross_entropy_fwd_kernel[(len(logits),)](
                logits, targets_T[rows], largest_T[rows], sum_T[rows], target_logit_T[rows], entries.start,
                logits.shape[1], entries.start == 0, triton.next_power_of_2(logits.shape[1]), num_warps=8,
            )  # fmt: skip
            del logits
    lse_T = largest_T + sum_T.log()
    return torch.where(targets_T >= 0, lse_T - target_logit_T, 0.0), lse_T


@opaque(lambda hidden_TD, weight_VD, *_: (torch.empty_like(hidden_TD), torch.empty_like(weight_VD)))
def backward(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, lse_T: Tensor, dnll_T: Tensor
) -> tuple[Tensor, Tensor]:
    """(dhidden, dweight) for contiguous inputs of one dtype."""
    if not len(hidden_TD):
        return torch.zeros_like(hidden_TD), torch.zeros_like(weight_VD)
    dhidden_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
    dweight_VD = torch.empty_like(weight_VD)
    for entries in _pieces(len(weight_VD), VOCABULARY_PER_TILE):
        weight, dweight = weight_VD[entries], None
        for rows in _pieces(len(hidden_TD), TOKENS_PER_TILE):
            hidden = hidden_TD[rows]
            logits = _product(hidden, weight.T)
            dlogits = torch.empty_like(logits, dtype=hidden.dtype)
            block = min(1024, triton.next_power_of_2(logits.shape[1]))
            cross_entropy_bwd_kernel[(len(logits), triton.cdiv(logits.shape[1], block))](
                logits, targets_T[rows], lse_T[rows], dnll_T[rows], dlogits, entries.start, logits.shape[1], block,
                num_warps=4,
            )  # fmt: skip
            del logits
            dhidden_TD[rows] += _product(dlogits, weight)
            part = _product(dlogits.T, hidden)
            dweight = part if dweight is None else dweight.add_(part)
        dweight_VD[entries] = dweight
    return dhidden_TD.to(hidden_TD.dtype), dweight_VD


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        ctx.weight_dtype = weight_VD.dtype
        hidden_TD, targets_T = hidden_TD.contiguous(), targets_T.contiguous()
        weight_VD = weight_VD.to(hidden_TD.dtype).contiguous()
        nll_T, lse_T = forward(hidden_TD, weight_VD, targets_T)
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, lse_T)
        return nll_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnll_T: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_TD, dweight_VD = backward(*ctx.saved_tensors, dnll_T.contiguous())
        return dhidden_TD, dweight_VD.to(ctx.weight_dtype), None
