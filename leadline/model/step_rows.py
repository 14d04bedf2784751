"""Row indices of decoding steps: what a layer looks back at is looked up where it lies.

A step brings one new token of each sequence, or the few of a draft that is being verified. To gather a past of a
million tokens for it would be most of the work, so nothing is gathered. The new keys, tails and entries are stored
first; then every query names the rows that it sees, in the rings and in the pages of its sequence. Rings must have room
for it: a step of 1 + k tokens needs k spare rows, so that its last token overwrites nothing that its first one sees.

All rows are worked out on the device from three tensors: the positions of the tokens, the slots of the sequences, and
the page table. Shapes depend on none of their values; where the host knows the positions, it leaves out the entries
that no token finishes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leadline.model.config import CSA_RATIO, HCA_RATIO
from leadline.model.page_table import PAGE_TOKENS, num_pages, page_entries
from leadline.model.rows import Layout, PoolRows, RingRows, ring_length
from leadline.model.segment import Segment


@dataclass(frozen=True)
class Lookup:
    """The rows that each token of a step sees; int32, -1 = none.

    window_TW: of the window rings. entries_TP: of the entries of HCA layers, one for each of the P pages.
    pages_NP: the pages of each sequence. visible_T: how many entries of CSA layers each token sees.
    """

    window_TW: Tensor
    entries_TP: Tensor
    pages_NP: Tensor
    visible_T: Tensor


class StepRows:
    """Row indices of a segment whose sequences bring at most 1 + spare tokens."""

    def __init__(self, segment: Segment, window: int, layout: Layout):
        self._segment, self._window, self._layout = segment, window, layout
        positions_T, device = segment.positions_T, segment.device
        self._new_T = torch.arange(segment.num_tokens, device=device)
        self._slot_T = segment.slots_N[segment.sequence_T]
        pages = num_pages(max(past + length for past, length in zip(segment.past, segment.lengths, strict=True)))
        self._pages_NP = layout.pages.table_NP[segment.slots_N, :pages]
        self._seen_T = positions_T + 1
        # The latest positions that each token looks back at, itself the last; shorter lists are the ends of these.
        behind_B = torch.arange(1 - max(window, HCA_RATIO), 1, device=device)
        self._position_TB = positions_T[:, None] + behind_B
        self._missing_TB = self._position_TB < 0
        self._is_new_TB = segment.place_T[:, None] + behind_B >= 0
        self._new_TB = self._new_T[:, None] + behind_B
        self._window_TW = self._ring_rows(window)

    def ring(self) -> RingRows:
        """Around the window."""
        return RingRows(None, None, self._new_T, self._window_TW[:, -1].contiguous())

    def pool(self, ratio: int) -> PoolRows:
        """Around the tails and entries of the layers of a ratio: one entry for every token that may finish one."""
        segment, count = self._segment, ring_length(ratio)
        ring_TG = self._ring_rows(count)
        rings = self._layout.pages.slots * (count + self._layout.spare_tokens)
        rows_TG = torch.where(self._is_new_TB[:, -count:], rings + self._new_TB[:, -count:], ring_TG)
        page_T = self._pages_NP[segment.sequence_T, segment.positions_T // PAGE_TOKENS].long()
        row_T = page_T * page_entries(ratio) + segment.positions_T % PAGE_TOKENS // ratio
        row_T = torch.where(self._seen_T % ratio == 0, row_T, -1)
        first_T = segment.positions_T // ratio * ratio
        kept = self._finishing(ratio)
        return PoolRows(
            past_X=None,
            rows_CG=rows_TG[kept],
            entry_positions_C=first_T[kept],
            entry_rows_C=row_T[kept],
            seen_X=None,
            keep_new=self._new_T,
            keep_ring=ring_TG[:, -1].contiguous(),
        )

    def lookup(self) -> Lookup:
        """What each token sees."""
        segment = self._segment
        page_P = torch.arange(self._pages_NP.shape[1], device=segment.device)
        sees_TP = page_P < (self._seen_T // HCA_RATIO)[:, None]
        return Lookup(
            window_TW=self._window_TW.int(),
            entries_TP=torch.where(sees_TP, self._pages_NP[segment.sequence_T], -1),
            pages_NP=self._pages_NP,
            visible_T=self._seen_T // CSA_RATIO,
        )

    def _ring_rows(self, count: int) -> Tensor:
        """Rows, in the rings that hold so many positions and the spare ones, of the `count` latest positions that each
        token sees; -1 before its sequence's first token."""
        ring = count + self._layout.spare_tokens
        row_Tc = (self._slot_T * ring)[:, None] + self._position_TB[:, -count:] % ring
        return torch.where(self._missing_TB[:, -count:], -1, row_Tc)

    def _finishing(self, ratio: int) -> Tensor | slice:
        """The tokens that finish an entry where the host knows them, and else all tokens."""
        segment = self._segment
        if not segment.places_known:
            return slice(None)
        rows = [
            start + place
            for start, past, length in zip(segment.starts, segment.past, segment.lengths, strict=True)
            for place in range(length)
            if (past + place + 1) % ratio == 0
        ]
        return torch.tensor(rows, dtype=torch.int64, device=segment.device)
