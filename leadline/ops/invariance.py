"""Batch invariance: a token's numbers do not depend on what is computed beside it, to the last bit.

Floating-point sums depend on their order, and libraries choose the order by the shape: the product of one row may be
added up differently than the same row among a hundred. An answer then changes with the traffic, a cached prefix is only
nearly equal to a computed one, and a trainer only nearly sees the probabilities its generator drew from.

Inside of `batch_invariant()` the references compute with shapes that never vary: products take `ROWS` rows at a time,
the last ones padded, and attention adds the columns that a query sees block by block, in order of their positions.
What is beside a token then decides nothing: the same token after the same past gives the same bits in any chunk, any
batch, with or without a state. Sums that run along one row, as in norms, are safe anyway, and quantised products are
exact in the reference.

It costs speed, and it covers the references alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

ROWS = 16  # of one product
COLUMNS = 128  # entries that are added up at once

_on: ContextVar[bool] = ContextVar("leadline_batch_invariant", default=False)


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Compute with fixed shapes inside of the block."""
    token = _on.set(True)
    try:
        yield
    finally:
        _on.reset(token)


@torch.compiler.assume_constant_result
def is_batch_invariant() -> bool:
    """Whether a `batch_invariant` block is open. torch.compile asks once, while it traces."""
    return _on.get()


def rows_times(x_TN: Tensor, weight_ON: Tensor) -> Tensor:
    """x W^T, [T, O]; in blocks of `ROWS` rows where rows must not depend on each other."""
    if not is_batch_invariant():
        return torch.nn.functional.linear(x_TN, weight_ON)
    num_rows = x_TN.shape[0]
    padded = torch.nn.functional.pad(x_TN, (0, 0, 0, -num_rows % ROWS)).contiguous().unflatten(0, (-1, ROWS))
    # bmm, not matmul: that would fold the blocks into one product of a shape that varies.
    return torch.bmm(padded, weight_ON.T.expand(len(padded), -1, -1)).flatten(0, 1)[:num_rows]


def rowwise(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """function(*tensors), which treats rows alike and returns a tensor or a tuple of tensors with as many rows.

    Vector units and the scalar code behind them differ in the last bit of exp and its like, and which numbers fall
    behind the last full vector depends on how many there are. So where rows must not depend on each other, zero rows
    are added until no thread's share ends in the middle of a vector.
    """
    if not is_batch_invariant():
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
    scores = [torch.bmm(q_bHK, vectors.mT).masked_fill_(~seen[:, None], float("-inf")) for vectors, seen in blocks]
    largest_bH = torch.stack([part.amax(-1) for part in scores]).amax(0)
    floor_bH1 = largest_bH.masked_fill(largest_bH == float("-inf"), 0.0)[..., None]
    sum_bH, o_bHK = torch.zeros_like(largest_bH), torch.zeros_like(q_bHK)
    for part, (vectors, _) in zip(scores, blocks, strict=True):
        weights = part.sub_(floor_bH1).exp_()
        sum_bH += weights.sum(-1)
        o_bHK += torch.bmm(weights.to(dtype).to(weights.dtype), vectors)
    return o_bHK, sum_bH, largest_bH
