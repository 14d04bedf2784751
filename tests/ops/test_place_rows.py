"""Rows of a small table that many look up."""

from __future__ import annotations

import torch

from leadline.ops.place_rows import PlaceRows


def test_rows_of_places_and_the_gradient_of_their_table() -> None:
    table, place = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 1, 3, 3, 3])
    assert torch.autograd.gradcheck(lambda table: PlaceRows.apply(table, place), (table,))
    rows = PlaceRows.apply(table, place)
    assert torch.equal(rows, table[place])
    (gradient,) = torch.autograd.grad(rows.sum(), table)
    assert gradient[:, 0].tolist() == [1.0, 2.0, 0.0, 3.0]
