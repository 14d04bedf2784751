"""Linear maps of few rows, in Triton: one weight or two, or many side by side, each with its own columns of x.

Every value of the weight is read once and multiplied a handful of times: its bytes are the floor, 64 MiB for the
grouped output of V4-Flash, 22 us on an H100, and 2 MiB for its router, less than a microsecond. What a library makes of
such a product is a split of the sum over programs and a second kernel that adds up, because its tiles of the weight are
too large to busy a card. Here a program has ROWS whole rows of the weight in registers, so that a router's 256 rows are
as many programs as a large card has processors; it meets the rows of x one after the other, and nobody has to add
anything. It has asked for its rows before it waits for those of x. A result is the sum over one layout of threads,
whatever stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.ops.early_start import let_next_start, starts_early, wait_for_earlier
from leadline.ops.opaque import opaque

FEW_ROWS = 4  # of x, above which reading them again for all rows of the weight takes longer than the matrix units
ROWS = 2  # of the weight in one program
WIDEST = 8192  # values of a row that a program can hold
LARGEST_WEIGHT = 2**25  # values; a vocabulary's worth of rows is long enough for a library


@triton.jit(do_not_specialize=["T", "O", "OTHER_O"])
def exact_linear_fwd_kernel(
    x_ptr, weight_ptr, other_weight_ptr, y_ptr, other_y_ptr, T, O, OTHER_O, x_stride, GROUP, scale,  # noqa: E741
    N: tl.constexpr, PAIR: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK_O columns of y [T, O] = scale x times as many rows of the weight, or, with a PAIR, of the other one behind
    its last. GROUP rows of the weight, a multiple of BLOCK_O if they are not all, share N columns of x."""
    let_next_start(EARLY)
    program = tl.program_id(0)
    if PAIR:
        programs = tl.cdiv(O, BLOCK_O)
        if program >= programs:
            weight_ptr, y_ptr, O, program = other_weight_ptr, other_y_ptr, OTHER_O, program - programs  # noqa: E741
    rows = program * BLOCK_O + tl.arange(0, BLOCK_O)
    columns = tl.arange(0, BLOCK_N)
    inside = (rows < O)[:, None] & (columns < N)[None, :]
    weight = tl.load(weight_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :], mask=inside, other=0.0)
    wait_for_earlier(EARLY)
    if not PAIR:
        x_ptr += program * BLOCK_O // GROUP * N
    for t in range(T):
        x = tl.load(x_ptr + t * x_stride + columns, mask=columns < N, other=0.0).to(tl.float32)
        y = tl.sum(weight.to(tl.float32) * x[None, :], axis=1) * scale
        tl.store(y_ptr + t * O + rows, y.to(y_ptr.dtype.element_ty), mask=rows < O)


def takes(x_TN: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether these are few rows and one weight or two."""
    small = all(weight.shape[-1] <= WIDEST and weight.numel() <= LARGEST_WEIGHT for weight in weights)
    return len(x_TN) <= FEW_ROWS and len(weights) <= 2 and small


@opaque(lambda x_TN, weights, scale: [_empty(x_TN, weight, torch.float32) for weight in weights])
def few_rows(x_TN: Tensor, weights: list[Tensor], scale: float) -> list[Tensor]:
    """scale x W^T for each weight, FP32 [T, O]; contiguous inputs."""
    results = [_empty(x_TN, weight, torch.float32) for weight in weights]
    _launch(x_TN, weights, results, 1, scale)
    return results


@opaque(lambda x_TN, weight_ON, groups: _empty(x_TN, weight_ON, x_TN.dtype))
def few_rows_of_groups(x_TN: Tensor, weight_ON: Tensor, groups: int) -> Tensor:
    """[T, O] in the dtype of x [T, groups N], of whose columns each group of rows of the weight has its own, as many as
    the weight [O, N] has; contiguous inputs, O / groups a multiple of ROWS."""
    y_TO = _empty(x_TN, weight_ON, x_TN.dtype)
    _launch(x_TN, [weight_ON], [y_TO], groups, 1.0)
    return y_TO


def _empty(x_TN: Tensor, weight_ON: Tensor, dtype: torch.dtype) -> Tensor:
    return x_TN.new_empty(len(x_TN), len(weight_ON), dtype=dtype)


def _launch(x_TN: Tensor, weights: list[Tensor], results: list[Tensor], groups: int, scale: float) -> None:
    heights, width = [len(weight) for weight in weights], weights[0].shape[1]
    block, early = triton.next_power_of_2(width), starts_early(x_TN.device)
    exact_linear_fwd_kernel[(sum(triton.cdiv(height, ROWS) for height in heights),)](
        x_TN, weights[0], weights[-1], results[0], results[-1], len(x_TN), heights[0], heights[-1], x_TN.shape[1],
        heights[0] // groups, scale, width, len(weights) == 2, ROWS, block, early,
        launch_pdl=early, num_warps=max(1, min(8, block // 128)),
    )  # fmt: skip
