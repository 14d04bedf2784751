"""The lightning indexer (report 2.3.1): scores all entries cheaply and picks the few that a query attends to.

    score(t, c) = sum_j w_tj ReLU(q_tj . k_c),      picks = the M largest among the visible entries

It has its own narrow heads (J of width I), one shared key per entry from its own compressor, and a weight per head and
token. The query comes from the same low-rank latent as the attention's.

Nothing of this is differentiable through the picks, so the indexer has its own loss (`ops.indexer_loss`) and its
inputs are detached: it learns to follow the attention and never steers it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from leadline.formats.cache_entry import PackedKeys
from leadline.model.cache_format import CacheFormat
from leadline.model.compressor import Compressor
from leadline.model.config import CSA_RATIO, ModelConfig
from leadline.model.linear import Linear, linear_fp32
from leadline.model.segment_index import SegmentIndex
from leadline.model.state import CompressorState
from leadline.ops.cache_rows import Source
from leadline.ops.decode_indexer import decode_pick_entries
from leadline.ops.lightning_indexer import pick_entries
from leadline.ops.norm_rope import norm_rope


class IndexOperands(NamedTuple):
    """What the scores are made of: q [T, J, I], weight FP32 [T, J], keys [C, I] or the store that holds them."""

    q_TJI: Tensor
    weight_TJ: Tensor
    keys: Source


class Indexer(nn.Module):
    """wq_b [J I, Q], weights_proj [J, D], and a ratio-4 compressor of width I."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.width, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.width)
        self.weights_proj = Linear(config.hidden_size, self.heads)
        self.compressor = Compressor(config, CSA_RATIO, self.width)

    def operands(
        self,
        x_TD: Tensor,
        q_latent_TQ: Tensor,
        index: SegmentIndex,
        state: CompressorState | None,
        cache_format: CacheFormat,
    ) -> IndexOperands:
        """Queries, head weights and keys; updates the state."""
        x_TD, q_latent_TQ = x_TD.detach(), q_latent_TQ.detach()
        q_TJI = self.wq_b(q_latent_TQ).unflatten(-1, (self.heads, self.width))
        q_TJI = norm_rope(q_TJI, *index.rotation(CSA_RATIO), rounding=cache_format.index)
        weight_TJ = linear_fp32(x_TD, self.weights_proj.weight, self.width**-0.5 * self.heads**-0.5)
        return IndexOperands(q_TJI, weight_TJ, self.compressor(x_TD, index, state, cache_format.index))

    def pick(self, operands: IndexOperands, index: SegmentIndex) -> Tensor:
        """The entries each query attends to, [T, M], -1 = no pick: numbers within its sequence, or, where they are
        looked up, rows of the store."""
        q_TJI, weight_TJ, keys = operands
        if index.lookup is None:
            assert isinstance(keys, Tensor)
            return pick_entries(q_TJI, weight_TJ, keys, index.reach(CSA_RATIO), self.topk)
        assert not isinstance(keys, PackedKeys)
        pages_NP, visible_T = index.lookup.pages_NP, index.lookup.visible_T
        _, rows_TM = decode_pick_entries(
            q_TJI, weight_TJ, keys, pages_NP, index.segment.sequence_T, visible_T, self.topk
        )
        return rows_TM
