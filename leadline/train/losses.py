"""The training losses (report 2.1, 2.3.1, 4.2.2), each a named number.

    total = next token + mtp_weight x extra token + balance_weight x balance + index_weight x indexer

The indexer's loss reaches only the indexer (its inputs are detached) and the other losses never reach it, so
`index_weight` is a matter of learning rate alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leadline.model.segment import Segment
from leadline.model.signals import BlockSignals, Training
from leadline.model.transformer import Transformer
from leadline.ops.cross_entropy import cross_entropy


@dataclass(frozen=True)
class LossWeights:
    """mtp: 0.3, and 0.1 once the learning rate decays; balance: 1e-4 (report 4.2.2). index: own choice."""

    mtp: float = 0.3
    balance: float = 1e-4
    index: float = 1.0


@dataclass(frozen=True)
class Losses:
    """total: scalar to differentiate. The rest is for the log, without gradient.

    next_token, extra_token: mean nats per scored token. balance, indexer: means over the layers that have one; an
    absent kind is 0. nll_sum: summed nats of the next-token loss, for bits per byte. recall: all measured queries of
    all CSA layers. counts_LE: tokens sent to each expert, one row per block, the MTP block last.
    """

    total: Tensor
    next_token: Tensor
    extra_token: Tensor
    balance: Tensor
    indexer: Tensor
    nll_sum: Tensor
    scored_tokens: int
    recall: Tensor
    counts_LE: Tensor


def second_targets(segment: Segment, targets_T: Tensor) -> Tensor:
    """The token after each target: targets shifted by one inside every sequence, -1 where there is none."""
    shifted_T = torch.cat([targets_T[1:], targets_T.new_full((1,), -1)])
    last_T = torch.cat(
        [segment.sequence_T[1:] != segment.sequence_T[:-1], torch.ones_like(segment.sequence_T[:1]).bool()]
    )
    return torch.where(last_T | (targets_T < 0), -1, shifted_T)


def compute_losses(
    model: Transformer, segment: Segment, targets_T: Tensor, weights: LossWeights, training: Training
) -> Losses:
    """Forward of trunk and MTP block, and every loss of it. targets_T: the next token of each position, -1 = none."""
    output = model(segment, training=training)
    nll_T = cross_entropy(model.hidden(output.streams_TSD), model.head.weight, targets_T)
    scored = int((targets_T >= 0).sum())
    next_token = nll_T.sum() / max(scored, 1)

    signals: list[BlockSignals] = list(output.signals)
    extra_token = next_token.new_zeros(())
    if model.mtp:
        second_T = second_targets(segment, targets_T)
        # A position without a next token is the last of its sequence: what it is fed reaches no scored position.
        hidden_TD, mtp_signals = model.predict_second(output, targets_T.clamp_min(0), training=training)
        extra_token = cross_entropy(hidden_TD, model.head.weight, second_T).sum() / (second_T >= 0).sum().clamp_min(1)
        if mtp_signals is not None:
            signals.append(mtp_signals)

    zero = next_token.new_zeros(())
    score_routed = [s.experts.balance_loss for s in signals if s.experts.balance_loss.requires_grad]
    balance = torch.stack(score_routed).mean() if score_routed else zero
    indexers = [s.indexer for s in signals if s.indexer is not None]
    index_loss = torch.stack([s.kl for s in indexers]).mean() if indexers else zero
    total = next_token + weights.mtp * extra_token + weights.balance * balance + weights.index * index_loss
    return Losses(
        total=total,
        next_token=next_token.detach(),
        extra_token=extra_token.detach(),
        balance=balance.detach(),
        indexer=index_loss.detach(),
        nll_sum=nll_T.detach().sum(),
        scored_tokens=scored,
        recall=torch.cat([s.recall for s in indexers]) if indexers else zero.detach()[None][:0],
        counts_LE=torch.stack([s.experts.counts_E for s in signals]),
    )
