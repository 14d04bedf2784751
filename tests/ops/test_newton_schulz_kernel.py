"""The Newton-Schulz kernel against the reference: interpreted in float32, compiled in bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.dispatch import implementation
from leadline.ops.newton_schulz import newton_schulz

# Around the edges of tiles of 16 and of rows of 8, both ways round.
SHAPES = [(2, 5, 7), (1, 7, 5), (1, 1, 1), (3, 16, 16), (2, 17, 40), (1, 50, 33), (1, 1, 9), (2, 31, 48)]
GPU_SHAPES = [(1, 64, 128), (3, 300, 131), (2, 1024, 1024), (1, 129, 4001), (2, 2048, 4096), (1, 4096, 2048)]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from leadline.ops.newton_schulz import kernel

    tile = kernel.Tile(16, 16, 16, num_warps=1, num_stages=1)
    monkeypatch.setattr(kernel, "SYMMETRIC", tile)
    monkeypatch.setattr(kernel, "GENERAL", tile)
    monkeypatch.setattr(kernel, "VALUES_PER_PART", 64)
    monkeypatch.setattr(kernel, "NORM_BLOCK", 32)


def by_kernel(x_BNM: Tensor) -> Tensor:
    with implementation("kernel"):
        return newton_schulz(x_BNM)


def singular_values(x: Tensor) -> Tensor:
    return torch.linalg.svdvals(x.double())


def distance(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.interpret
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape)
    before = x.clone()
    y = by_kernel(x)
    assert y.is_contiguous()
    assert y.shape == x.shape
    assert distance(y, newton_schulz(x.double())) < 2e-5
    assert torch.equal(x, before)


@pytest.mark.interpret
def test_tiles_of_the_card() -> None:
    x = torch.randn(1, 130, 260)
    assert distance(by_kernel(x), newton_schulz(x.double())) < 2e-5


@pytest.mark.interpret
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, inside of the interpreter
@pytest.mark.parametrize("rows", [8, 40])
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_zeros_and_what_is_no_number_stay_in_their_own_matrix(rows: int, bad: float) -> None:
    x = torch.randn(3, rows, 24)
    alone = by_kernel(x[[0, 2]])
    x[1] = 0.0
    x[1, 2, 3] = bad
    y = by_kernel(x)
    assert torch.equal(y[[0, 2]], alone)
    assert torch.equal(y[1], torch.zeros(rows, 24)) if bad == 0.0 else y[1].isnan().all()


@pytest.mark.interpret
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e15, 3e37])
def test_scale_does_not_matter(scale: float) -> None:
    values = singular_values(by_kernel(torch.randn(1, 16, 24) * scale)[0])
    assert values.min() >= 0.998
    assert values.max() <= 1.003


@pytest.mark.interpret
@pytest.mark.usefixtures("small_tiles")
def test_any_layout_in(scattered: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 20, 36)
    assert torch.equal(by_kernel(scattered(x)), by_kernel(x))


@pytest.mark.interpret
@pytest.mark.usefixtures("small_tiles")
def test_a_matrix_does_not_depend_on_its_neighbours() -> None:
    x = torch.randn(5, 18, 40)
    assert torch.equal(by_kernel(x)[3:4], by_kernel(x[3:4]))


@pytest.mark.interpret
def test_other_dtypes_and_no_matrices_run_as_the_reference() -> None:
    with implementation("kernel"):
        assert newton_schulz(torch.empty(0, 4, 6)).shape == (0, 4, 6)
        x = torch.randn(1, 16, 24)
        found = newton_schulz(x, torch.bfloat16)
    assert torch.equal(found, newton_schulz(x, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_compiled(shape: tuple[int, int, int]) -> None:
    """As far from float64 as the reference in bfloat16 is, and no farther."""
    x = torch.randn(shape, device="cuda")
    exact = newton_schulz(x.double())
    with implementation("reference"):
        allowed = distance(newton_schulz(x, torch.bfloat16), exact)
    ours = by_kernel(x)
    assert distance(ours, exact) <= 1.2 * allowed + 1e-3
    assert torch.equal(ours, by_kernel(x))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(256, 512), (512, 256), (384, 384)], ids=str)
def test_singular_values_on_the_card_are_those_of_the_contract(shape: tuple[int, int]) -> None:
    k = min(shape)
    left, right = (torch.linalg.qr(torch.randn(side, k, dtype=torch.float64))[0] for side in shape)
    x = ((left * torch.logspace(0, -1.5, k, dtype=torch.float64)) @ right.mT).float().cuda()
    values = singular_values(by_kernel(x[None])[0])
    assert values.min() >= 0.995
    assert values.max() <= 1.006


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1e-30, 3e37])
def test_scale_does_not_matter_on_the_card(scale: float) -> None:
    x = torch.randn(1, 96, 200, device="cuda")
    assert distance(by_kernel(x * scale), by_kernel(x).double()) < 2e-2
