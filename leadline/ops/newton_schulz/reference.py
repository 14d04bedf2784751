"""Newton-Schulz in plain PyTorch.

An odd polynomial of X acts on each singular value alone: X = U S V^T gives a X + b X X^T X + c (X X^T)^2 X = U (a S +
b S^3 + c S^5) V^T. The first coefficients are chosen for speed: their slope 3.4445 at zero lifts a singular value of
3e-5 to the order of 1 in eight rounds, but they never settle: values wander between 0.57 and 1.20. The last two rounds
have p(1) = 1 and p'(1) = 0: an error e near 1 becomes e^2 / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.ops.precision import wide

COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2


def newton_schulz(x_BNM: Tensor, dtype: torch.dtype) -> Tensor:
    """The contract of the public function, with the dtype of the multiplications given."""
    rows, columns = x_BNM.shape[-2:]
    # X X^T is the smaller of the two Gram matrices when X is not taller than wide.
    x = x_BNM.mT if rows > columns else x_BNM
    x = _unit_norm(x).to(dtype)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    x = x.mT if rows > columns else x
    return x.to(x_BNM.dtype)


def _unit_norm(x: Tensor) -> Tensor:
    """Each matrix divided by its Frobenius norm; zeros stay zeros."""
    x = wide(x)
    # Squares of elements below 1e-23 vanish in float32, so bring the largest element to 1 first.
    x = x / _or_one(x.abs().amax(dim=(-2, -1), keepdim=True))
    return x / _or_one(torch.linalg.matrix_norm(x, keepdim=True))


def _or_one(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, 1, divisor)
