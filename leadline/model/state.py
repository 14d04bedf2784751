"""State: what the layers remember of sequences between forward passes.

A V4 layer does not keep every key. Per sequence it keeps

- the *window*: a ring of the last W keys, position p in row p mod W;
- for each compressor a *tail*: a ring of the last tokens' pooled values and scores, one window of R tokens, or two
  where windows overlap. It holds the tokens that no entry covers yet, and the previous window that the next entry
  overlaps;
- the *entries* made so far (and on CSA layers the index keys), the only part that grows.

State is an argument of the model: it goes in, is updated in place, and holds nothing that another sequence can read.
Each sequence owns one slot of every tensor. Gradients never flow through a state; training runs without one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leadline.model.config import CSA_RATIO, ModelConfig
from leadline.model.segment import PoolRows, RingRows, Segment, ring_length


@dataclass
class CompressorState:
    """Memory of one compressor: tails FP32 [slots, ring, E], entries [slots, capacity, D] in the model's dtype."""

    values_NRE: Tensor
    scores_NRE: Tensor
    entries_NCD: Tensor

    @classmethod
    def empty(cls, slots: int, ratio: int, width: int, capacity: int, dtype: torch.dtype, device: torch.device | str):
        columns = 2 * width if ratio == CSA_RATIO else width
        tail = torch.zeros(slots, ring_length(ratio), columns, dtype=torch.float32, device=device)
        return cls(tail, tail.clone(), torch.zeros(slots, capacity, width, dtype=dtype, device=device))

    def with_past(self, values_TE: Tensor, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        """[ring rows of all slots, new rows] of values and scores, as `PoolRows.rows_CG` counts them."""
        return torch.cat([self.values_NRE.flatten(0, 1), values_TE]), torch.cat(
            [self.scores_NRE.flatten(0, 1), scores_TE]
        )

    def store(self, values_TE: Tensor, scores_TE: Tensor, entries_CD: Tensor, rows: PoolRows) -> Tensor:
        """Keep the latest tokens and the finished entries; returns all entries as rows [slots * capacity, D]."""
        self.values_NRE.flatten(0, 1)[rows.keep_ring] = values_TE[rows.keep_new]
        self.scores_NRE.flatten(0, 1)[rows.keep_ring] = scores_TE[rows.keep_new]
        entries = self.entries_NCD.flatten(0, 1)
        entries[rows.entry_rows_C] = entries_CD
        return entries


@dataclass
class LayerState:
    """Memory of one layer: window ring [slots, W, K], and the compressors it has."""

    window_NWK: Tensor
    entries: CompressorState | None = None
    index: CompressorState | None = None

    def with_past(self, keys_TK: Tensor, rows: RingRows) -> Tensor:
        """Window keys of the past and the new ones, in the order that `Reach` counts them; stores the new ones."""
        ring = self.window_NWK.flatten(0, 1)
        keys_XK = keys_TK if rows.source_X is None else torch.cat([ring, keys_TK])[rows.source_X]
        ring[rows.keep_ring] = keys_TK[rows.keep_new]
        return keys_XK


class State:
    """Memory of `slots` sequences for all layers of a model, MTP blocks included.

    capacity_tokens: how many tokens of a sequence its slot can hold; `reserve` grows it.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        capacity_tokens: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.config, self.slots, self.capacity_tokens = config, slots, capacity_tokens
        self.layers = [self._layer(ratio, dtype, device) for ratio in config.layer_ratios]
        self.mtp = [self._layer(ratio, dtype, device) for ratio in config.mtp_ratios]

    def _layer(self, ratio: int, dtype: torch.dtype, device: torch.device | str) -> LayerState:
        c = self.config
        window = torch.zeros(self.slots, c.sliding_window, c.head_dim, dtype=dtype, device=device)
        if ratio == 0:
            return LayerState(window)
        capacity = self.capacity(ratio)
        entries = CompressorState.empty(self.slots, ratio, c.head_dim, capacity, dtype, device)
        if ratio != CSA_RATIO:
            return LayerState(window, entries)
        index = CompressorState.empty(self.slots, ratio, c.index_head_dim, capacity, dtype, device)
        return LayerState(window, entries, index)

    def capacity(self, ratio: int) -> int:
        """Entries per slot of a layer of this ratio."""
        return self.capacity_tokens // ratio

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys and entries: that of the model."""
        return self.layers[0].window_NWK.dtype

    @property
    def device(self) -> torch.device:
        return self.layers[0].window_NWK.device

    @property
    def num_bytes(self) -> int:
        """Bytes of every tensor held."""
        total = 0
        for layer in [*self.layers, *self.mtp]:
            total += layer.window_NWK.nbytes
            for part in (layer.entries, layer.index):
                if part is not None:
                    total += part.values_NRE.nbytes + part.scores_NRE.nbytes + part.entries_NCD.nbytes
        return total

    def reserve(self, segment: Segment) -> None:
        """Grow the slots so that the sequences of a segment fit. At least doubles, so that appending stays linear."""
        needed = max(past + length for past, length in zip(segment.past, segment.lengths, strict=True))
        if max(segment.slots) >= self.slots:
            raise ValueError(f"slot {max(segment.slots)} does not exist: the state has {self.slots} slots")
        if needed <= self.capacity_tokens:
            return
        self.capacity_tokens = max(needed, 2 * self.capacity_tokens)
        for layer, ratio in zip(self.layers, self.config.layer_ratios, strict=True):
            for part in (layer.entries, layer.index):
                if part is not None:
                    old = part.entries_NCD
                    part.entries_NCD = old.new_zeros(self.slots, self.capacity(ratio), old.shape[2])
                    part.entries_NCD[:, : old.shape[1]] = old
