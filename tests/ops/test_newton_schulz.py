"""Newton-Schulz: singular values, scale invariance, and the inputs that break naive versions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from leadline.ops.newton_schulz import newton_schulz
from leadline.ops.newton_schulz.reference import COEFFICIENTS

SHAPES = [(64, 128), (128, 64), (64, 64), (24, 512), (1, 7), (7, 1), (1, 1)]


def with_singular_values(rows: int, columns: int, values: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = len(values)
    left, _ = torch.linalg.qr(torch.randn(rows, k, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, k, generator=generator, dtype=torch.float64))
    return (left * values) @ right.mT


def singular_values(x: Tensor) -> Tensor:
    return torch.linalg.svdvals(x.double())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_singular_values_become_one(shape: tuple[int, int], condition: float, dtype: torch.dtype) -> None:
    k = min(shape)
    x = with_singular_values(*shape, torch.logspace(0, -math.log10(condition), k, dtype=torch.float64))
    values = singular_values(newton_schulz(x[None].to(dtype))[0])
    assert values.min() >= 0.998
    assert values.max() <= 1.003


@pytest.mark.parametrize("relative", [0.1, 1e-2, 1e-4, 3e-5])
def test_smallest_singular_value_of_the_contract(relative: float) -> None:
    rest = math.sqrt((1 - relative**2) / 63)
    x = with_singular_values(64, 128, torch.tensor([*[rest] * 63, relative], dtype=torch.float64))
    values = singular_values(newton_schulz(x[None].float())[0])
    assert values.min() >= 0.998
    assert values.max() <= 1.003


def test_singular_vectors_are_kept() -> None:
    values = torch.linspace(1, 0.01, 48, dtype=torch.float64)
    x = with_singular_values(48, 80, values)
    exact = with_singular_values(48, 80, torch.ones_like(values))
    assert (newton_schulz(x[None])[0] - exact).abs().max() < 1e-3


def test_every_start_in_the_unit_interval() -> None:
    """The scalar polynomial on a fine grid: the bounds of the contract, and the limit of stage one."""
    values = torch.logspace(math.log10(3e-5), 0, 200_001, dtype=torch.float64)
    for number, (a, b, c) in enumerate(COEFFICIENTS):
        values = a * values + b * values**3 + c * values**5
        if number == 7:
            assert values.min() > 0.56
            assert values.max() < 1.21
    assert values.min() > 0.9999
    assert values.max() < 1.0021


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (64, 64)], ids=str)
def test_bfloat16_widens_the_bounds_to_those_of_the_contract(shape: tuple[int, int]) -> None:
    x = with_singular_values(*shape, torch.logspace(0, -2, 64, dtype=torch.float64))
    values = singular_values(newton_schulz(x[None].float(), torch.bfloat16)[0])
    assert values.min() >= 0.995
    assert values.max() <= 1.006


def test_update_has_unit_rms_after_rescaling() -> None:
    generator = torch.Generator().manual_seed(1)
    for rows, columns in ((64, 128), (128, 64), (32, 512)):
        o = newton_schulz(torch.randn(1, rows, columns, generator=generator))
        rms = float(o.square().mean().sqrt()) * math.sqrt(max(rows, columns))
        assert rms == pytest.approx(1.0, abs=1e-3)


def test_batch_equals_one_by_one() -> None:
    x = torch.randn(9, 24, 40, generator=torch.Generator().manual_seed(2))
    single = torch.cat([newton_schulz(matrix[None]) for matrix in x])
    assert (newton_schulz(x) - single).abs().max() < 1e-5


def test_transpose_commutes() -> None:
    x = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(3))
    assert (newton_schulz(x.mT).mT - newton_schulz(x)).abs().max() < 1e-5


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-15, 1e15, 3e37])
def test_scale_does_not_matter(scale: float) -> None:
    x = torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(4))
    # Subnormal numbers hold few digits, so only the bounds are compared there.
    values = singular_values(newton_schulz(x * scale)[0])
    assert values.min() >= 0.998
    assert values.max() <= 1.003
    if scale > 1e-37:
        assert (newton_schulz(x * scale) - newton_schulz(x)).abs().max() < 1e-4


def test_zero_matrix_gives_zeros_and_leaves_its_neighbours_alone() -> None:
    x = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(5))
    x[1] = 0
    y = newton_schulz(x)
    assert torch.equal(y[1], torch.zeros(8, 12))
    assert (y[0] - newton_schulz(x[:1])[0]).abs().max() < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_stays_in_its_own_matrix(bad: float) -> None:
    x = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(6))
    x[1, 2, 3] = bad
    y = newton_schulz(x)
    assert y[1].isnan().any()
    assert y[0].isfinite().all()
    assert y[2].isfinite().all()


def test_rank_deficient_matrix_is_not_amplified() -> None:
    x = with_singular_values(32, 48, torch.ones(4, dtype=torch.float64)).float()
    values = singular_values(newton_schulz(x[None])[0])
    assert values[:4].min() >= 0.998
    assert values[4:].max() < 0.02


def test_input_is_kept_and_strides_do_not_matter() -> None:
    wide = torch.randn(2, 40, 60, generator=torch.Generator().manual_seed(7))
    view = wide[:, ::2, 1::3]
    before = wide.clone()
    assert (newton_schulz(view) - newton_schulz(view.contiguous())).abs().max() < 1e-5
    assert torch.equal(wide, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_result_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    assert newton_schulz(torch.randn(1, 4, 6, dtype=dtype)).dtype == dtype


def test_no_matrices() -> None:
    assert newton_schulz(torch.empty(0, 4, 6)).shape == (0, 4, 6)


@pytest.mark.parametrize(
    "x",
    [torch.zeros(3, 4), torch.zeros(1, 0, 3), torch.zeros(1, 2, 3, dtype=torch.int64)],
    ids=["2-D", "empty", "integers"],
)
def test_wrong_input_is_named(x: Tensor) -> None:
    with pytest.raises(ValueError, match="newton_schulz takes float matrices"):
        newton_schulz(x)
