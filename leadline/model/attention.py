"""Hybrid attention (report 2.3): a sliding window of raw keys, plus compressed entries of everything before.

One class serves the three kinds of layer, told apart by their compression ratio R:

- R = 0: window only.
- R = 4, Compressed Sparse Attention (CSA): entries of 4 tokens; the lightning indexer picks M of them for each query.
- R = 128, Heavily Compressed Attention (HCA): entries of 128 tokens; every visible one is attended to.

And one path serves training, prefill, chunks and decoding: new tokens come in, the state brings what was before, and

    q_lat = norm(x W_qa),  q_h = unit-RMS(q_lat W_qb)_h,  k = norm(x W_kv)      one key head, which is also the value
    rotate the last R values of q and k at their positions
    o_h = softmax over {window keys} + {entries} + sink
    rotate the last R values of o back at the query's position
    out = concat_g(o_group W_oa^g) W_ob

The rotation back is needed because keys are values: without it, outputs would carry the absolute position of their
keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leadline.formats.cache_entry import PackedIndex
from leadline.model.cache_format import CacheFormat
from leadline.model.compressor import Compressor
from leadline.model.config import CSA_RATIO, HCA_RATIO, ModelConfig
from leadline.model.indexer import Indexer, IndexOperands
from leadline.model.linear import GroupedOutput, Linear, Norm, linears
from leadline.model.rotary import Rotation
from leadline.model.segment_index import SegmentIndex
from leadline.model.signals import IndexerSignals, Training
from leadline.model.state import LayerState
from leadline.ops.beside import Beside
from leadline.ops.cache_rows import Source
from leadline.ops.cache_step import Finish, finished, store_keys
from leadline.ops.decode_attention import decode_attention
from leadline.ops.indexer_loss import indexer_loss, indexer_recall
from leadline.ops.norm_rope import norm_rope
from leadline.ops.rms_norm import rms_norm
from leadline.ops.sparse_attention import sparse_attention


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.heads, self.width = config.num_attention_heads, config.head_dim
        self.groups, self.eps = config.o_groups, config.rms_norm_eps
        self.wq_a = Linear(config.hidden_size, config.q_lora_rank)
        self.q_norm = Norm(config.q_lora_rank)
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.width)
        self.wkv = Linear(config.hidden_size, self.width)
        self.kv_norm = Norm(self.width)
        self.wo_a = GroupedOutput(self.groups, self.heads * self.width // self.groups, config.o_lora_rank)
        self.wo_b = Linear(self.groups * config.o_lora_rank, config.hidden_size)
        self.attn_sink = nn.Parameter(torch.empty(self.heads))
        self.compressor = Compressor(config, ratio, self.width) if ratio else None
        self.indexer = Indexer(config) if ratio == CSA_RATIO else None

    def forward(
        self,
        x_TD: Tensor,
        index: SegmentIndex,
        state: LayerState | None,
        cache_format: CacheFormat,
        training: Training | None = None,
    ) -> tuple[Tensor, IndexerSignals | None]:
        """Attention output [T, D], and the indexer's signals when a CSA layer is being trained."""
        rotation = index.rotation(self.ratio)
        q_latent_TQ, key_TK = linears(x_TD, self.wq_a, self.wkv)
        q_latent_TQ = rms_norm(q_latent_TQ, self.q_norm.weight, self.eps)

        def seen() -> tuple[Source, Source | None]:
            entries = None
            if self.compressor is not None:
                entries = self.compressor(x_TD, index, state.entries if state else None, cache_format.key)
            return self._keys(key_TK, index, state, cache_format), entries

        def picked() -> tuple[IndexOperands | None, Tensor | None]:
            if self.indexer is None:
                return None, None
            operands = self.indexer.operands(x_TD, q_latent_TQ, index, state.index if state else None, cache_format)
            return operands if training else None, self.indexer.pick(operands, index)

        keys_and_entries, operands_and_picks = Beside(seen, x_TD), Beside(picked, x_TD, lane=1)
        q_THK = self.wq_b(q_latent_TQ).unflatten(-1, (self.heads, self.width))
        q_THK = norm_rope(q_THK, *rotation, eps=self.eps)
        (keys, entries), (operands, picked_TM) = keys_and_entries.result(), operands_and_picks.result()
        del keys_and_entries, operands_and_picks

        attended_TM = None if training and training.dense else picked_TM
        o_THK, lse_TH = self._attend(q_THK, keys, entries, attended_TM, index)
        signals = None
        if training and operands is not None and picked_TM is not None:
            assert isinstance(entries, Tensor)
            signals = self._signals(operands, q_THK, entries, lse_TH, picked_TM, index, training)
        del q_THK, operands  # outside of training nobody needs them now, and they are as large as the output
        return self._project(o_THK), signals

    def keys(self, x_TD: Tensor, rotation: Rotation, cache_format: CacheFormat) -> Tensor:
        """Window keys [T, K], rotated at their positions and rounded as the cache keeps them."""
        return finished(self.wkv(x_TD), self._finish(rotation, cache_format))

    def _finish(self, rotation: Rotation, cache_format: CacheFormat) -> Finish:
        """What makes a window key of its product."""
        return Finish(self.kv_norm.weight, self.eps, *rotation, cache_format.key)

    def _keys(self, key_TK: Tensor, index: SegmentIndex, state: LayerState | None, cache_format: CacheFormat) -> Source:
        """The window keys that the queries see, gathered, or the state's own store, of which `index.lookup` names
        rows; the state keeps the new ones."""
        finish = self._finish(index.rotation(self.ratio), cache_format)
        if state is not None and index.lookup is not None:
            store_keys(key_TK, finish, index.ring.keep_ring, state.window.source)
            return state.window.source
        keys_TK = finished(key_TK, finish)
        return keys_TK if state is None else state.with_past(keys_TK, index.ring)

    def _attend(
        self, q_THK: Tensor, keys: Source, entries: Source | None, picked_TM: Tensor | None, index: SegmentIndex
    ) -> tuple[Tensor, Tensor]:
        """o [T, H, K], rotated back, and the log of the denominator [T, H], from what was gathered or from the rows to
        look up."""
        rotation = index.rotation(self.ratio)
        if index.lookup is None:
            assert isinstance(keys, Tensor)
            assert entries is None or isinstance(entries, Tensor)
            reach = index.reach(self.ratio)
            return sparse_attention(q_THK, keys, entries, self.attn_sink, reach, picked_TM, rotation)
        assert not isinstance(keys, PackedIndex)
        assert not isinstance(entries, PackedIndex)
        rows_TM = index.lookup.entries_TP if self.ratio == HCA_RATIO else picked_TM
        return decode_attention(q_THK, keys, index.lookup.window_TW, entries, rows_TM, self.attn_sink, rotation)

    def _project(self, o_THK: Tensor) -> Tensor:
        """Grouped output (report 2.3.3): each group of heads has its own map to L, then all groups together to D."""
        return self.wo_b(self.wo_a(o_THK.flatten(1).unflatten(1, (self.groups, -1))).flatten(1))

    def _signals(
        self,
        operands: IndexOperands,
        q_THK: Tensor,
        entries_CK: Tensor,
        lse_TH: Tensor,
        picked_TM: Tensor,
        index: SegmentIndex,
        training: Training,
    ) -> IndexerSignals:
        reach = index.reach(CSA_RATIO)
        q_TJI, weight_TJ, keys_CI = operands
        assert isinstance(keys_CI, Tensor)
        q_THK, entries_CK = q_THK.detach(), entries_CK.detach()
        kl_T = indexer_loss(
            q_TJI, weight_TJ, keys_CI, q_THK, entries_CK, lse_TH, reach, None if training.dense else picked_TM
        )
        assert reach.visible_T is not None
        sees_T = reach.visible_T > 0
        step = max(1, len(q_THK) // max(training.recall_queries, 1))
        queries = torch.arange(step - 1, len(q_THK), step, device=q_THK.device)[: training.recall_queries]
        recall = indexer_recall(q_THK, entries_CK, lse_TH, reach, picked_TM, training.dense, queries)
        return IndexerSignals(kl_T.sum() / sees_T.sum().clamp_min(1), recall)
