"""Tokens to experts and back: a sorted copy of every token for each of its experts, and the sum of what comes back.

Rows are pairs of a token and one of its choices, sorted by expert; X = T A of them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from leadline.ops.dispatch import use_kernel
from leadline.ops.token_permutation import reference


class ExpertOrder(NamedTuple):
    """pair_X: the pair in each row, token x A + choice. row_TA: the row of each pair. counts_E: rows of each expert.
    All int64; rows of one expert keep the order of their tokens."""

    pair_X: Tensor
    row_TA: Tensor
    counts_E: Tensor


def expert_order(experts_TA: Tensor, num_experts: int) -> ExpertOrder:
    """The rows of all experts. experts_TA: int64, each below num_experts."""
    if use_kernel("token_permutation", experts_TA):
        from leadline.ops.token_permutation import kernel

        return ExpertOrder(*kernel.expert_order(experts_TA.contiguous(), num_experts))
    return ExpertOrder(*reference.expert_order(experts_TA, num_experts))


def dispatch(x_TD: Tensor, order: ExpertOrder) -> Tensor:
    """The token of every row: [X, D]. Differentiable; the gradient is summed in FP32."""
    if use_kernel("token_permutation", x_TD):
        from leadline.ops.token_permutation import kernel

        return kernel.Dispatch.apply(x_TD, order.row_TA)
    return reference.Dispatch.apply(x_TD, order.pair_X, order.row_TA)


def combine(y_XD: Tensor, order: ExpertOrder, plus_TD: Tensor | None = None) -> Tensor:
    """Sum of the A rows of each token, plus plus_TD, [T, D]. The sum is FP32 and in the order of the choices, with plus
    at its end, so that it does not depend on scheduling; the result has the dtype of plus, FP32 without. Differentiable
    in y and plus."""
    if use_kernel("token_permutation", y_XD):
        from leadline.ops.token_permutation import kernel

        return kernel.Combine.apply(y_XD, order.row_TA, plus_TD)
    return reference.Combine.apply(y_XD, order.pair_X, order.row_TA, plus_TD)
