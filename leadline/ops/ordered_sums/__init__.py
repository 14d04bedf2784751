"""Ordered sums: products and sums along rows, each added up in an order that depends on its own length alone.

Libraries choose the order by the shape of the whole; these do not, and `ops/invariance.py` is built on them. The
letters: b matrices, each with X rows, N summands and O columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.ops.dispatch import KernelError, use_kernel
from leadline.ops.ordered_sums import reference


def ordered_bmm(a_bXN: Tensor, w_bNO: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """y_bxo = sum_n a_bxn w_bno, FP32 sums rounded once to `dtype`, that of a by default; [b, X, O].

    a and w are of one dtype and may have any strides, 0 among them. On CUDA the bits of a number of the result depend
    on its row of a and its column of w, on N, O and the dtype, and neither on b and X nor on where the row stands. On
    the CPU they may depend on X, but not on b. Differentiable in a and w.
    """
    if has_kernel(a_bXN):
        from leadline.ops.ordered_sums import kernel

        return kernel.OrderedProduct.apply(a_bXN, w_bNO, dtype or a_bXN.dtype)
    return reference.ordered_bmm(a_bXN, w_bNO, dtype or a_bXN.dtype)


def ordered_sum(x: Tensor) -> Tensor:
    """The sum over the last axis of x [..., N], in FP32 (float64 where x is), rounded once to the dtype of x.

    The bits of a sum depend on its row alone. Differentiable.
    """
    if has_kernel(x):
        from leadline.ops.ordered_sums import kernel

        return kernel.OrderedSum.apply(x)
    return reference.ordered_sum(x)


def has_kernel(x: Tensor) -> bool:
    """Whether the kernels add up what lies where x does. On CUDA they must, because torch's own sums are not ordered
    there: KernelError when they cannot."""
    chosen = use_kernel("ordered_sums", x)
    if x.is_cuda and not chosen:
        raise KernelError(
            f"batch invariance: no kernel for {x.dtype} on {x.device}: it needs Triton and at most 32 bits a number, "
            "and no implementation('reference') around it"
        )
    return chosen
