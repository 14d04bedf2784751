"""One update: forward, losses, backward, clip, optimiser, selection bias."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from leadline.model.segment import Segment
from leadline.model.signals import Training
from leadline.model.transformer import Transformer
from leadline.ops.select_topk import NonFiniteScoresError
from leadline.optim.clip import clip_gradients
from leadline.train.balance import largest_bias, update_selection_bias
from leadline.train.health import FirstBadOutput, NonFiniteLossError, check_loss, first_bad_tensor
from leadline.train.losses import Losses, LossWeights, compute_losses

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class StepResult:
    """Means over the microbatches, as plain numbers; counts_LE is summed, recall joined before its mean."""

    next_token: float
    extra_token: float
    balance: float
    indexer: float
    grad_norm: float  # before clipping
    clip_scale: float  # what the gradients were multiplied with, at most 1
    bias_largest: float  # largest absolute selection bias after the update
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
    parameters = list(model.parameters())

    def gradients(batch: tuple[Segment, Tensor]) -> tuple[Losses, tuple[Tensor | None, ...]]:
        losses = _finite_losses(model, *batch, weights, training)
        return losses, torch.autograd.grad(losses.total / len(microbatches), parameters, allow_unused=True)

    model.zero_grad(set_to_none=True)
    results = []
    for losses, grads in _side_by_side(gradients, microbatches, parameters[0].device):
        results.append(losses)
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
    grad_norm = clip_gradients(model.named_parameters(), clip_norm)
    for optimizer in optimizers:
        optimizer.step()
    counts_LE = torch.stack([losses.counts_LE for losses in results]).sum(0)
    update_selection_bias(model, counts_LE, bias_speed)
    return _summary(results, grad_norm, min(1.0, clip_norm / max(grad_norm, 1e-30)), largest_bias(model), counts_LE)


def _side_by_side(function: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> Iterator[Result]:
    """`map`, in order; on a CPU the items share the cores, each with its own.

    Cores that work on different microbatches never wait for each other. Cores that share every small operation of one
    do, thousands of times a step, and where another program takes a core for a moment, all of them stand still. The
    result is the same bit for bit: what is summed, and in which order, does not depend on who was first.
    """
    threads = torch.get_num_threads()
    workers = min(len(items), threads) if device.type == "cpu" else 1
    if workers == 1:
        yield from map(function, items)
        return
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            yield from pool.map(function, items)
    finally:
        torch.set_num_threads(threads)  # part of the setting is shared by all threads


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


def _summary(
    results: Sequence[Losses], grad_norm: float, clip_scale: float, bias_largest: float, counts_LE: Tensor
) -> StepResult:
    recall = torch.cat([losses.recall for losses in results])
    count = len(results)
    return StepResult(
        next_token=sum(float(losses.next_token) for losses in results) / count,
        extra_token=sum(float(losses.extra_token) for losses in results) / count,
        balance=sum(float(losses.balance) for losses in results) / count,
        indexer=sum(float(losses.indexer) for losses in results) / count,
        grad_norm=grad_norm,
        clip_scale=clip_scale,
        bias_largest=bias_largest,
        recall=float(recall.mean()) if len(recall) else None,
        counts_LE=counts_LE,
    )
