"""Linear maps with weights in eight or four bits, for one matrix or for the stacks of the experts.

Activations are rounded to E4M3 in groups of 128 along the width, on the fly. A four-bit weight is multiplied as the
eight-bit weight that it is exactly equal to (`fp4.to_fp8`), so the two formats differ in bytes alone. With B slabs of
128 columns, rows t and columns o,

    y_to = sum_b  s_tb S_ob  sum_(n in slab b)  x_tn w_on          x, w: E4M3 values; s, S: their scales

where the inner sum is a matrix product, and the outer one is FP32, with slabs in ascending order (published kernels
`fp8_gemm` and `fp4_gemm`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.dispatch import use_kernel
from leadline.ops.grouped_linear import grouped_linear
from leadline.ops.quantized_linear import reference
from leadline.ops.quantized_linear.rows import Dispatched, Gated, Rows, written
from leadline.ops.quantized_linear.weight import FORMATS, Format, QuantizedWeight, quantize

__all__ = [
    "FORMATS",
    "Dispatched",
    "Format",
    "Gated",
    "QuantizedWeight",
    "Rows",
    "quantize",
    "quantized_grouped_linear",
    "quantized_linear",
    "quantized_linears",
    "written",
]


def quantized_linear(x: Tensor | Gated, weight: QuantizedWeight) -> Tensor:
    """y = x W^T of x [..., N] and a weight [O, N]; [..., O] in the dtype of x.

    x: floating; a row with an infinity or NaN gives NaN. The sum over a slab is exact in the reference; kernels add in
    the matrix units, whose precision is below FP32 for eight-bit operands, and always in the same order, so a row's
    result depends on nothing but the row. Differentiable in x, straight through its rounding: dx = dy W. x may be a
    SwiGLU of two [T, N] that is nowhere else needed.
    """
    if not isinstance(x, Tensor):
        return _differentiable(x, [weight], None)[0]
    (y_TO,) = _differentiable(x.flatten(0, -2), [weight], None)
    return y_TO.unflatten(0, x.shape[:-1])


def quantized_linears(x_TN: Tensor, weights: Sequence[QuantizedWeight]) -> tuple[Tensor, ...]:
    """`quantized_linear` of [T, N] for each of several weights in one format; x is rounded once for all of them."""
    return _differentiable(x_TN, weights, None)


def quantized_grouped_linear(x_XN: Rows, weights: Sequence[QuantizedWeight], counts_E: Tensor) -> tuple[Tensor, ...]:
    """y[rows of expert e] = x[rows of expert e] W[e]^T for each of several stacks [E, O, N]: one [X, O] for each.

    x_XN: [X, N], rows sorted by expert, rounded once for all stacks, or what they are made of. counts_E: int64 [E],
    rows of each expert, sum X. Arithmetic, dtypes and gradient as in `quantized_linear`. On CUDA the host does not wait
    for the counts.
    """
    return _differentiable(x_XN, weights, counts_E)


def _differentiable(rows: Rows, weights: Sequence[QuantizedWeight], counts_E: Tensor | None) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and rows.requires_grad:
        return _QuantizedLinear.apply(written(rows), counts_E, tuple(weights))
    return _products(rows, weights, counts_E)


def _products(rows: Rows, weights: Sequence[QuantizedWeight], counts_E: Tensor | None) -> tuple[Tensor, ...]:
    if use_kernel("quantized_linear", rows if isinstance(rows, Tensor) else rows[0]):
        from leadline.ops.quantized_linear import kernel

        return kernel.products(rows, weights, counts_E)
    return reference.products(written(rows), weights, counts_E)


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TN: Tensor, counts_E: Tensor | None, weights: tuple[QuantizedWeight, ...]) -> Any:
        ctx.weights = weights
        ctx.save_for_backward(counts_E)
        return _products(x_TN, weights, counts_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        (counts_E,) = ctx.saved_tensors
        dx_TN = None
        for dy, weight in zip(dy_TO, ctx.weights, strict=True):
            values = weight.values().to(dy.dtype)
            part_TN = dy @ values if counts_E is None else grouped_linear(dy, values.mT, counts_E)
            dx_TN = part_TN if dx_TN is None else dx_TN + part_TN
        return dx_TN, None, None
