"""Two products of the same 5 to 64 rows in one launch, in Triton: the values and scores of a compressor's step.

With so few rows a product is as fast as its weight can be read: 16 MiB for the two of a CSA layer's entries, 5 us
on an H100. A program has 16 rows of one of the two weights and all of x, so that even narrow weights give every
multiprocessor some; 128 KiB each, of which several blocks are on their way at any time. A library would split the sum
over programs and add the parts up with a second kernel, for each of the two.

A chain of dependent products of 16 x 16 x 16 would take longer than the bytes. So the sum has PARTS chains, one for
each warp, which are added up in order at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.ops.early_start import begin, starts_early
from leadline.ops.opaque import opaque

COLUMNS = 16
PARTS = 4
MOST_ROWS = 64


@triton.jit(do_not_specialize=["T"])
def exact_linear_pair_fwd_kernel(
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


def takes(x_TN: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether one launch is better than two: few bfloat16 rows on a GPU, and two weights of one shape."""
    if len(weights) != 2 or len({weight.shape for weight in weights}) > 1 or len(weights[0]) % COLUMNS:
        return False
    narrow = all(tensor.dtype == torch.bfloat16 for tensor in (x_TN, *weights))
    return x_TN.is_cuda and narrow and len(x_TN) <= MOST_ROWS


def _results(x_TN: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [x_TN.new_empty((len(x_TN), len(weight)), dtype=torch.float32) for weight in weights]


@opaque(_results)
def pair_of_products(x_TN: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """x W^T for two weights and up to 64 rows of 16 or 32 bits, FP32 [T, O]; contiguous inputs."""
    results, (tokens, width), columns = _results(x_TN, weights), x_TN.shape, len(weights[0])
    rows, early = max(16, triton.next_power_of_2(tokens)), starts_early(x_TN.device)
    block, stages = _buffers(rows, x_TN.element_size(), x_TN.device)
    exact_linear_pair_fwd_kernel[(2 * columns // COLUMNS,)](
        x_TN, *weights, *results, tokens, columns,
        N=width, ROWS=rows, COLUMNS=COLUMNS, PARTS=PARTS, BLOCK=block,
        EARLY=early, launch_pdl=early, num_warps=PARTS, num_stages=stages,
    )  # fmt: skip
    return results


def _buffers(rows: int, value_bytes: int, device: torch.device) -> tuple[int, int]:
    """Values of a chain at once, and how many such blocks are on their way: as many as the shared memory holds."""
    block = (128 if rows < 64 else 64) * 2 // value_bytes
    if device.type != "cuda":
        return block, 2
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return block, min(4 if rows == 16 else 3, shared // (PARTS * (COLUMNS + rows) * block * value_bytes))
