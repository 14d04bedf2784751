"""Grouped linear: each run of rows times its own matrix, as the experts need it."""

from __future__ import annotations

from torch import Tensor

from leadline.ops.dispatch import is_batch_invariant, use_kernel
from leadline.ops.grouped_linear import reference
from leadline.ops.grouped_linear.reference import GroupedLinear


def grouped_linear(x_XD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """y[rows of expert e] = x[rows of expert e] @ weight[e]^T.

    x_XD: [X, D], rows sorted by expert. weight_EFD: [E, F, D]. counts_E: int64 [E], rows of each expert, sum X.
    Returns [X, F] in the dtype of x. Differentiable in x and weight; an expert without rows gets a zero gradient. On
    CUDA the host does not know the counts: bfloat16 with D and F divisible by 8 runs as the library's grouped product,
    anything else as plain tiles, and so does everything inside of `batch_invariant`.
    """
    if use_kernel("grouped_linear", x_XD):
        from leadline.ops.grouped_linear import kernel, tiled_kernel

        # The library may choose its tiles by the number of rows.
        takes = kernel.takes(x_XD, weight_EFD) and not is_batch_invariant()
        return (kernel if takes else tiled_kernel).GroupedLinear.apply(x_XD, weight_EFD, counts_E)
    return GroupedLinear.apply(x_XD, weight_EFD, counts_E)


def grouped_weight_gradient(dy_XF: Tensor, x_XD: Tensor, counts_E: Tensor) -> Tensor:
    """dW[e] = dy[rows of expert e]^T @ x[rows of expert e], [E, F, D]: the gradient of `grouped_linear` alone, for
    products whose forward is another one. dy and x of one dtype, which is that of the result; zero without rows."""
    if use_kernel("grouped_linear", x_XD):
        from leadline.ops.grouped_linear import kernel, tiled_kernel

        dy_XF, x_XD = dy_XF.contiguous(), x_XD.contiguous()
        if kernel.takes(x_XD, dy_XF[..., None]):
            return kernel.weight_gradient(dy_XF, x_XD, kernel.ends(counts_E))
        return tiled_kernel.weight_gradient(dy_XF, x_XD, counts_E)
    return reference.weight_gradient(dy_XF, x_XD, counts_E)
