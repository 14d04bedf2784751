"""The gated pooling kernel against the reference: interpreted and compiled, in float32 as its inputs are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.dispatch import implementation
from leadline.ops.gated_pool import gated_pool

# entries, ratio, overlapping windows, width
SHAPES = [(1, 4, True, 4), (33, 4, True, 6), (3, 12, False, 5), (2, 128, False, 40), (0, 4, True, 4)]
GPU_SHAPES = [(1, 4, True, 512), (2001, 4, True, 512), (127, 4, True, 128), (65, 128, False, 512), (3, 128, False, 96)]


def inputs(entries: int, ratio: int, overlap: bool, width: int, device: str = "cpu") -> list[Tensor]:
    """Windows of one sequence, in a shuffled order of rows and with rows that nobody reads."""
    rows = torch.arange(-ratio if overlap else 0, ratio) + ratio * torch.arange(entries)[:, None]
    tokens = entries * ratio + 3
    order = torch.cat([torch.randperm(tokens), torch.tensor([-1])])
    rows = order[rows.clamp_min(-1)]
    columns = 2 * width if overlap else width
    return [torch.randn(tokens, columns, device=device), torch.randn(tokens, columns, device=device), rows.to(device)]


def pool(width: int) -> Callable[..., Tensor]:
    return lambda values, scores, rows: gated_pool(values, scores, rows, width)


@pytest.mark.interpret
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted(shape: tuple[int, int, bool, int], against_reference: Callable[..., None]) -> None:
    against_reference(pool(shape[3]), inputs(*shape), 2e-6)


@pytest.mark.interpret
def test_channels_in_several_tiles(against_reference: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    from leadline.ops.gated_pool import kernel

    monkeypatch.setattr(kernel, "VALUES_PER_TILE", 16)
    against_reference(pool(37), inputs(3, 4, True, 37), 2e-6)


@pytest.mark.interpret
def test_any_layout_in(scattered: Callable[[Tensor], Tensor], against_reference: Callable[..., None]) -> None:
    against_reference(pool(6), [scattered(x) for x in inputs(5, 4, True, 6)], 2e-6)


@pytest.mark.interpret
def test_empty_slots_do_not_read_the_row_of_another() -> None:
    values, scores, rows = inputs(1, 4, True, 6)
    outside = [row for row in range(len(values)) if row not in rows[0]]
    values[outside], scores[outside] = float("nan"), float("nan")
    with implementation("kernel"):
        assert torch.isfinite(gated_pool(values, scores, rows, 6)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_compiled(shape: tuple[int, int, bool, int], against_reference: Callable[..., None]) -> None:
    against_reference(pool(shape[3]), inputs(*shape, "cuda"), 2e-6)
