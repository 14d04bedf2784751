"""Tokens to experts and back: a sorted copy of every token for each of its experts, and the sum of what comes back."""

from __future__ import annotations

from torch import Tensor

from leadline.ops.dispatch import use_kernel
from leadline.ops.token_permutation import reference


def expert_order(experts_TA: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(order_X, counts_E): X = T A pairs (token, choice) sorted by expert, and how many each expert has, int64.

    experts_TA: int64, each below num_experts. order_X holds token * A + choice; pairs of one expert keep the order of
    their tokens.
    """
    if use_kernel("token_permutation", experts_TA):
        from leadline.ops.token_permutation import kernel

        return kernel.expert_order(experts_TA.contiguous(), num_experts)
    return reference.expert_order(experts_TA, num_experts)


def dispatch(x_TD: Tensor, order_X: Tensor, choices: int) -> Tensor:
    """Rows of x for every pair in expert order: [X, D]. Differentiable; the gradient is summed in FP32."""
    if use_kernel("token_permutation", x_TD):
        from leadline.ops.token_permutation import kernel

        return kernel.Dispatch.apply(x_TD, order_X, choices)
    return reference.Dispatch.apply(x_TD, order_X, choices)


def combine(y_XD: Tensor, order_X: Tensor, choices: int) -> Tensor:
    """Sum of the A rows that belong to each token, FP32 [T, D]; the order of summation is that of the choices, so the
    result does not depend on scheduling. Differentiable."""
    if use_kernel("token_permutation", y_XD):
        from leadline.ops.token_permutation import kernel

        return kernel.Combine.apply(y_XD, order_X, choices)
    return reference.Combine.apply(y_XD, order_X, choices)
