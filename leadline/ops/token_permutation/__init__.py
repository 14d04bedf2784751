"""Tokens to experts and back: a sorted copy of every token for each of its experts, and the sum of what comes back."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.ops.token_permutation.reference import Combine, Dispatch


def expert_order(experts_TA: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(order_X, counts_E): X = T A pairs (token, choice) sorted by expert, and how many each expert has, int64.

    order_X holds token * A + choice; pairs of one expert keep the order of their tokens.
    """
    flat = experts_TA.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=num_experts)


def dispatch(x_TD: Tensor, order_X: Tensor, choices: int) -> Tensor:
    """Rows of x for every pair in expert order: [X, D]. Differentiable."""
    return Dispatch.apply(x_TD, order_X, choices)


def combine(y_XD: Tensor, order_X: Tensor, choices: int) -> Tensor:
    """Sum of the A rows that belong to each token, FP32 [T, D]; the order of summation is that of the choices, so the
    result does not depend on scheduling. Differentiable."""
    return Combine.apply(y_XD, order_X, choices)
