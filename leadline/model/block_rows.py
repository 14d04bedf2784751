"""Row indices of draft blocks: B tokens of each sequence, which see each other and the window before them.

`dspark.py` says what they are for. A block's keys go into the rows of the ring that the next tokens' keys will take.
With B spare rows these hold nothing that the block or any later token sees. Entries and pages play no part: stages are
window-only.
"""

from __future__ import annotations

import torch

from leadline.model.rows import Layout, RingRows
from leadline.model.segment import Segment
from leadline.model.step_rows import Lookup


class BlockRows:
    """Row indices of a segment whose sequences bring equally many tokens, at most the spare ones."""

    def __init__(self, segment: Segment, window: int, layout: Layout):
        self._segment, self._window, self._length = segment, window, segment.lengths[0]
        ring = window + layout.spare_tokens
        first_N = segment.positions_T[:: self._length]
        position_NX = first_N[:, None] + torch.arange(-window, self._length, device=segment.device)
        row_NX = (segment.slots_N * ring)[:, None] + position_NX % ring
        self._row_NX = torch.where(position_NX < 0, -1, row_NX)

    def ring(self) -> RingRows:
        """Around the window."""
        new_T = torch.arange(self._segment.num_tokens, device=self._segment.device)
        return RingRows(None, None, new_T, self._row_NX[:, self._window :].flatten())

    def lookup(self) -> Lookup:
        """What each token sees: the W keys before its block, and all keys of the block."""
        row_TX = self._row_NX.int().repeat_interleave(self._length, 0)
        return Lookup(row_TX, row_TX[:, :0], row_TX[:0], torch.zeros_like(self._segment.positions_T))
