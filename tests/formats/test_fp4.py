"""E2M1 blocks against the table of all sixteen codes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leadline.formats import e8m0, fp4, fp8

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


def test_every_code_through_pairs_and_back() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = fp4.decode(codes)
    assert values.tolist() == [*MAGNITUDES, *(-m for m in MAGNITUDES)]
    assert values[8].signbit()
    assert torch.equal(fp4.encode(values), codes)
    every_pair = torch.cartesian_prod(codes, codes)
    packed = fp4.pack(every_pair)
    assert packed.shape == (256, 1)
    assert len(packed.unique()) == 256
    assert torch.equal(packed[:, 0] & 15, every_pair[:, 0]), "the even index is in the low nibble"
    for dtype in (torch.uint8, torch.int8, torch.float4_e2m1fn_x2):
        assert torch.equal(fp4.unpack(packed.view(dtype)), every_pair)
    with pytest.raises(ValueError, match="in pairs, got a last axis of 3"):
        fp4.pack(codes[:3])


@pytest.mark.parametrize(("shape", "block"), [((3, 64), 32), ((2, 3, 4), 2), ((0, 32), 32), ((2, 6), 3)])
def test_packed_is_what_fake_quantisation_gives(shape: tuple[int, ...], block: int) -> None:
    x = torch.randn(shape).bfloat16()
    packed, scale = fp4.quantize(x, block)
    assert (packed.dtype, packed.shape) == (torch.uint8, (*shape[:-1], shape[-1] // 2))
    assert (scale.dtype, scale.shape) == (torch.float32, (*shape[:-1], shape[-1] // block))
    assert torch.equal(fp4.dequantize(packed, scale), fp4.fake_quantize(x.float(), block))
    assert torch.equal(fp4.dequantize(packed, e8m0.encode(scale)), fp4.dequantize(packed, scale))


def test_scales_that_do_not_fit() -> None:
    packed, scale = fp4.quantize(torch.randn(3, 96))
    for wrong in (scale[:2], torch.ones(3, 5), torch.ones(3, 0)):
        with pytest.raises(ValueError, match=r"packed codes \[3, 48\] do not fit scales"):
            fp4.dequantize(packed, wrong)


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_broken_value_breaks_its_block_only(broken: float) -> None:
    x = torch.ones(1, 6)
    x[0, 2] = broken
    values = fp4.dequantize(*fp4.quantize(x, 3))
    assert values[0, :3].isnan().all()
    assert torch.equal(values[0, 3:], x[0, 3:])


def test_rounding_up_is_as_likely_as_down() -> None:
    """Of n values spread evenly between two codes, the number rounded up is binomial(n, 1/2): within five standard
    deviations, n/2 +- 2.5 sqrt(n)."""
    n = 10_000
    x = torch.rand(n) + 2.0
    up = int((fp4.round_to_e2m1(x) == 3.0).sum())
    assert abs(up - n / 2) < 2.5 * math.sqrt(n)


@pytest.mark.parametrize("shape", [(128, 128), (256, 256), (2, 3, 130, 160), (1, 32), (5, 416)])
@pytest.mark.parametrize("spread", [0, 5, 11])
def test_eight_bits_hold_four_without_loss(shape: tuple[int, ...], spread: int) -> None:
    """Every code under every sub-scale up to 2^11 below the largest one of its block."""
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    exponents = torch.randint(0, spread + 1, (*shape[:-1], shape[-1] // 32))
    packed, scale = fp4.pack(codes), torch.exp2(exponents - 20.0)
    values, block_scale = fp4.to_fp8(packed, scale)
    assert values.dtype == torch.float8_e4m3fn
    assert torch.equal(fp8.dequantize_weight(values, block_scale), fp4.dequantize(packed, scale))
    assert torch.equal(fp4.to_fp8(packed, e8m0.encode(scale))[1], block_scale)
    if shape == (128, 128) and spread:
        assert block_scale == scale.max() / 64


def test_a_wider_spread_is_refused_unless_it_is_of_zeros() -> None:
    packed, scale = torch.full((1, 300, 160), 0x11, dtype=torch.uint8), torch.ones(1, 300, 10)
    scale[0, 140, 5] = 2.0**-12
    with pytest.raises(ValueError, match=r"w1: the sub-scales of block \[0, 1, 1\] differ by 2\^12"):
        fp4.to_fp8(packed, scale, "w1")
    packed[0, 140, 80:96] = 0x80  # zeros, one of them negative
    values, block_scale = fp4.to_fp8(packed, scale, "w1")
    assert torch.equal(fp8.dequantize_weight(values, block_scale), fp4.dequantize(packed, scale))
    scale[0, 3, 0] = 2.0**100
    packed[0, 3, :16] = 0
    assert torch.equal(fp4.fp8_scale(packed, scale), block_scale)


def test_a_block_of_zeros_and_tiny_scales() -> None:
    packed, scale = fp4.quantize(torch.zeros(128, 256))
    values, block_scale = fp4.to_fp8(packed, scale)
    assert not values.float().any()
    assert torch.equal(block_scale, torch.full((1, 2), 2.0**-126))
    packed, scale = fp4.quantize(torch.randn(128, 128) * 2.0**-122)
    values, block_scale = fp4.to_fp8(packed, scale)
    assert torch.equal(fp8.dequantize_weight(values, block_scale), fp4.dequantize(packed, scale))


@pytest.mark.parametrize("broken", [math.nan, 3.0, 0.0, -1.0, math.inf])
def test_broken_scales_of_a_weight(broken: float) -> None:
    packed, scale = fp4.quantize(torch.randn(4, 64))
    scale[2, 1] = broken
    with pytest.raises(ValueError, match="experts: a scale is NaN or no power of two"):
        fp4.to_fp8(packed, scale, "experts")
    with pytest.raises(ValueError, match=r"experts: packed codes \[4, 32\] need scales \[4, 2\].*got \[4, 1\]"):
        fp4.to_fp8(packed, scale[:, :1], "experts")
