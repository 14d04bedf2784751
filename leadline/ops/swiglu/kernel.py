"""Clamped SwiGLU in Triton.

A tile is a piece of one row or several short rows. The forward moves 3 values for each h (gate and up in, h out), the
backward 5 (gate, up and dh in, dgate and dup out), against about 10 FLOPs and one exponential: bytes are the floor, so
one pass with everything in registers is the best there is.

In the backward a program owns whole rows and walks along them, because the gradient of a row's scale is a sum over the
row: it stays in registers and is written once.

Scales are looked up where the router left them, so that nobody has to put them in the order of the rows.
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

VALUES_PER_TILE = 1024


@triton.jit
def _clamped(gate, up, limit):
    """gate from above, up from both sides. Comparisons, because a minimum would hide NaN."""
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, up)
    return gate, tl.where(up < -limit, -limit, up)


@triton.jit
def swiglu_values(gate, up, limit):
    """`swiglu` of FP32 values without a scale."""
    gate, up = _clamped(gate, up, limit)
    return gate * tl.sigmoid(gate) * up


@triton.jit
def _places(place_ptr, rows, num_rows):
    """Where the scales of rows are."""
    if place_ptr is None:
        return rows
    else:
        return tl.load(place_ptr + rows, mask=rows < num_rows, other=0)


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_fwd_kernel(
    gate_ptr,
    up_ptr,
    scale_ptr,
    place_ptr,
    hidden_ptr,
    num_rows,
    limit,
    F: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    offsets = rows[:, None] * F + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < F)[None, :]
    gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    hidden = swiglu_values(gate, up, limit)
    if scale_ptr is not None:
        places = _places(place_ptr, rows, num_rows)
        hidden *= tl.load(scale_ptr + places, mask=rows < num_rows, other=0.0)[:, None]
    tl.store(hidden_ptr + offsets, hidden.to(hidden_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_bwd_kernel(
    gate_ptr,
    up_ptr,
    scale_ptr,
    place_ptr,
    dhidden_ptr,
    dgate_ptr,
    dup_ptr,
    dscale_ptr,
    num_rows,
    limit,
    F: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if scale_ptr is not None:
        places = _places(place_ptr, rows, num_rows)
        scale = tl.load(scale_ptr + places, mask=rows < num_rows, other=0.0)[:, None]
        dscale = tl.zeros((BLOCK_ROWS, BLOCK_F), tl.float32)
    for start in range(0, F, BLOCK_F):
        columns = start + tl.arange(0, BLOCK_F)
        offsets = rows[:, None] * F + columns[None, :]
        inside = (rows < num_rows)[:, None] & (columns < F)[None, :]
        raw_gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        raw_up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        dhidden = tl.load(dhidden_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        gate, up = _clamped(raw_gate, raw_up, limit)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        if scale_ptr is not None:
            dscale += dhidden * silu * up
            dhidden *= scale
        dgate = dhidden * up * (sigmoid + silu * (1 - sigmoid))
        dup = dhidden * silu
        dgate = tl.where(raw_gate > limit, 0.0, dgate)
        dup = tl.where(tl.abs(raw_up) > limit, 0.0, dup)
        tl.store(dgate_ptr + offsets, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
        tl.store(dup_ptr + offsets, dup.to(dup_ptr.dtype.element_ty), mask=inside)
    if scale_ptr is not None:
        tl.store(dscale_ptr + places, tl.sum(dscale, axis=1), mask=rows < num_rows)


def _tile(width: int) -> tuple[int, int]:
    """(rows, columns) of a tile."""
    columns = min(VALUES_PER_TILE, triton.next_power_of_2(width))
    return VALUES_PER_TILE // columns, columns


@opaque(lambda gate, *_: torch.empty_like(gate))
def forward(gate: Tensor, up: Tensor, scale: Tensor | None, place_X: Tensor | None, limit: float) -> Tensor:
    """h for contiguous inputs."""
    hidden, (num_rows, width) = torch.empty_like(gate), gate.shape
    block_rows, block_columns = _tile(width)
    grid = (triton.cdiv(num_rows, block_rows), triton.cdiv(width, block_columns))
    early = starts_early(gate.device)
    swiglu_fwd_kernel[grid](
        gate, up, scale, place_X, hidden, num_rows, limit, width, block_rows, block_columns, early,
        launch_pdl=early, num_warps=4,
    )  # fmt: skip
    return hidden


@opaque(lambda gate, up, scale, *_: [torch.empty_like(x) for x in (gate, up, scale) if x is not None])
def backward(
    gate: Tensor, up: Tensor, scale: Tensor | None, place_X: Tensor | None, dhidden: Tensor, limit: float
) -> list[Tensor]:
    """[dgate, dup] or [dgate, dup, dscale] for contiguous inputs."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    dscale = None if scale is None else torch.empty_like(scale)
    num_rows, width = gate.shape
    block_rows, block_columns = _tile(width)
    swiglu_bwd_kernel[(triton.cdiv(num_rows, block_rows),)](
        gate, up, scale, place_X, dhidden, dgate, dup, dscale, num_rows, limit, width, block_rows, block_columns,
        num_warps=4,
    )  # fmt: skip
    return [dgate, dup] if dscale is None else [dgate, dup, dscale]


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, scale: Tensor | None, place_X: Tensor | None, limit: float
    ) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        scale, place_X = (None if x is None else x.contiguous() for x in (scale, place_X))
        ctx.save_for_backward(gate, up, scale, place_X)
        ctx.limit = limit
        return forward(gate, up, scale, place_X, limit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, scale, place_X = ctx.saved_tensors
        dgate, dup, *dscale = backward(gate, up, scale, place_X, dhidden.contiguous(), ctx.limit)
        return dgate, dup, *(dscale or [None]), None, None
