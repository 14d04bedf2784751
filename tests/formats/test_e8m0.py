"""Power-of-two scales against exact integer arithmetic on exponents."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leadline.formats import e8m0
from leadline.formats.e8m0 import block_scale, ceil_power_of_two

POSITIVE_NORMALS = st.floats(min_value=2.0**-126, max_value=2.0**127, width=32)


@given(POSITIVE_NORMALS)
def test_smallest_power_of_two_above(x: float) -> None:
    found = ceil_power_of_two(torch.tensor(x)).item()
    mantissa, exponent = math.frexp(found)
    assert mantissa == 0.5, "not a power of two"
    assert found / 2 < x <= found
    assert exponent - 1 <= 127


@pytest.mark.parametrize("exponent", [-126, -125, -64, -1, 0, 1, 30, 126])
def test_powers_stay_and_the_next_number_doubles(exponent: int) -> None:
    power = torch.tensor(2.0**exponent)
    assert ceil_power_of_two(power) == power
    assert ceil_power_of_two(torch.nextafter(power, torch.tensor(float("inf")))) == 2 * power
    if exponent > -126:
        assert ceil_power_of_two(torch.nextafter(power, torch.tensor(0.0))) == power


def test_any_shape_and_float32_alone() -> None:
    assert ceil_power_of_two(torch.tensor([[3.0, 4.0], [5.0, 0.3]])).tolist() == [[4.0, 4.0], [8.0, 0.5]]
    with pytest.raises(ValueError, match="float32"):
        ceil_power_of_two(torch.tensor(3.0, dtype=torch.float64))


@pytest.mark.parametrize(("largest", "floor"), [(448.0, 1e-4), (6.0, 6.0 * 2.0**-126)], ids=["e4m3", "e2m1"])
def test_the_largest_value_of_a_block_fits_exactly(largest: float, floor: float) -> None:
    """A block whose maximum is largest x 2^k gets the scale 2^k, and one just above it twice that."""
    powers = torch.tensor([2.0**k for k in range(-20, 100, 7)])
    assert torch.equal(block_scale(powers * largest, largest, floor), powers)
    above = powers * largest * (1 + 2.0**-20)
    assert torch.equal(block_scale(above, largest, floor), 2 * powers)


@given(POSITIVE_NORMALS)
def test_nothing_overflows_and_no_more_than_half_the_range_is_wasted(amax: float) -> None:
    scale = block_scale(torch.tensor(amax), 448.0, 2.0**-117).item()
    ratio = Fraction(amax) / Fraction(scale)
    assert ratio <= 448 * (1 + Fraction(1, 2**22))
    assert ratio > 224 * (1 - Fraction(1, 2**22)) or amax < 2.0**-117


def test_zero_blocks_get_the_scale_of_the_floor() -> None:
    zero = torch.zeros(3)
    assert torch.equal(block_scale(zero, 448.0, 1e-4), block_scale(zero + 1e-4, 448.0, 1e-4))
    assert block_scale(zero, 6.0, 6.0 * 2.0**-126).tolist() == [2.0**-126] * 3


def test_every_code_equals_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    scales = e8m0.decode(codes)
    assert torch.equal(scales[:255].double(), 2.0 ** (torch.arange(255).double() - 127))
    assert scales[255].isnan()
    as_torch = codes.view(torch.float8_e8m0fnu)
    assert torch.equal(scales[1:255], as_torch.float()[1:255])
    assert torch.equal(e8m0.decode(as_torch)[:255], scales[:255])
    assert torch.equal(e8m0.encode(scales), codes)
    # torch's own cast, where it takes float32 subnormals too
    assert torch.equal(scales[:255].to(torch.float8_e8m0fnu).view(torch.uint8), codes[:255])


@pytest.mark.parametrize("wrong", [0.0, -0.0, -1.0, 3.0, 2.0**-128, math.inf, -math.inf, math.nan, 1.0000001])
def test_what_is_no_power_of_two_becomes_nan(wrong: float) -> None:
    assert e8m0.encode(torch.tensor([wrong, 1.0])).tolist() == [255, 127]


def test_scales_of_files() -> None:
    scale = torch.tensor([0.3, 2.0])
    assert e8m0.to_float32(scale) is scale, "files of the base models hold any float32"
    assert e8m0.to_float32(torch.tensor([127, 128], dtype=torch.uint8)).tolist() == [1.0, 2.0]
    assert e8m0.to_float32(scale.round().clamp_min(1).to(torch.float8_e8m0fnu)).tolist() == [1.0, 2.0]
    for dtype in (torch.bfloat16, torch.int8):
        with pytest.raises(ValueError, match=f"float32 or E8M0, got {dtype}"):
            e8m0.to_float32(torch.ones(2).to(dtype))
    with pytest.raises(ValueError, match="float32"):
        e8m0.encode(torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_broken_block_has_the_scale_nan(broken: float) -> None:
    found = block_scale(torch.tensor([broken, 448.0]), 448.0, 1e-4)
    assert found[0].isnan()
    assert found[1] == 1
