"""Gated pooling in Triton.

A program takes all slots of one entry for some of its channels, so the softmax over the slots needs no second look:
scores and values are read once. The forward moves 2 E FP32 values for each token in and D for each entry out, the
backward 2 E in and 2 E out, for a few FLOPs each: bytes are the floor.

A (row, half) is in one entry at most, so the backward writes each gradient without adding to it: no atomics, the same
bits in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.opaque import opaque

VALUES_PER_TILE = 4096


@triton.jit
def _slots(rows_ptr, G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr):
    """(channels, offsets into values and scores, which of them exist) for this program's entry and channels."""
    entry = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, BLOCK_G)
    rows = tl.load(rows_ptr + entry * G + slots, mask=slots < G, other=-1)
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    # With two halves in a row, the last G/2 slots read the second.
    half = tl.where(slots >= G // 2, E - D, 0)
    offsets = (rows * E + half)[:, None] + channels[None, :]
    return channels, offsets, (rows >= 0)[:, None] & (channels < D)[None, :]


@triton.jit
def _gates(scores_ptr, offsets, filled):
    """Softmax over the slots; 0 where there is nothing."""
    # A large negative number instead of infinity: channels beyond the last one have no slot at all.
    scores = tl.load(scores_ptr + offsets, mask=filled, other=-1e30)
    weights = tl.where(filled, tl.exp(scores - tl.max(scores, axis=0)[None, :]), 0.0)
    return weights / tl.maximum(tl.sum(weights, axis=0), 1e-30)[None, :]


@triton.jit
def gated_pool_fwd_kernel(
    values_ptr,
    scores_ptr,
    rows_ptr,
    pooled_ptr,
    G: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    channels, offsets, filled = _slots(rows_ptr, G, D, E, BLOCK_G, BLOCK_D)
    gates = _gates(scores_ptr, offsets, filled)
    values = tl.load(values_ptr + offsets, mask=filled, other=0.0)
    target = pooled_ptr + tl.program_id(0).to(tl.int64) * D + channels
    tl.store(target, tl.sum(gates * values, axis=0), mask=channels < D)


@triton.jit
def gated_pool_bwd_kernel(
    values_ptr,
    scores_ptr,
    rows_ptr,
    d_ptr,
    dvalues_ptr,
    dscores_ptr,
    G: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    channels, offsets, filled = _slots(rows_ptr, G, D, E, BLOCK_G, BLOCK_D)
    gates = _gates(scores_ptr, offsets, filled)
    values = tl.load(values_ptr + offsets, mask=filled, other=0.0)
    d = tl.load(d_ptr + tl.program_id(0).to(tl.int64) * D + channels, mask=channels < D, other=0.0)
    weighted = gates * d[None, :]
    moved = values * weighted
    tl.store(dvalues_ptr + offsets, weighted, mask=filled)
    tl.store(dscores_ptr + offsets, moved - gates * tl.sum(moved, axis=0)[None, :], mask=filled)


def _tile(num_slots: int, width: int) -> tuple[int, int]:
    """(slots, channels) of a tile."""
    slots = triton.next_power_of_2(num_slots)
    return slots, min(triton.next_power_of_2(width), max(16, VALUES_PER_TILE // slots))


@opaque(lambda values_YE, scores_YE, rows_CG, width: values_YE.new_empty(rows_CG.shape[0], width))
def forward(values_YE: Tensor, scores_YE: Tensor, rows_CG: Tensor, width: int) -> Tensor:
    """e_CD for contiguous inputs."""
    (entries, slots), columns = rows_CG.shape, values_YE.shape[1]
    pooled_CD = values_YE.new_empty(entries, width)
    block_slots, block_width = _tile(slots, width)
    gated_pool_fwd_kernel[(entries, triton.cdiv(width, block_width))](
        values_YE, scores_YE, rows_CG, pooled_CD, slots, width, columns, block_slots, block_width, num_warps=4
    )
    return pooled_CD


@opaque(lambda values_YE, scores_YE, rows_CG, d_CD: (torch.empty_like(values_YE), torch.empty_like(scores_YE)))
def backward(values_YE: Tensor, scores_YE: Tensor, rows_CG: Tensor, d_CD: Tensor) -> tuple[Tensor, Tensor]:
    """(dvalues, dscores) for contiguous inputs."""
    # Rows of tokens that are in no entry yet get no gradient.
    dvalues_YE, dscores_YE = torch.zeros_like(values_YE), torch.zeros_like(scores_YE)
    (entries, slots), (width, columns) = rows_CG.shape, (d_CD.shape[1], values_YE.shape[1])
    block_slots, block_width = _tile(slots, width)
    gated_pool_bwd_kernel[(entries, triton.cdiv(width, block_width))](
        values_YE, scores_YE, rows_CG, d_CD, dvalues_YE, dscores_YE, slots, width, columns, block_slots, block_width,
        num_warps=4,
    )  # fmt: skip
    return dvalues_YE, dscores_YE


class GatedPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_YE: Tensor, scores_YE: Tensor, rows_CG: Tensor, width: int) -> Tensor:
        inputs = [x.contiguous() for x in (values_YE, scores_YE, rows_CG)]
        ctx.save_for_backward(*inputs)
        return forward(*inputs, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_CD: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(*ctx.saved_tensors, d_CD.contiguous()), None, None
