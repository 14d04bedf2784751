"""Global gradient clipping, and the guard against gradients that are not finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class NonFiniteGradientError(ValueError):
    """A gradient holds NaN or infinity; the message names the first such tensor."""


def clip_gradients(named_parameters: Iterable[tuple[str, Tensor]], max_norm: float) -> float:
    """Scale all gradients in place so that their joint L2 norm is at most `max_norm`; return the norm before scaling.

    Parameters without a gradient are passed over; with none at all the norm is 0. The norm is accumulated in float64,
    so it overflows for no finite gradient. Raises NonFiniteGradientError, with nothing scaled, if any element is NaN
    or infinite: an optimiser must not see such a gradient, because its moments would never recover. Waits for the
    device once.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm {max_norm} must be positive")
    gradients = {name: parameter.grad for name, parameter in named_parameters if parameter.grad is not None}
    if not gradients:
        return 0.0
    norms = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in gradients.values()]).tolist()
    total = sum(norm * norm for norm in norms) ** 0.5
    if not total < float("inf"):
        name = next(name for name, norm in zip(gradients, norms, strict=True) if not norm < float("inf"))
        raise NonFiniteGradientError(_describe(name, gradients[name]))
    if total > max_norm:
        for grad in gradients.values():
            grad.mul_(max_norm / total)
    return total


def _describe(name: str, grad: Tensor) -> str:
    nans, infinities = int(grad.isnan().sum()), int(grad.isinf().sum())
    return (
        f"gradient of {name} {tuple(grad.shape)} is not finite: {nans} NaN and {infinities} infinite of {grad.numel()} "
        f"elements; no update was made"
    )
