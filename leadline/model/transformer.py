"""The whole model: embedding, S residual streams, blocks, head.

    model = Transformer(config)
    out = model(Segment.of(prompt), state)              new tokens given what the state holds
    logits = model.logits(model.hidden(out.streams_TSD))     only for the rows you ask for

Training, prefill, chunked prefill and decoding are this one call; see `segment.py` and `state.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from leadline.model.block import Block
from leadline.model.cache_format import EXACT, CacheFormat
from leadline.model.config import ModelConfig
from leadline.model.dspark import DSpark
from leadline.model.hyper_connections import StreamHead, spread
from leadline.model.linear import Linear, Norm, linear_fp32
from leadline.model.mtp import MTPBlock
from leadline.model.rotary import Rotary
from leadline.model.segment import Segment
from leadline.model.segment_index import SegmentIndex
from leadline.model.signals import BlockSignals, Training
from leadline.model.state import State
from leadline.ops.rms_norm import rms_norm


@dataclass(frozen=True)
class Output:
    """streams_TSD: the residual streams after the last block. index: row indices of the segment, to be given to the MTP
    block. signals: one per block when training, else empty."""

    streams_TSD: Tensor
    index: SegmentIndex
    signals: list[BlockSignals]


@dataclass(frozen=True)
class DraftBlocks:
    """What the draft stages say of B tokens behind each of N sequences. h_NBD: for the confidence head. logits_NBV:
    FP32, still without the Markov head's part, which depends on the guesses."""

    h_NBD: Tensor
    logits_NBV: Tensor


class Transformer(nn.Module):
    """DeepSeek-V4. Parameters are allocated, not initialised: load weights, or call `init.initialize`.

    with_mtp: whether the MTP blocks exist, or the draft stages where the configuration has them in their place; the
    former are needed for training and speculation only, the latter for speculation only.
    """

    def __init__(self, config: ModelConfig, *, cache_format: CacheFormat = EXACT, with_mtp: bool = True):
        super().__init__()
        self.config, self.cache_format, self.rotary = config, cache_format, Rotary(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size, _weight=_table(config))
        self.layers = nn.ModuleList(
            Block(config, ratio, config.is_hash_layer(number)) for number, ratio in enumerate(config.layer_ratios)
        )
        self.hc_head = StreamHead(config)
        self.norm = Norm(config.hidden_size)
        self.head = Linear(config.hidden_size, config.vocab_size)
        self.mtp = _extra_blocks(config) if with_mtp else nn.ModuleList()

    def forward(self, segment: Segment, state: State | None = None, training: Training | None = None) -> Output:
        """Streams after the last block for the segment's tokens. The state, when given, is updated in place, with the
        windows of the draft stages if there are some."""
        index = self.index(segment, state)
        x_TSD = spread(self.embed(segment.tokens_T), self.config.hc_mult)
        signals, features = [], []
        stages = None if state is None else self.dspark
        for number, block in enumerate(self.layers):
            layer_state = None if state is None else state.layers[number]
            arguments = (x_TSD, index, layer_state, self.cache_format, training)
            if training is not None and training.recompute:
                x_TSD, block_signals = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_TSD, block_signals = block(*arguments)
            if block_signals is not None:
                signals.append(block_signals)
            if stages is not None and stages.listens_to(number):
                features.append(stages.feature(x_TSD, index))
        if stages is not None and state is not None:
            stages.take_in(features, index, state.mtp, self.cache_format)
        return Output(x_TSD, index, signals)

    def index(self, segment: Segment, state: State | None) -> SegmentIndex:
        """Row indices of a segment; makes room in the state, or says which slot has none."""
        if state is None:
            return SegmentIndex(segment, self.config, None, self.rotary)
        if torch.is_grad_enabled():
            raise ValueError("a state holds no gradients: run under torch.no_grad(), or train without a state")
        weight = self.embed.weight
        if (state.dtype, state.device) != (weight.dtype, weight.device):
            raise ValueError(
                f"the state is {state.dtype} on {state.device}, the model {weight.dtype} on {weight.device}: "
                "build it with the model's dtype and device"
            )
        if state.cache_format.packed != self.cache_format.packed:
            raise ValueError(
                f"the state's cache format is {state.cache_format.name}, the model's {self.cache_format.name}: build "
                "the state with the model's"
            )
        if segment.places_known:
            state.reserve(segment)
        return SegmentIndex(segment, self.config, state.layout, self.rotary)

    def hidden(self, streams_TSD: Tensor) -> Tensor:
        """The streams' collapse and the final norm: [T, D], for all rows or the ones you pass."""
        return rms_norm(self.hc_head(streams_TSD), self.norm.weight, self.config.rms_norm_eps)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """FP32 logits [T, V]."""
        return linear_fp32(hidden_TD, self.head.weight)

    @property
    def dspark(self) -> DSpark | None:
        """The draft stages, if there are some."""
        return self.mtp if isinstance(self.mtp, DSpark) else None

    def draft(self, anchors: Segment, state: State) -> DraftBlocks:
        """The draft stages' guesses of the tokens that follow some sequences.

        anchors: one token of each, the one behind the last that the state has taken in. Of the state, only spare rows
        of the stages' windows change.
        """
        stages = self.dspark
        if stages is None:
            raise ValueError("this model was built without draft stages")
        if state.spare_tokens < stages.config.block_size:
            raise ValueError(
                f"the state has {state.spare_tokens} spare tokens, a block of drafts takes {stages.config.block_size}: "
                "build it with as many"
            )
        segment = stages.block(anchors)
        index = SegmentIndex(segment, self.config, state.layout, self.rotary, draft_block=True)
        h_NBD = stages(self.embed(segment.tokens_T), index, state.mtp, self.cache_format)
        return DraftBlocks(h_NBD, self.logits(stages.hidden(h_NBD)))

    def predict_second(
        self, output: Output, next_tokens_T: Tensor, state: State | None = None, training: Training | None = None
    ) -> tuple[Tensor, BlockSignals | None]:
        """The MTP block: hidden [T, D] whose logits predict the token after `next_tokens_T`. Call it right after
        `forward` with the same segment, so that its window state moves in step with the trunk's."""
        if self.dspark:
            raise ValueError("this model has draft stages in the place of its MTP block: build it with_mtp=False")
        if not self.mtp:
            raise ValueError("this model was built without its MTP block")
        block = self.mtp[0]
        assert isinstance(block, MTPBlock)
        layer_state = None if state is None else state.mtp[0]
        return block.predict(
            output.streams_TSD, self.embed(next_tokens_T), output.index, layer_state, self.cache_format, training
        )


def _extra_blocks(config: ModelConfig) -> nn.ModuleList:
    if config.has_draft_stages:
        return DSpark(config)
    return nn.ModuleList(MTPBlock(config) for _ in range(config.num_nextn_predict_layers))


def _table(config: ModelConfig) -> Tensor:
    # nn.Embedding would draw 129,280 rows of random numbers that are overwritten at once
    return torch.empty(config.vocab_size, config.hidden_size)
