"""Newton-Schulz iteration: the nearest matrix with orthonormal rows or columns."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.ops.dispatch import use_kernel
from leadline.ops.newton_schulz import reference


@torch.no_grad()
def newton_schulz(x_BNM: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """O = U V^T for every x = U S V^T: all singular values become 1 (report 2.4, Algorithm 1).

    X_0 = x / |x|_F, then 10 times X <- a X + b (X X^T) X + c (X X^T)^2 X, eight times with (3.4445, -4.7750, 2.0315)
    and twice with (2, -1.5, 0.5).

    x_BNM: B matrices of N rows and M columns (letters of this op alone), any float dtype. dtype: that of the
    multiplications, where None means float64 for float64 input, else bfloat16 on CUDA and float32 elsewhere; the report
    finds bfloat16 sufficient. Sums are FP32 or wider, and every product is rounded to dtype. The norm is always taken
    in at least float32, after division by the largest element, so neither tiny nor huge matrices lose their direction.
    Returns [B, N, M] in the dtype of x; x is not changed.

    In float32, singular values of at least 3e-5 |x|_F come out within [0.998, 1.003]; smaller ones come out smaller,
    down to an all-zero matrix, which gives zeros. In bfloat16 rounding widens this to [0.995, 1.006] for those above
    1e-3 |x|_F. NaN and infinity give NaN, in their own matrix only. No gradient passes through.
    """
    if x_BNM.ndim != 3 or 0 in x_BNM.shape[1:] or not x_BNM.is_floating_point():
        raise ValueError(f"newton_schulz takes float matrices [B, N, M], got {x_BNM.dtype} {tuple(x_BNM.shape)}")
    if dtype is None:
        fast = torch.bfloat16 if x_BNM.is_cuda else torch.float32
        dtype = torch.float64 if x_BNM.dtype == torch.float64 else fast
    if use_kernel("newton_schulz", x_BNM):
        from leadline.ops.newton_schulz import kernel

        if kernel.takes(x_BNM, dtype):
            return kernel.newton_schulz(x_BNM, dtype)
    return reference.newton_schulz(x_BNM, dtype)
