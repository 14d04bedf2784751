"""Two products of the same few rows in one launch, with FP32 sums: the values and scores of a compressor's step."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.ops.dispatch import use_kernel
from leadline.ops.invariance import is_batch_invariant
from leadline.ops.twin_product.reference import twin_product_reference

MOST_ROWS = 64
COLUMNS = 16  # of which the weights have a multiple


def suits(x_TN: Tensor, weight_ON: Tensor) -> bool:
    """Whether one launch is better than two: few bfloat16 rows on a GPU, no gradient to be recorded, and no rows that
    must have the bits of the same among many."""
    recorded = torch.is_grad_enabled() and (x_TN.requires_grad or weight_ON.requires_grad)
    narrow = x_TN.dtype == weight_ON.dtype == torch.bfloat16 and weight_ON.shape[0] % COLUMNS == 0
    return x_TN.is_cuda and narrow and len(x_TN) <= MOST_ROWS and not recorded and not is_batch_invariant()


def twin_product(x_TN: Tensor, first_ON: Tensor, second_ON: Tensor) -> tuple[Tensor, Tensor]:
    """x W1^T and x W2^T with FP32 arithmetic: [T, O] FP32 each.

    x_TN, first_ON, second_ON: of one dtype, bfloat16 or float32; products of bfloat16 numbers are exact in FP32. O is
    a multiple of 16. A row's bits do not depend on the others, but for how many there are: up to 16, 32 or 64. Not
    differentiable.
    """
    if use_kernel("twin_product", x_TN):
        from leadline.ops.twin_product.kernel import twin_product_kernel

        return twin_product_kernel(x_TN, first_ON, second_ON)
    return twin_product_reference(x_TN, first_ON, second_ON)
