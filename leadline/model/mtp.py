"""Multi-token prediction (report 2.1): one more block that predicts the token after the next.

At position i it takes the trunk's streams BEFORE their last collapse, and the embedding of token i + 1:

    X = e_proj(norm(embedding_{i+1})) spread over the streams + h_proj(norm(X_trunk)) per stream

runs one window-only block with its own hyper-connections and score-routed experts, and ends in its own stream head and
norm; embedding and vocabulary head are the trunk's. Its logits at position i are for token i + 2.
"""

from __future__ import annotations

from torch import Tensor

from leadline.model.block import Block
from leadline.model.cache_format import CacheFormat
from leadline.model.config import ModelConfig
from leadline.model.hyper_connections import StreamHead
from leadline.model.linear import Linear, Norm
from leadline.model.segment_index import SegmentIndex
from leadline.model.signals import BlockSignals, Training
from leadline.model.state import LayerState
from leadline.ops.rms_norm import rms_norm


class MTPBlock(Block):
    """A window-only block (`Block`) with the input projections and the ends of its own."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, ratio=0, hashed=False)
        self.e_proj = Linear(config.hidden_size, config.hidden_size)
        self.h_proj = Linear(config.hidden_size, config.hidden_size)
        self.enorm = Norm(config.hidden_size)
        self.hnorm = Norm(config.hidden_size)
        self.norm = Norm(config.hidden_size)
        self.hc_head = StreamHead(config)

    def predict(
        self,
        trunk_TSD: Tensor,
        next_embedding_TD: Tensor,
        index: SegmentIndex,
        state: LayerState | None,
        cache_format: CacheFormat,
        training: Training | None = None,
    ) -> tuple[Tensor, BlockSignals | None]:
        """Hidden vectors [T, D] for the vocabulary head, given streams [T, S, D] and the next embeddings [T, D]."""
        if trunk_TSD.ndim != 3:
            raise ValueError(
                f"the MTP block needs the streams [T, S, D] before their collapse, got {tuple(trunk_TSD.shape)}"
            )
        x_TSD, signals = self(self.enter(trunk_TSD, next_embedding_TD), index, state, cache_format, training)
        return self.leave(x_TSD), signals

    def enter(self, trunk_TSD: Tensor, next_embedding_TD: Tensor) -> Tensor:
        """The streams [T, S, D] that go into the block."""
        embedded_TD = self.e_proj(rms_norm(next_embedding_TD, self.enorm.weight, self.eps))
        return embedded_TD[:, None] + self.h_proj(rms_norm(trunk_TSD, self.hnorm.weight, self.eps))

    def leave(self, x_TSD: Tensor) -> Tensor:
        """Hidden vectors [T, D] from the streams behind the block."""
        return rms_norm(self.hc_head(x_TSD), self.norm.weight, self.eps)
