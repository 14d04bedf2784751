"""Two products of few rows in Triton.

With a handful of rows a product is as fast as its weight can be read: 16 MiB for the two of a CSA layer's entries, 5 us
on an H100. A program has 16 rows of one of the two weights and all of x, so that even narrow weights give every
multiprocessor some; 128 KiB each, of which several blocks are on their way at any time. A library would split the sum
over programs and add the parts up with a second kernel, for each of the two.

A chain of dependent products of 16 x 16 x 16 would take longer than the bytes. So the sum has PARTS chains, one for
each warp, which are added up in order at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.ops.early_start import begin, starts_early
from leadline.ops.opaque import opaque

COLUMNS = 16
PARTS = 4


@triton.jit(do_not_specialize=["T"])
def twin_product_fwd_kernel(
    x_TN, first_ON, second_ON, first_TO, second_TO, T, O,  # noqa: E741
    N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of one of the two. BLOCK: of each part of the sum, added up at once."""
    begin(EARLY)
    blocks = O // COLUMNS
    is_first = tl.program_id(0) < blocks
    weight_ON = tl.where(is_first, first_ON, second_ON)
    out_TO = tl.where(is_first, first_TO, second_TO)
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)[:, None, None] * BLOCK + tl.arange(0, BLOCK)[None, None, :]
    weight_at = weight_ON + column.to(tl.int64)[None, :, None] * N + part
    x_at = x_TN + row[None, :, None] * N + part
    sums = tl.zeros((PARTS, COLUMNS, ROWS), tl.float32)
    for at in range(0, N, PARTS * BLOCK):
        inside = part < N - at
        weight = tl.load(weight_at + at, mask=inside, other=0.0)
        x = tl.load(x_at + at, mask=inside & (row < T)[None, :, None], other=0.0)
        sums = tl.dot(weight, tl.permute(x, (0, 2, 1)), sums, input_precision="ieee")
    place = out_TO + row[None, :] * O + column[:, None]
    tl.store(place, tl.sum(sums, 0), mask=(row < T)[None, :])


def _both(x_TN: Tensor, first_ON: Tensor, second_ON: Tensor) -> tuple[Tensor, Tensor]:
    first_TO = x_TN.new_empty((len(x_TN), len(first_ON)), dtype=torch.float32)
    return first_TO, torch.empty_like(first_TO)


@opaque(_both)
def twin_product_kernel(x_TN: Tensor, first_ON: Tensor, second_ON: Tensor) -> tuple[Tensor, Tensor]:
    """The operation for up to 64 rows of 16 or 32 bits."""
    first_TO, second_TO = _both(x_TN, first_ON, second_ON)
    (tokens, columns), early = first_TO.shape, starts_early(x_TN.device)
    rows = max(16, triton.next_power_of_2(tokens))
    block, stages = _buffers(rows, x_TN.element_size(), x_TN.device)
    twin_product_fwd_kernel[(2 * columns // COLUMNS,)](
        x_TN.contiguous(), first_ON.contiguous(), second_ON.contiguous(), first_TO, second_TO, tokens, columns,
        N=x_TN.shape[1], ROWS=rows, COLUMNS=COLUMNS, PARTS=PARTS, BLOCK=block,
        EARLY=early, launch_pdl=early, num_warps=PARTS, num_stages=stages,
    )  # fmt: skip
    return first_TO, second_TO


def _buffers(rows: int, value_bytes: int, device: torch.device) -> tuple[int, int]:
    """Values of a chain at once, and how many such blocks are on their way: as many as the shared memory holds."""
    block = (128 if rows < 64 else 64) * 2 // value_bytes
    if device.type != "cuda":
        return block, 2
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return block, min(4 if rows == 16 else 3, shared // (PARTS * (COLUMNS + rows) * block * value_bytes))
