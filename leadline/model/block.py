"""A block (report 2): streams around attention, then streams around the experts."""

from __future__ import annotations

from torch import Tensor, nn

from leadline.model.attention import Attention
from leadline.model.cache_format import CacheFormat
from leadline.model.config import ModelConfig
from leadline.model.hyper_connections import HyperConnection
from leadline.model.linear import Norm
from leadline.model.moe import MoE
from leadline.model.segment_index import SegmentIndex
from leadline.model.signals import BlockSignals, Training
from leadline.model.state import LayerState


class Block(nn.Module):
    def __init__(self, config: ModelConfig, ratio: int, hashed: bool):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.hc_attn = HyperConnection(config)
        self.attn_norm = Norm(config.hidden_size)
        self.attn = Attention(config, ratio)
        self.hc_ffn = HyperConnection(config)
        self.ffn_norm = Norm(config.hidden_size)
        self.ffn = MoE(config, hashed)

    def forward(
        self,
        x_TSD: Tensor,
        index: SegmentIndex,
        state: LayerState | None,
        cache_format: CacheFormat,
        training: Training | None = None,
    ) -> tuple[Tensor, BlockSignals | None]:
        x_TSD, y_TD, post_TS, comb_TSS = self.hc_attn.mix_in(x_TSD, self.attn_norm)
        y_TD, indexer = self.attn(y_TD, index, state, cache_format, training)
        x_TSD = self.hc_attn.mix_out(x_TSD, y_TD, post_TS, comb_TSS)

        x_TSD, y_TD, post_TS, comb_TSS = self.hc_ffn.mix_in(x_TSD, self.ffn_norm)
        y_TD, experts = self.ffn(y_TD, index.segment, training is not None)
        x_TSD = self.hc_ffn.mix_out(x_TSD, y_TD, post_TS, comb_TSS)
        return x_TSD, None if experts is None else BlockSignals(experts, indexer)
