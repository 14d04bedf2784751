"""Batch invariance: a token's numbers do not depend on what is computed beside it, to the last bit.

Floating-point sums depend on their order, and libraries choose the order by the shape: the product of one row may be
added up differently than the same row among a hundred. An answer then changes with the traffic, a cached prefix is only
nearly equal to a computed one, and a trainer only nearly sees the probabilities its generator drew from.

Inside of `batch_invariant()` the references say in which order everything is added up: attention adds the columns that
a query sees block by block, in order of their positions, whether they were gathered for a chunk or looked up for a
step. What is beside a token then decides nothing: the same token after the same past gives the same bits in any chunk,
any batch, with or without a state.

Below the references, the shapes must not choose an order either:

- On the CPU they never vary. Products take `ROWS` rows at a time, the last ones padded. Sums that run along one row, as
  in norms, are safe anyway, and quantised products are exact in the reference.
- On a GPU products and sums are those of `ops/ordered_sums`, and ops whose kernels treat every row alike keep them
  (`dispatch.INVARIANT`).

It costs speed. Bits are those of one device and dtype: a GPU's are not the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from leadline.ops.dispatch import batch_invariant, is_batch_invariant
from leadline.ops.ordered_sums import has_kernel, ordered_bmm, ordered_sum

__all__ = [
    "COLUMNS",
    "attend_blocks",
    "batch_invariant",
    "check_batch_invariance",
    "is_batch_invariant",
    "rows_times",
    "rowwise",
]

ROWS = 16  # of one product
COLUMNS = 128  # entries that are added up at once


def check_batch_invariance(x: Tensor) -> None:
    """KernelError when nothing is invariant where x lies, which is so on a GPU without Triton and for float64 there."""
    has_kernel(x)


def rows_times(x_TN: Tensor, weight_ON: Tensor) -> Tensor:
    """x W^T, [T, O]; in an order that rows do not choose, where they must not depend on each other."""
    if not is_batch_invariant():
        return torch.nn.functional.linear(x_TN, weight_ON)
    if has_kernel(x_TN):
        return ordered_bmm(x_TN[None], weight_ON.T[None])[0]
    num_rows = x_TN.shape[0]
    padded = torch.nn.functional.pad(x_TN, (0, 0, 0, -num_rows % ROWS)).contiguous().unflatten(0, (-1, ROWS))
    # bmm, not matmul: that would fold the blocks into one product of a shape that varies.
    return torch.bmm(padded, weight_ON.T.expand(len(padded), -1, -1)).flatten(0, 1)[:num_rows]


def rowwise(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """function(*tensors), which treats rows alike and returns a tensor or a tuple of tensors with as many rows.

    Vector units and the scalar code behind them differ in the last bit of exp and its like, and which numbers fall
    behind the last full vector depends on how many there are. So where rows must not depend on each other, zero rows
    are added until no thread's share ends in the middle of a vector. A GPU has no such vectors.
    """
    if not is_batch_invariant() or tensors[0].is_cuda:
        return function(*tensors)
    num_rows = len(tensors[0])
    missing = -num_rows % (ROWS * torch.get_num_threads())
    padded = (torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) for tensor in tensors)
    found = function(*padded)
    return found[:num_rows] if isinstance(found, Tensor) else tuple(part[:num_rows] for part in found)


def attend_blocks(q_bHK: Tensor, blocks: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Attention of each of b queries to columns of its own, in blocks of shapes that do not depend on the batch.

    q_bHK: FP32, scaled. blocks: vectors [b, X, K] and which of them each query sees, bool [b, X]; X may differ from
    block to block, but a block's X must always be the same. dtype: probabilities are rounded to it before they meet the
    values. Returns (sum of probabilities x values [b, H, K], their sum [b, H], the largest score [b, H]); a block of
    which a query sees nothing changes none of its bits.
    """
    scores = [ordered_bmm(q_bHK, vectors.mT).masked_fill_(~seen[:, None], float("-inf")) for vectors, seen in blocks]
    largest_bH = torch.stack([part.amax(-1) for part in scores]).amax(0)
    floor_bH1 = largest_bH.masked_fill(largest_bH == float("-inf"), 0.0)[..., None]
    sum_bH, o_bHK = torch.zeros_like(largest_bH), torch.zeros_like(q_bHK)
    for part, (vectors, _) in zip(scores, blocks, strict=True):
        weights = part.sub_(floor_bH1).exp_()
        sum_bH += ordered_sum(weights)
        o_bHK += ordered_bmm(weights.to(dtype).to(weights.dtype), vectors)
    return o_bHK, sum_bH, largest_bH
