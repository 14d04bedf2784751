"""Cross entropy over the vocabulary that never holds the logits of all tokens."""

from __future__ import annotations

from torch import Tensor

from leadline.ops.cross_entropy.reference import CrossEntropy
from leadline.ops.dispatch import use_kernel


def cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """nll_t = logsumexp(W h_t) - (W h_t)[target_t] in nats, FP32 [T]; 0 where the target is -1.

    hidden_TD: [T, D]; weight_VD: the head, [V, D]; targets_T: int64, -1 = no target. Logits are FP32 and exist for one
    tile of tokens or of the vocabulary at a time, in the forward and in the backward. Differentiable in hidden and
    weight. The kernel multiplies in the dtype of hidden and weight with FP32 sums, and rounds the gradients of the
    logits to it, where the reference multiplies in FP32.
    """
    if use_kernel("cross_entropy", hidden_TD):
        from leadline.ops.cross_entropy import kernel

        return kernel.CrossEntropy.apply(hidden_TD, weight_VD, targets_T)
    return CrossEntropy.apply(hidden_TD, weight_VD, targets_T)
