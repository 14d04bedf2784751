"""Linear maps in FP32, where the report keeps full precision: compressor projections, router and head."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.ops.dispatch import use_kernel
from leadline.ops.exact_linear import reference
from leadline.ops.invariance import is_batch_invariant
from leadline.ops.precision import ExactProduct


def exact_linear(x_TN: Tensor, weight_ON: Tensor) -> Tensor:
    """y = x W^T with FP32 arithmetic and an FP32 result, [T, O]. Differentiable in both.

    On CUDA, products of two bfloat16 matrices, which are exact in FP32, are left to the matrix units; a step's few rows
    without gradients are multiplied in a kernel of their own. Which of them it is depends on the shapes alone.
    """
    if use_kernel("exact_linear", x_TN):
        from leadline.ops.exact_linear import kernel

        recorded = torch.is_grad_enabled() and (x_TN.requires_grad or weight_ON.requires_grad)
        if not recorded and not is_batch_invariant() and kernel.takes(x_TN, weight_ON):
            return kernel.few_rows(x_TN.contiguous(), weight_ON.contiguous())
    if x_TN.is_cuda and x_TN.dtype == weight_ON.dtype == torch.bfloat16:
        return ExactProduct.apply(x_TN, weight_ON)
    return reference.exact_linear(x_TN, weight_ON)
