"""Which rows and rotations a segment gets."""

from __future__ import annotations

import pytest
import torch

from leadline.model.config import TINY
from leadline.model.page_table import PageTable
from leadline.model.rows import Layout
from leadline.model.segment import Segment
from leadline.model.segment_index import SegmentIndex


def test_each_ratio_has_its_own_rotation() -> None:
    """The plain base in window-only layers, the other base with YaRN in the rest; entries turn at their first token."""
    config = TINY.replace(rope_factor=4.0, original_max_position_embeddings=32)
    index = SegmentIndex(Segment.of(range(260)), config, None)
    half = torch.arange(8, dtype=torch.float64)
    plain = torch.outer(torch.arange(260.0, dtype=torch.float64), 10000.0 ** (-half / 8))
    torch.testing.assert_close(index.rotation(0)[0].double(), plain.cos(), rtol=0, atol=1e-4)
    for ratio in (4, 128):
        for part in (0, 1):
            assert torch.equal(index.rotation(ratio)[part], index.rotation(4)[part])
            anchors = index.rotation(ratio)[part][: 260 // ratio * ratio : ratio]
            assert torch.equal(index.entry_rotation(ratio)[part], anchors)
    assert not torch.equal(index.rotation(0)[0], index.rotation(4)[0])


@pytest.mark.parametrize(
    ("lengths", "past", "spare", "steps"),
    [
        ([1], [9], 0, True),
        ([1, 1], [0, 9], 0, True),
        ([2], [9], 0, False),
        ([1, 2], [9, 9], 0, False),
        ([4, 1], [9, 9], 3, True),
        ([5, 1], [9, 9], 3, False),
    ],
)
def test_only_what_fits_in_the_rings_is_looked_up(lengths: list[int], past: list[int], spare: int, steps: bool) -> None:
    segment = Segment.of(*(range(length) for length in lengths), past=past)
    index = SegmentIndex(segment, TINY, Layout(PageTable.fixed(2, 1), in_place=True, spare_tokens=spare))
    assert (index.lookup is not None) == steps


def test_tokens_that_are_computed_again_are_no_step() -> None:
    """A step writes every entry that it finishes; what is in place must stay."""
    pages = PageTable(1, 2, 2)
    pages.assign(0, [1, 0], written=128)
    layout = Layout(pages, in_place=True)
    assert SegmentIndex(Segment.of([1], past=[127]), TINY, layout).lookup is None
    assert SegmentIndex(Segment.of([1], past=[128]), TINY, layout).lookup is not None


def test_without_a_state_nothing_is_looked_up() -> None:
    assert SegmentIndex(Segment.of([1], [2]), TINY, None).lookup is None


def test_a_past_needs_a_state() -> None:
    with pytest.raises(ValueError, match="need a state"):
        SegmentIndex(Segment.of([1], past=[3]), TINY, None)
