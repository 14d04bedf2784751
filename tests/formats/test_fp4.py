"""E2M1 blocks against the table of all sixteen codes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leadline.formats import fp4

MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # code 0 .. 7: two exponent bits, one mantissa bit


def nearest(x: float) -> float:
    """The E2M1 value closest to x; of two equally close ones that with the even code."""
    distances = [abs(magnitude - min(abs(x), 6.0)) for magnitude in MAGNITUDES]
    close = [code for code, distance in enumerate(distances) if distance == min(distances)]
    code = close[0] if len(close) == 1 else next(code for code in close if code % 2 == 0)
    return math.copysign(MAGNITUDES[code], x)


def formula(x: Tensor, block: int) -> Tensor:
    result = torch.empty_like(x)
    for row, values in enumerate(x.tolist()):
        for start in range(0, len(values), block):
            part = values[start : start + block]
            amax = max(6 * 2.0**-126, *(abs(value) for value in part))
            scale = 2.0 ** math.ceil(math.log2(amax / 6))
            result[row, start : start + block] = torch.tensor([nearest(value / scale) * scale for value in part])
    return result


def test_the_table_is_e2m1() -> None:
    """Sign, two exponent bits with bias 1, one mantissa bit; exponent 0 is subnormal."""
    for code, magnitude in enumerate(MAGNITUDES):
        exponent, mantissa = code >> 1, code & 1
        expected = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        assert magnitude == expected


def test_every_code_stays() -> None:
    values = torch.tensor(MAGNITUDES)
    assert torch.equal(fp4.round_to_e2m1(values), values)
    assert torch.equal(fp4.round_to_e2m1(-values), -values)
    assert fp4.round_to_e2m1(torch.tensor([-0.0])).signbit().item()


def test_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert torch.equal(fp4.round_to_e2m1(ties), expected)
    assert torch.equal(fp4.round_to_e2m1(-ties), -expected)
    for direction, side in ((math.inf, 1), (-math.inf, 0)):
        beside = torch.nextafter(ties, torch.tensor(direction))
        neighbours = torch.tensor(list(itertools.pairwise(MAGNITUDES)))
        assert torch.equal(fp4.round_to_e2m1(beside), neighbours[:, side])


@given(st.floats(-6.0, 6.0, width=32))
def test_nearest(x: float) -> None:
    assert fp4.round_to_e2m1(torch.tensor(x)).item() == nearest(x)


@pytest.mark.parametrize(("width", "block"), [(32, 32), (128, 32), (4, 1), (6, 3)])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_equals_the_nearest_code_times_the_scale(width: int, block: int, size: float) -> None:
    x = torch.randn(20, width) * size
    assert torch.equal(fp4.fake_quantize(x, block), formula(x, block))


@given(st.integers(0, 999), st.sampled_from([1e-20, 1.0, 1e4]))
def test_idempotent(seed: int, size: float) -> None:
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed)) * size
    once = fp4.fake_quantize(x)
    assert torch.equal(fp4.fake_quantize(once), once)


def test_unbiased() -> None:
    """The mean error is zero within five standard errors."""
    x = torch.rand(2000, 32) * 6
    error = (fp4.fake_quantize(x) - x).double()
    assert abs(error.mean()) < 5 * error.std() / math.sqrt(error.numel())


def test_zero_blocks_and_neighbours() -> None:
    x = torch.zeros(1, 64)
    assert torch.equal(fp4.fake_quantize(x), x)
    x[0, :32] = 0.7
    alone = fp4.fake_quantize(x[:, :32])
    x[0, 32] = 1e6
    assert torch.equal(fp4.fake_quantize(x)[:, :32], alone)


def test_a_width_that_is_no_multiple_of_the_block_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"33.*32"):
        fp4.fake_quantize(torch.zeros(2, 33))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 32), (3, 0)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    """A chunk may finish no entry."""
    assert fp4.fake_quantize(torch.zeros(shape)).shape == shape


def test_shape_dtype_and_input_stay() -> None:
    x = torch.randn(2, 3, 64).bfloat16()
    kept = x.clone()
    y = fp4.fake_quantize(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert torch.equal(x, kept)
    assert torch.equal(y.float(), fp4.fake_quantize(x.float()))
