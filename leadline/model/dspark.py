"""DSpark draft stages (DSpark paper 3; the checkpoints of June 2026 and later): a block of tokens guessed at once.

An MTP block guesses one token more. The stages that took its place guess B tokens in one pass. They consist of

- an entrance: the streams after the target layers of the trunk, averaged over the streams and side by side,

      m_p = norm(W_main [mean_s X_p^(l1); mean_s X_p^(l2); ...])                     for every token of the trunk

- window-only blocks. Their window is not their own past but the trunk's: its key at position p is made of m_p, in each
  stage with its own W_kv. So a stage's window moves along with the trunk and needs no token of a draft;

- a block of B rows behind the last token that the trunk has seen, at position p: the token at p + 1, which is known
  already and is called the anchor, and B - 1 copies of a noise token. Each row sees the W keys up to p and all B rows,
  those behind it too. Row i guesses the token at p + 2 + i;

- heads on the last stage. With h_i the collapse of row i's streams and t_i the token before the one that it guesses
  (the anchor, then the guesses themselves, from left to right):

      logits_i = head(norm(h_i)) + W_2 w_1[t_i]                                      the Markov head, of a low rank
      confidence_i = sigmoid(W_c [h_i; w_1[t_i]])     how likely guess i is right, given that those before it are

Embedding and vocabulary head are the trunk's. The stages are named `mtp.0`, `mtp.1`, ... as the MTP block is.

The keys of a block go where the next tokens' keys will go: into the spare rows of the window's ring. Whatever becomes
of the guesses, there is nothing to take back.

Letters: B rows of a block, Y rank of the Markov head, X rows that a ring keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from leadline.model.block import Block
from leadline.model.cache_format import CacheFormat
from leadline.model.config import ConfigError, ModelConfig
from leadline.model.hyper_connections import StreamHead, spread
from leadline.model.linear import Linear, Norm, linear_fp32
from leadline.model.segment import Segment
from leadline.model.segment_index import SegmentIndex
from leadline.model.state import LayerState
from leadline.ops.rms_norm import rms_norm


@dataclass(frozen=True)
class DSparkConfig:
    """The fields of a configuration that only draft stages have, `dspark_*` in the file.

    block_size: rows of a block, [B]. noise_token_id: what stands where nothing is known. target_layer_ids: the trunk's
    layers that the entrance listens to. markov_rank: [Y]. num_stages: one for each entry of `compress_ratios` behind
    the trunk's.
    """

    block_size: int
    noise_token_id: int
    target_layer_ids: tuple[int, ...]
    markov_rank: int
    num_stages: int

    @classmethod
    def of(cls, config: ModelConfig) -> DSparkConfig:
        """Read the fields; ConfigError names the one that is missing or breaks a rule."""
        targets = config.extra.get("dspark_target_layer_ids")
        layers, last = range(config.num_hidden_layers), config.num_hidden_layers - 1
        if not isinstance(targets, list) or not targets or not all(_is_in(layer, layers) for layer in targets):
            raise ConfigError(
                f"config field 'dspark_target_layer_ids' = {targets!r}: must be a list of layers, 0 to {last}"
            )
        if not config.mtp_ratios:
            raise ConfigError(
                "config field 'compress_ratios': must have an entry for each draft stage behind those of the layers"
            )
        return cls(
            block_size=_number(config, "dspark_block_size", range(1, config.sliding_window + 1)),
            noise_token_id=_number(config, "dspark_noise_token_id", range(config.vocab_size)),
            target_layer_ids=tuple(cast("list[int]", targets)),
            markov_rank=_number(config, "dspark_markov_rank", range(1, config.vocab_size + 1)),
            num_stages=len(config.mtp_ratios),
        )


def _number(config: ModelConfig, name: str, allowed: range) -> int:
    value = config.extra.get(name)
    if not _is_in(value, allowed):
        raise ConfigError(f"config field '{name}' = {value!r}: must be a number from {allowed[0]} to {allowed[-1]}")
    return cast("int", value)


def _is_in(value: Any, allowed: range) -> bool:
    return type(value) is int and value in allowed


class MarkovHead(nn.Module):
    """What one token makes likely or unlikely behind it: tables w1 [V, Y] and w2 [V, Y]."""

    def __init__(self, vocabulary: int, rank: int):
        super().__init__()
        # nn.Embedding would draw its numbers, to be overwritten at once
        self.markov_w1 = nn.Embedding(vocabulary, rank, _weight=torch.empty(vocabulary, rank))
        self.markov_w2 = Linear(rank, vocabulary)

    def forward(self, embedded_NY: Tensor) -> Tensor:
        """What is added to the logits, FP32 [N, V], behind tokens whose rows of w1 are given."""
        return linear_fp32(embedded_NY, self.markov_w2.weight)


class ConfidenceHead(nn.Module):
    """A logit from a row's vector and the token before its guess; weight [1, D + Y]."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.proj = Linear(width + rank, 1)


class DraftStage(Block):
    """A window-only block (`Block`), with the entrance if it is the first stage and the heads if it is the last."""

    def __init__(self, config: ModelConfig, dspark: DSparkConfig, *, first: bool, last: bool):
        super().__init__(config, ratio=0, hashed=False)
        width = config.hidden_size
        if first:
            self.main_proj = Linear(len(dspark.target_layer_ids) * width, width)
            self.main_norm = Norm(width)
        if last:
            self.norm = Norm(width)
            self.hc_head = StreamHead(config)
            self.markov_head = MarkovHead(config.vocab_size, dspark.markov_rank)
            self.confidence_head = ConfidenceHead(width, dspark.markov_rank)


class DSpark(nn.ModuleList):
    """All draft stages of a model, in their order."""

    def __init__(self, config: ModelConfig):
        dspark = DSparkConfig.of(config)
        last = dspark.num_stages - 1
        super().__init__(
            DraftStage(config, dspark, first=number == 0, last=number == last) for number in range(last + 1)
        )
        self.config, self.num_streams, self.eps = dspark, config.hc_mult, config.rms_norm_eps

    @property
    def _stages(self) -> list[DraftStage]:
        return cast("list[DraftStage]", list(self))

    def listens_to(self, layer: int) -> bool:
        """Whether the entrance takes in what this layer of the trunk gives."""
        return layer in self.config.target_layer_ids

    @staticmethod
    def feature(x_TSD: Tensor, index: SegmentIndex) -> Tensor:
        """What the entrance takes in of a layer's streams: their mean, [X, D], of the X rows that a ring keeps."""
        return x_TSD[index.ring.keep_new].mean(1)

    def take_in(
        self,
        features: Sequence[Tensor],
        index: SegmentIndex,
        state: Sequence[LayerState],
        cache_format: CacheFormat,
    ) -> None:
        """Move the windows of all stages along with the trunk's.

        features: the `feature` of each target layer, in the layers' order. index: of the trunk's pass. state: one for
        each stage, updated in place.
        """
        entrance, rows_X = self._stages[0], index.ring.keep_new
        main_XD = rms_norm(entrance.main_proj(torch.cat(list(features), dim=-1)), entrance.main_norm.weight, self.eps)
        cos, sin = index.rotation(0)
        rotation = cos[rows_X], sin[rows_X]
        for stage, layer_state in zip(self._stages, state, strict=True):
            layer_state.keep(stage.attn.keys(main_XD, rotation, cache_format), index.ring)

    def block(self, anchors: Segment) -> Segment:
        """The segment of the blocks that begin with one anchor of each sequence: B tokens of each."""
        tokens_NB = anchors.tokens_T[:, None].repeat(1, self.config.block_size)
        tokens_NB[:, 1:] = self.config.noise_token_id
        lengths = (self.config.block_size,) * len(anchors.lengths)
        return Segment(tokens_NB.flatten(), lengths, anchors.past, anchors.slots)

    def forward(
        self, embedding_TD: Tensor, index: SegmentIndex, state: Sequence[LayerState], cache_format: CacheFormat
    ) -> Tensor:
        """h [N, B, D] of the rows of N blocks, given their embeddings and their index (`draft_block=True`)."""
        x_TSD = spread(embedding_TD, self.num_streams)
        for stage, layer_state in zip(self._stages, state, strict=True):
            x_TSD, _ = stage(x_TSD, index, layer_state, cache_format)
        return self._stages[-1].hc_head(x_TSD).unflatten(0, (-1, self.config.block_size))

    def hidden(self, h_NBD: Tensor) -> Tensor:
        """What the vocabulary head takes, [N, B, D]."""
        return rms_norm(h_NBD, self._stages[-1].norm.weight, self.eps)

    def markov_bias(self, previous_N: Tensor) -> Tensor:
        """W_2 w_1[t], FP32 [N, V], behind some tokens."""
        head = self._stages[-1].markov_head
        return head(head.markov_w1(previous_N))

    def confidence(self, h_NBD: Tensor, previous_NB: Tensor) -> Tensor:
        """sigmoid(W_c [h; w_1[t]]), FP32 [N, B] (DSpark paper, equation 7): how likely each guess is right, given that
        those before it are. previous_NB: the token before each guess."""
        last = self._stages[-1]
        x_NBX = torch.cat([h_NBD, last.markov_head.markov_w1(previous_NB)], dim=-1)
        return linear_fp32(x_NBX, last.confidence_head.proj.weight).squeeze(-1).sigmoid()
