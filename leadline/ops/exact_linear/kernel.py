"""Linear maps of few rows in FP32, in Triton.

Every value of the weight is read once and multiplied a handful of times: its bytes are the floor, 2 MB for the router
of V4-Flash, less than a microsecond. What a library makes of such a product is a split of the sum over programs and a
second kernel that adds up, because its tiles of the weight are too large to busy a card. Here a program has ROWS whole
rows of the weight in registers, so that a router's 256 rows are as many programs as a large card has processors; it
meets the rows of x one after the other, and nobody has to add anything. A result is the sum over one layout of threads,
whatever stands beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.ops.early_start import begin, starts_early
from leadline.ops.opaque import opaque

FEW_ROWS = 4  # of x, above which reading them again for all rows of the weight takes longer than the matrix units
ROWS = 2  # of the weight in one program
WIDEST = 8192  # values of a row that a program can hold
LARGEST_WEIGHT = 2**25  # values; a vocabulary's worth of rows is long enough for a library


@triton.jit(do_not_specialize=["T"])
def exact_linear_fwd_kernel(
    x_ptr, weight_ptr, y_ptr, T, O, N: tl.constexpr,  # noqa: E741
    BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y[:, BLOCK_O of its columns] = x times as many rows of the weight."""
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    columns = tl.arange(0, BLOCK_N)
    inside = (rows < O)[:, None] & (columns < N)[None, :]
    weight = tl.load(weight_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :], mask=inside, other=0.0)
    weight = weight.to(tl.float32)
    begin(EARLY)
    for t in range(T):
        x = tl.load(x_ptr + t * N + columns, mask=columns < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + t * O + rows, tl.sum(weight * x[None, :], axis=1), mask=rows < O)


def takes(x_TN: Tensor, weight_ON: Tensor) -> bool:
    """Whether these shapes are few rows."""
    return len(x_TN) <= FEW_ROWS and x_TN.shape[1] <= WIDEST and weight_ON.numel() <= LARGEST_WEIGHT


@opaque(lambda x_TN, weight_ON: x_TN.new_empty(x_TN.shape[0], weight_ON.shape[0], dtype=torch.float32))
def few_rows(x_TN: Tensor, weight_ON: Tensor) -> Tensor:
    """y_TO for contiguous inputs."""
    (num_rows, width), outputs = x_TN.shape, weight_ON.shape[0]
    y_TO = torch.empty(num_rows, outputs, device=x_TN.device)
    block, early = triton.next_power_of_2(width), starts_early(x_TN.device)
    exact_linear_fwd_kernel[(triton.cdiv(outputs, ROWS),)](
        x_TN, weight_ON, y_TO, num_rows, outputs, width, ROWS, block, early,
        launch_pdl=early, num_warps=max(1, min(8, block // 128)),
    )  # fmt: skip
    return y_TO
