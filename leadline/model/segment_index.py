"""The index of a segment: every row index and rotation that the layers of one forward pass share.

All layers need the same few lists: which keys form the window, which tokens an entry pools, where the entry goes, which
entries there are to see. They depend on lengths and places and on no number of the model, so they are worked out once
for each forward pass. `chunk_rows.py` does it for segments of any lengths, `step_rows.py` for those that bring a token
or few of each sequence to a state, `block_rows.py` for drafts.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from leadline.model.block_rows import BlockRows
from leadline.model.chunk_rows import ChunkRows
from leadline.model.config import ModelConfig
from leadline.model.rotary import Rotary, Rotation
from leadline.model.rows import Layout, PoolRows
from leadline.model.segment import Segment
from leadline.model.step_rows import Lookup, StepRows
from leadline.ops.beside import Beside
from leadline.ops.reach import Reach


class SegmentIndex:
    """ring, pool: rows around the window, and around the tails and entries of the layers of each ratio.

    lookup: of a decoding step, the rows that its tokens see; None for other segments, and then `reach` says it.
    layout: of the `State` in use; None when there is none, and then a segment brings all that it looks back at.
    rotary: of the model; None makes one. draft_block: the tokens of each sequence are a block of drafts, which see each
    other and the window before them (`dspark.py`); such an index is for window-only layers.
    """

    def __init__(
        self,
        segment: Segment,
        config: ModelConfig,
        layout: Layout | None,
        rotary: Rotary | None = None,
        *,
        draft_block: bool = False,
    ):
        if layout is None and any(segment.past):
            raise ValueError(f"sequences with a past {segment.past} need a state")
        self.segment = segment
        rotary = rotary or Rotary(config)
        ratios = [] if draft_block else sorted(set(config.layer_ratios) - {0})
        self.lookup: Lookup | None = None
        self._reach: dict[int, Reach] = {}
        rows: BlockRows | StepRows | ChunkRows
        pools: dict[int, Beside[_Pool]] = {}
        if layout is not None and draft_block:
            rows = BlockRows(segment, config.sliding_window, layout)
            self.lookup = rows.lookup()
        elif layout is not None and max(segment.lengths) <= 1 + layout.spare_tokens and not _repeats(segment, layout):
            rows = StepRows(segment, config.sliding_window, layout)
            pools = _pools(rows, ratios, segment.positions_T, rotary)
            self.lookup = rows.lookup()
        else:
            rows = ChunkRows(segment, config.sliding_window, layout)
            pools = _pools(rows, ratios, segment.positions_T, rotary)
            self._reach[0] = rows.window_reach()
            self._reach |= {ratio: rows.entry_reach(ratio, self._reach[0]) for ratio in ratios}
        self.ring = rows.ring()
        self._rotation = {0: rotary.at(segment.positions_T, 0)}
        if ratios:  # they all turn at one pace
            self._rotation |= dict.fromkeys(ratios, rotary.at(segment.positions_T, ratios[0]))
        found = {ratio: pool.result() for ratio, pool in pools.items()}
        self.pool = {ratio: pool for ratio, (pool, _) in found.items()}
        self._entry_rotation = {ratio: rotation for ratio, (_, rotation) in found.items()}

    @property
    def positions_T(self) -> Tensor:
        return self.segment.positions_T

    def rotation(self, ratio: int) -> Rotation:
        """cos and sin [T, R/2] of the new tokens in a layer of this ratio."""
        return self._rotation[ratio]

    def entry_rotation(self, ratio: int) -> Rotation:
        """cos and sin [C, R/2] of the entries that this segment makes in a layer of this ratio."""
        return self._entry_rotation[ratio]

    def reach(self, ratio: int) -> Reach:
        """What the queries of a layer of this ratio may see, in a segment that is not a step."""
        return self._reach[ratio]


_Pool = tuple[PoolRows, Rotation]


def _pools(
    rows: StepRows | ChunkRows, ratios: list[int], positions_T: Tensor, rotary: Rotary
) -> dict[int, Beside[_Pool]]:
    """The rows of each ratio's pools and the rotation of their entries; in a captured step, all at once."""

    def pool(ratio: int) -> _Pool:
        pooled = rows.pool(ratio)
        return pooled, rotary.at(pooled.entry_positions_C, ratio)

    return {ratio: Beside(partial(pool, ratio), positions_T, lane) for lane, ratio in enumerate(ratios)}


def _repeats(segment: Segment, layout: Layout) -> bool:
    """Whether it computes tokens again whose entries are in place and must not be written."""
    places = zip(segment.slots, segment.past, strict=True)
    return segment.places_known and any(past < layout.pages.written(slot) for slot, past in places)
