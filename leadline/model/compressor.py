"""The token-level compressor (report 2.3.1, 2.3.2): R tokens become one entry.

Each token t brings a value u_t = x_t W_kv and a score s_t = x_t W_gate + ape[t mod R]. An entry is the sum of its
tokens' values, weighted for each channel by the softmax of their scores over the window.

- Ratio 128 (HCA): entry j pools the tokens 128 j .. 128 j + 127.
- Ratio 4 (CSA): windows overlap. Tokens carry two halves; entry j pools the first half of the tokens of window j-1 and
  the second half of those of window j, eight slots in all. For j = 0 the first four slots are empty.

A pooled entry is normalised, rotated at the position of its window's first token, and, when the cache is FP8 or FP4,
rounded to what the cache can hold. The indexer owns a second, narrower compressor of the same kind.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leadline.model.config import CSA_RATIO, ModelConfig
from leadline.model.linear import Linear, Norm
from leadline.model.segment_index import SegmentIndex
from leadline.model.state import CompressorState
from leadline.ops.cache_rows import Source
from leadline.ops.cache_step import Finish, NewTokens, Tails, finished, store_entries
from leadline.ops.exact_linear import exact_linears
from leadline.ops.gated_pool import gated_pool
from leadline.ops.norm_rope import Rounding
from leadline.ops.place_rows import PlaceRows


class Compressor(nn.Module):
    """ape FP32 [R, E]; wkv, wgate [E, D] evaluated in FP32; norm [width]. E = 2 x width when windows overlap."""

    def __init__(self, config: ModelConfig, ratio: int, width: int):
        super().__init__()
        self.ratio, self.width, self.eps = ratio, width, config.rms_norm_eps
        columns = 2 * width if ratio == CSA_RATIO else width
        self.ape = nn.Parameter(torch.empty(ratio, columns))
        self.wkv = Linear(config.hidden_size, columns)
        self.wgate = Linear(config.hidden_size, columns)
        self.norm = Norm(width)

    def forward(
        self, x_TD: Tensor, index: SegmentIndex, state: CompressorState | None, rounding: Rounding | None
    ) -> Source:
        """What the layer's queries can see: all entries [C, width] in the dtype of x, as `index.reach` counts them, or
        the state's own store, of which `index.lookup` names rows."""
        rows = index.pool[self.ratio]
        finish = Finish(self.norm.weight, self.eps, *index.entry_rotation(self.ratio), rounding)
        values_TE, scores_TE = exact_linears(x_TD, (self.wkv.weight, self.wgate.weight))
        if state is not None and index.lookup is not None:
            return self._step(values_TE, scores_TE, index, state, finish)
        scores_TE = scores_TE + PlaceRows.apply(self.ape, index.positions_T % self.ratio)
        if state is None:
            return self._entries(values_TE, scores_TE, index, x_TD.dtype, finish)
        past_and_new = state.with_past(values_TE, scores_TE, rows)
        if len(rows.rows_CG):
            state.entries.write(rows.entry_rows_C, self._entries(*past_and_new, index, x_TD.dtype, finish))
        return state.entries.source if rows.seen_X is None else state.entries.read(rows.seen_X)

    def _step(
        self, values_TE: Tensor, scores_TE: Tensor, index: SegmentIndex, state: CompressorState, finish: Finish
    ) -> Source:
        """The state's own store, once the new tokens and what they finish are in the state."""
        rows, store = index.pool[self.ratio], state.entries
        tokens = NewTokens(values_TE, scores_TE, self.ape, index.positions_T)
        tails = Tails(*state.tails, rows.keep_ring)
        store_entries(tokens, tails, rows.rows_CG, store.dtype, finish, rows.entry_rows_C, store.source)
        return store.source

    def _entries(
        self, values_YE: Tensor, scores_YE: Tensor, index: SegmentIndex, dtype: torch.dtype, finish: Finish
    ) -> Tensor:
        """The entries that the segment makes [C, width], in `dtype`, rounded to what the cache can hold."""
        return finished(gated_pool(values_YE, scores_YE, index.pool[self.ratio].rows_CG, self.width).to(dtype), finish)
