"""E4M3 blocks against a table of all 256 codes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leadline.formats import e8m0, fp8

CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def nearest(x: float) -> float:
    """The E4M3 value closest to x; of two equally close ones that with the even code."""
    magnitudes = CODES[:127]  # the codes of the non-negative numbers, in order; 127 is NaN
    distance = (magnitudes - min(abs(x), 448.0)).abs()
    close = (distance == distance.min()).nonzero().flatten().tolist()
    code = close[0] if len(close) == 1 else next(code for code in close if code % 2 == 0)
    return math.copysign(magnitudes[code].item(), x)


def formula(x: Tensor, block: int) -> Tensor:
    result = torch.empty_like(x)
    for row, values in enumerate(x.tolist()):
        for start in range(0, len(values), block):
            part = values[start : start + block]
            amax = max(1e-4, *(abs(value) for value in part))
            scale = 2.0 ** math.ceil(math.log2(amax / 448))
            result[row, start : start + block] = torch.tensor([nearest(value / scale) * scale for value in part])
    return result


def test_the_table_is_e4m3() -> None:
    """Largest 448, smallest normal 2^-6, smallest subnormal 2^-9, no infinity."""
    finite = CODES[:127]
    assert finite.max() == 448
    assert finite[1] == 2.0**-9
    assert finite[8] == 2.0**-6
    assert CODES[127].isnan()


@pytest.mark.parametrize(("width", "block"), [(1, 64), (3, 64), (64, 64), (65, 64), (127, 32), (128, 128), (7, 1)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e5])
def test_equals_the_nearest_code_times_the_scale(width: int, block: int, size: float) -> None:
    x = torch.randn(5, width) * size
    assert torch.equal(fp8.fake_quantize(x, block), formula(x, block))


def test_every_code_stays_and_ties_go_to_even() -> None:
    """A block led by 448 has scale 1: its other values are rounded as torch rounds to float8_e4m3fn."""
    finite = CODES[:127].float()
    middles = (finite[1:] + finite[:-1]) / 2
    for values in (finite, -finite, middles, -middles):
        rounded = fp8.fake_quantize(torch.cat([values, torch.tensor([448.0])]), 256)[:-1]
        assert torch.equal(rounded, values.to(torch.float8_e4m3fn).float())
        assert rounded.tolist() == [nearest(value) for value in values.tolist()]
    assert torch.equal(fp8.fake_quantize(finite, 256), finite)


@given(st.integers(0, 999), st.sampled_from([1, 3, 64]), st.sampled_from([1e-5, 1.0, 1e4]))
def test_idempotent(seed: int, block: int, size: float) -> None:
    x = torch.randn(2, 100, generator=torch.Generator().manual_seed(seed)) * size
    once = fp8.fake_quantize(x, block)
    assert torch.equal(fp8.fake_quantize(once, block), once)


def test_error_bound() -> None:
    """At most half a step of 2^-3 of the value, or half the smallest step of the block's scale."""
    x = torch.randn(200, 64) * torch.logspace(-3, 3, 200)[:, None]
    error = (fp8.fake_quantize(x, 64) - x).abs()
    smallest_step = x.abs().amax(-1, keepdim=True) / 224 * 2.0**-9
    assert (error <= torch.maximum(x.abs() * 2.0**-4, smallest_step / 2)).all()


def test_unbiased() -> None:
    """The mean error is zero within five standard errors; truncation would be off by hundreds."""
    x = torch.rand(1000, 64) + 0.5
    error = (fp8.fake_quantize(x, 64) - x).double()
    assert abs(error.mean()) < 5 * error.std() / math.sqrt(error.numel())


def test_zero_blocks_and_neighbours() -> None:
    """A block of zeros stays zero, and one block's outlier does not touch the next."""
    x = torch.zeros(1, 128)
    assert torch.equal(fp8.fake_quantize(x, 64), x)
    x[0, :64] = 1.1
    alone = fp8.fake_quantize(x[:, :64], 64)
    x[0, 64] = 1e6
    assert torch.equal(fp8.fake_quantize(x, 64)[:, :64], alone)


@pytest.mark.parametrize("shape", [(0, 70), (2, 0, 64), (3, 0)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    """A chunk may finish no entry."""
    assert fp8.fake_quantize(torch.zeros(shape), 64).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shape_dtype_and_input_stay(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 70).to(dtype)
    kept = x.clone()
    y = fp8.fake_quantize(x, 64)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert torch.equal(x, kept)
    # E4M3 has fewer bits than bf16: what it rounds to is exact there too.
    assert torch.equal(y.float(), fp8.fake_quantize(x.float(), 64))


def weight_formula(w: Tensor) -> Tensor:
    result = torch.empty_like(w)
    for top in range(0, w.shape[0], 128):
        for left in range(0, w.shape[1], 128):
            tile = w[top : top + 128, left : left + 128]
            scale = 2.0 ** math.ceil(math.log2(max(1e-4, tile.abs().max().item()) / 448))
            rounded = (tile / scale).to(torch.float8_e4m3fn).float() * scale
            result[top : top + 128, left : left + 128] = rounded
    return result


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (1, 1), (129, 127), (5, 300), (128, 129)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e5])
def test_weights_in_tiles(shape: tuple[int, int], size: float) -> None:
    w = torch.randn(shape) * torch.logspace(-2, 2, shape[1]) * size
    codes, scale = fp8.quantize_weight(w)
    assert (codes.dtype, codes.shape) == (torch.float8_e4m3fn, w.shape)
    assert scale.shape == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
    assert torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5)), "powers of two"
    assert torch.equal(fp8.dequantize_weight(codes, scale), weight_formula(w))
    again = fp8.quantize_weight(fp8.dequantize_weight(codes, scale))
    assert torch.equal(fp8.dequantize_weight(*again), fp8.dequantize_weight(codes, scale))


def test_a_stack_is_its_weights() -> None:
    w = torch.randn(2, 3, 130, 140) * torch.logspace(-4, 4, 6).view(2, 3, 1, 1)
    codes, scale = fp8.quantize_weight(w)
    values = fp8.dequantize_weight(codes, scale)
    for index in [(0, 0), (1, 2)]:
        alone = fp8.quantize_weight(w[index])
        assert torch.equal(codes[index].view(torch.uint8), alone[0].view(torch.uint8))
        assert torch.equal(scale[index], alone[1])
        assert torch.equal(values[index], fp8.dequantize_weight(*alone))


@pytest.mark.parametrize(("width", "block"), [(64, 64), (65, 64), (127, 128), (300, 128)])
def test_codes_and_scales(width: int, block: int) -> None:
    x = torch.randn(2, 3, width).bfloat16()
    codes, scale = fp8.quantize(x, block)
    assert (codes.dtype, codes.shape, scale.shape) == (torch.float8_e4m3fn, x.shape, (2, 3, math.ceil(width / block)))
    values = codes.float() * scale.repeat_interleave(block, -1)[..., :width]
    assert torch.equal(fp8.dequantize(codes, scale, block), values)
    assert torch.equal(values, fp8.fake_quantize(x.float(), block))


def test_scales_in_a_byte_or_of_any_size() -> None:
    codes, scale = fp8.quantize_weight(torch.randn(130, 200))
    as_bytes = e8m0.encode(scale)
    assert torch.equal(fp8.dequantize_weight(codes, as_bytes), fp8.dequantize_weight(codes, scale))
    assert torch.equal(
        fp8.dequantize_weight(codes, as_bytes.view(torch.float8_e8m0fnu)), fp8.dequantize_weight(codes, scale)
    )
    assert torch.equal(fp8.dequantize_weight(codes, scale * 0.3)[0, 0], codes[0, 0].float() * (scale[0, 0] * 0.3))
    with pytest.raises(ValueError, match=r"\[130, 200\] need scales \[2, 2\], got \[2, 1\]"):
        fp8.dequantize_weight(codes, scale[:, :1])
    with pytest.raises(ValueError, match=r"\[130, 200\] need scales \[130, 2\], got \[2, 2\]"):
        fp8.dequantize(codes, scale, 128)


@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan])
def test_a_broken_value_breaks_its_block_only(broken: float) -> None:
    x = torch.ones(1, 256)
    x[0, 5] = broken
    values = fp8.fake_quantize(x, 128)
    assert values[0, :128].isnan().all()
    assert torch.equal(values[0, 128:], x[0, 128:])


def test_rounding_up_is_as_likely_as_down() -> None:
    """Of n values spread evenly between two codes, the number rounded up is binomial(n, 1/2): within five standard
    deviations, n/2 +- 2.5 sqrt(n)."""
    n = 10_000
    x = torch.rand(n, 1) * 0.125 + 1.0  # the codes 1 and 1.125 of a block led by 448
    led = torch.cat([x, torch.full((n, 1), 448.0)], dim=1)
    up = int((fp8.fake_quantize(led, 2)[:, 0] == 1.125).sum())
    assert abs(up - n / 2) < 2.5 * math.sqrt(n)
