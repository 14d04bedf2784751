"""Linear maps in FP32, where the report keeps full precision: compressors, index weights, router, head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leadline.ops.dispatch import use_kernel
from leadline.ops.exact_linear import reference
from leadline.ops.invariance import is_batch_invariant
from leadline.ops.precision import ExactProduct


def exact_linear(x_TN: Tensor, weight_ON: Tensor, scale: float = 1.0) -> Tensor:
    """y = scale x W^T with FP32 arithmetic and an FP32 result, [T, O]. Differentiable in both.

    On CUDA, products of two bfloat16 matrices, which are exact in FP32, are left to the matrix units; a step's few rows
    without gradients are multiplied in a kernel of their own. Which of them it is depends on the shapes alone.
    """
    (y_TO,) = exact_linears(x_TN, [weight_ON], scale)
    return y_TO


def exact_linears(x_TN: Tensor, weights: Sequence[Tensor], scale: float = 1.0) -> tuple[Tensor, ...]:
    """`exact_linear` of the same rows with each of several weights; a step's two, as of a compressor, in one launch."""
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_TN, *weights))
    if use_kernel("exact_linear", x_TN) and not recorded and not is_batch_invariant():
        from leadline.ops.exact_linear import kernel, pair_kernel

        operands = x_TN.contiguous(), [weight.contiguous() for weight in weights]
        if kernel.takes(x_TN, weights):
            return tuple(kernel.few_rows(*operands, scale))
        if scale == 1.0 and pair_kernel.takes(x_TN, weights):
            return tuple(pair_kernel.pair_of_products(*operands))
    products = tuple(_product(x_TN, weight) for weight in weights)
    return products if scale == 1.0 else tuple(y_TO * scale for y_TO in products)


def _product(x_TN: Tensor, weight_ON: Tensor) -> Tensor:
    if x_TN.is_cuda and x_TN.dtype == weight_ON.dtype == torch.bfloat16:
        return ExactProduct.apply(x_TN, weight_ON)
    return reference.exact_linear(x_TN, weight_ON)
