"""What row indices there are: the lists that tell layers which rows of state and new tokens to read and write."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from leadline.model.config import CSA_RATIO
from leadline.model.page_table import PageTable


@dataclass(frozen=True)
class Layout:
    """How a `State` lies in memory.

    pages: where the entries of each slot are. in_place: whether entries are kept as they were computed, so that pages
    one behind the other need no copy to be read. spare_tokens: how many rows its rings have more than they need.
    """

    pages: PageTable
    in_place: bool
    spare_tokens: int = 0


@dataclass(frozen=True)
class RingRows:
    """Row indices around one ring (a fixed number of recent rows per slot, position p at p mod length).

    past_X: ring rows of the past that this segment still needs, sequence by sequence; None in a decoding step, which
    gathers nothing, but reads in the ring after the new rows have been stored there.
    order_X: rows of [past rows, new rows] that put each sequence's new rows behind its past; None when they are there.
    keep_new, keep_ring: which new rows to store, and in which ring rows, so that the ring holds the latest again. A
    step stores them all.
    """

    past_X: Tensor | None
    order_X: Tensor | None
    keep_new: Tensor
    keep_ring: Tensor


@dataclass(frozen=True)
class PoolRows:
    """Row indices of one compression ratio.

    past_X: as in `RingRows`.
    rows_CG: rows of [past rows, new rows] for every slot of every entry that this segment makes, -1 empty. The past
    rows of a step are the rings of all slots.
    entry_positions_C: position of each entry, which is that of the first token of its window.
    entry_rows_C: row of each entry among those of the state, -1 when it is not finished and goes nowhere.
    seen_X: rows of the entries that this segment sees, sequence by sequence; None when they are read where they are.
    keep_*: as in `RingRows`.
    """

    past_X: Tensor | None
    rows_CG: Tensor
    entry_positions_C: Tensor
    entry_rows_C: Tensor
    seen_X: Tensor | None
    keep_new: Tensor
    keep_ring: Tensor


def ring_length(ratio: int) -> int:
    """Recent tokens a compressor must remember: one window, or two where windows overlap (ratio 4)."""
    return 2 * ratio if ratio == CSA_RATIO else ratio
