"""What a layer reports besides its output when it is being trained: losses, and numbers worth watching."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Training:
    """How a training forward differs from any other.

    dense: CSA attends to all visible entries (warm-up), while the indexer learns to imitate it.
    recall_queries: how many queries per CSA layer the indexer's recall is measured on; 0 = none.
    recompute: keep only the streams between blocks and run each block again in the backward.
    """

    dense: bool = False
    recall_queries: int = 0
    recompute: bool = False


@dataclass(frozen=True)
class IndexerSignals:
    """kl: the indexer's loss, mean over the queries that see an entry (report 2.3.1; scalar). recall: share of the
    attention mass of the entries that the picks keep, one number per measured query."""

    kl: Tensor
    recall: Tensor


@dataclass(frozen=True)
class ExpertSignals:
    """balance_loss: sequence-wise (report 4.2.2), scalar, 0 on hash layers. counts_E: tokens sent to each expert."""

    balance_loss: Tensor
    counts_E: Tensor


@dataclass(frozen=True)
class BlockSignals:
    experts: ExpertSignals
    indexer: IndexerSignals | None
