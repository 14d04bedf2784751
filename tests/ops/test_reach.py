"""Tiles cover every query once and in order; a tile's columns are what its queries may see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from leadline.ops.reach import SHORT, add_rows, entry_columns, key_columns, tiles, weighted_columns

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(lengths=LENGTHS, size=st.integers(1, 64))
def test_tiles_cover_every_query_once(lengths: list[int], size: int) -> None:
    sequence = [number for number, length in enumerate(lengths) for _ in range(length)]
    rows = []
    for tile in tiles(tuple(lengths), max(size, SHORT)):
        inside = list(range(tile.start, tile.stop))
        assert 0 < len(inside) <= max(size, SHORT)
        assert not tile.shared or len({sequence[row] for row in inside}) == 1
        rows += inside
    assert rows == list(range(sum(lengths)))


@given(st.data())
def test_columns_show_exactly_what_may_be_seen(look_back: Callable[..., Any], data: st.DataObject) -> None:
    lengths = data.draw(LENGTHS)
    past = [data.draw(st.integers(0, 30)) for _ in lengths]
    case = look_back(
        lengths,
        past,
        window=data.draw(st.integers(1, 12)),
        ratio=data.draw(st.integers(1, 5)),
        picks=data.draw(st.integers(1, 4)),
        gap=data.draw(st.integers(0, 2)),
        seed=data.draw(st.integers(0, 9)),
    )
    # Every source row holds its own number, so that a column tells where it came from.
    keys, entries = torch.arange(float(case.keys))[:, None], torch.arange(float(case.entries))[:, None]
    for tile in tiles(case.reach.lengths, data.draw(st.integers(8, 20))):
        for columns, sees in (
            (key_columns(keys, case.reach, tile), case.sees_key_TX),
            (entry_columns(entries, case.reach, tile, None), case.sees_entry_TC),
            (entry_columns(entries, case.reach, tile, case.picked_TM), case.sees_picked_TC),
        ):
            sources = columns.vectors[..., 0].expand(columns.seen.shape)
            for row, seen, source in zip(range(tile.start, tile.stop), columns.seen, sources, strict=True):
                assert sorted(source[seen].long().tolist()) == sees[row].nonzero().flatten().tolist()


def test_gradients_return_to_the_rows_they_came_from() -> None:
    weights, vectors = torch.randn(3, 2, 4), torch.randn(3, 2, 5)
    shared = torch.zeros(6, 5)
    add_rows(shared, slice(1, 5), weighted_columns(weights, vectors, slice(1, 5)))
    expected = torch.zeros(6, 5)
    expected[1:5] = torch.einsum("bhx,bhk->xk", weights, vectors)
    torch.testing.assert_close(shared, expected)
    rows = torch.tensor([[0, 1, 2, 3], [3, 3, 5, 0], [4, 4, 4, 4]])
    own = torch.zeros(6, 5)
    add_rows(own, rows, weighted_columns(weights, vectors, rows))
    expected = torch.zeros(6, 5)
    for query in range(3):
        for column in range(4):
            expected[rows[query, column]] += weights[query, :, column] @ vectors[query]
    torch.testing.assert_close(own, expected)
