"""One update: forward, losses, backward, clip, optimiser, selection bias."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from leadline.model.segment import Segment
from leadline.model.signals import Training
from leadline.model.transformer import Transformer
from leadline.ops.select_topk import NonFiniteScoresError
from leadline.optim.clip import clip_gradients
from leadline.train.balance import update_selection_bias
from leadline.train.health import FirstBadOutput, NonFiniteLossError, check_loss, first_bad_tensor
from leadline.train.losses import Losses, LossWeights, compute_losses


@dataclass(frozen=True)
class StepResult:
    """Means over the microbatches, as plain numbers; counts_LE and recall are summed and joined."""

    next_token: float
    extra_token: float
    balance: float
    indexer: float
    grad_norm: float
    recall: float | None
    counts_LE: Tensor


def train_step(
    model: Transformer,
    optimizers: Sequence[torch.optim.Optimizer],
    microbatches: Sequence[tuple[Segment, Tensor]],
    *,
    weights: LossWeights,
    training: Training,
    clip_norm: float,
    bias_speed: float,
) -> StepResult:
    """Update the model once from some microbatches of (segment, next-token targets).

    A loss or gradient that is not finite raises before anything is changed, and names the first bad tensor.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    results = []
    for segment, targets_T in microbatches:
        losses = _finite_losses(model, segment, targets_T, weights, training)
        (losses.total / len(microbatches)).backward()
        results.append(losses)
    grad_norm = clip_gradients(model.named_parameters(), clip_norm)
    for optimizer in optimizers:
        optimizer.step()
    counts_LE = torch.stack([losses.counts_LE for losses in results]).sum(0)
    update_selection_bias(model, counts_LE, bias_speed)
    return _summary(results, grad_norm, counts_LE)


def _finite_losses(
    model: Transformer, segment: Segment, targets_T: Tensor, weights: LossWeights, training: Training
) -> Losses:
    """`compute_losses`; a number that is not finite raises NonFiniteLossError with the first tensor that was bad."""
    try:
        losses = compute_losses(model, segment, targets_T, weights, training)
        check_loss(
            losses.total,
            {
                "next-token": losses.next_token,
                "extra-token": losses.extra_token,
                "indexer": losses.indexer,
                "balance": losses.balance,
            },
        )
    except (NonFiniteScoresError, NonFiniteLossError) as error:
        culprit = first_bad_tensor(model)
        if culprit is None:
            with torch.no_grad(), FirstBadOutput(model) as finder, suppress(NonFiniteScoresError):
                compute_losses(model, segment, targets_T, weights, training)
            culprit = finder.found or "none outside of the losses"
        raise NonFiniteLossError(f"{error}; first bad tensor: {culprit}; no update was made") from None
    return losses


def _summary(results: Sequence[Losses], grad_norm: float, counts_LE: Tensor) -> StepResult:
    recall = torch.cat([losses.recall for losses in results])
    count = len(results)
    return StepResult(
        next_token=sum(float(losses.next_token) for losses in results) / count,
        extra_token=sum(float(losses.extra_token) for losses in results) / count,
        balance=sum(float(losses.balance) for losses in results) / count,
        indexer=sum(float(losses.indexer) for losses in results) / count,
        grad_norm=grad_norm,
        recall=float(recall.mean()) if len(recall) else None,
        counts_LE=counts_LE,
    )
