"""E4M3 blocks against a table of all 256 codes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leadline.formats import fp8

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
