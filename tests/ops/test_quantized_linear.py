"""Products with quantised weights against arithmetic on exact numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.formats import e8m0, fp4, fp8
from leadline.ops.quantized_linear import (
    FORMATS,
    Format,
    QuantizedWeight,
    quantize,
    quantized_grouped_linear,
    quantized_linear,
)

COUNTS = {
    "one expert": [5],
    "experts without rows": [0, 4, 0, 0, 1, 0],
    "no rows": [0, 0],
    "uneven": [127, 1, 2],
}


def one_by_one(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """The documented order: exact sums over 128 columns, rounded to FP32, scaled, added in FP32."""
    codes, scale = fp8.quantize(x, 128)
    as_fp8 = (weight.codes, weight.scale) if weight.format == "fp8" else fp4.to_fp8(weight.codes, weight.scale)
    w, w_scale = as_fp8[0].double(), e8m0.to_float32(as_fp8[1])
    y = torch.zeros(len(x), len(w))
    for t in range(len(x)):
        for o in range(len(w)):
            for slab in range(scale.shape[1]):
                columns = slice(128 * slab, 128 * slab + 128)
                exact = math.fsum((codes[t, columns].double() * w[o, columns]).tolist())
                y[t, o] += torch.tensor(exact).float() * (scale[t, slab] * w_scale[o // 128, slab])
    return y


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 1, 32), (3, 5, 128), (2, 3, 160), (3, 131, 416)])
def test_the_documented_order(format: Format, tokens: int, rows: int, columns: int) -> None:
    x, w = torch.randn(tokens, columns), torch.randn(rows, columns) * torch.logspace(-1, 1, columns)
    weight = quantize(w, format)
    assert weight.shape == (rows, columns)
    y = quantized_linear(x, weight)
    assert torch.equal(y, one_by_one(x, weight))
    plain = fp8.fake_quantize(x, 128).double() @ weight.values().double().T
    torch.testing.assert_close(y.double(), plain, rtol=1e-5, atol=1e-5)


@settings(max_examples=20)
@given(st.integers(1, 7), st.integers(1, 140), st.integers(1, 9), st.integers(0, 99), st.sampled_from([1e-3, 1.0, 1e4]))
def test_four_bits_are_multiplied_as_the_eight_they_equal(
    tokens: int, rows: int, groups: int, seed: int, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 32 * groups, generator=generator) * size
    weight = quantize(torch.randn(rows, 32 * groups, generator=generator) * size, "fp4")
    as_fp8 = QuantizedWeight.of(*fp4.to_fp8(weight.codes, weight.scale))
    assert torch.equal(quantized_linear(x, weight), quantized_linear(x, as_fp8))
    assert torch.equal(weight.values(), as_fp8.values())


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_does_not_depend_on_its_neighbours(format: Format) -> None:
    x, weight = torch.randn(70, 320), quantize(torch.randn(40, 320), format)
    together = quantized_linear(x, weight)
    assert torch.equal(quantized_linear(x[:1], weight), together[:1])
    assert torch.equal(quantized_linear(x[3:69], weight), together[3:69])
    assert torch.equal(quantized_linear(x.flip(0), weight), together.flip(0))
    x[1] = math.nan
    assert torch.equal(quantized_linear(x, weight)[2:], together[2:])
    assert quantized_linear(x, weight)[1].isnan().all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_grouped_is_expert_by_expert(format: Format, counts: list[int]) -> None:
    x, counts_E = torch.randn(sum(counts), 160), torch.tensor(counts)
    weights = [quantize(torch.randn(len(counts), rows, 160), format) for rows in (3, 130)]
    results = quantized_grouped_linear(x, weights, counts_E)
    for weight, y in zip(weights, results, strict=True):
        parts = [quantized_linear(part, weight[e]) for e, part in enumerate(x.split(counts))]
        assert torch.equal(y, torch.cat(parts))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_and_shapes(format: Format, dtype: torch.dtype) -> None:
    weight = quantize(torch.randn(6, 64), format)
    x = torch.randn(2, 3, 64).to(dtype)
    y = quantized_linear(x, weight)
    assert (y.shape, y.dtype) == ((2, 3, 6), dtype)
    assert torch.equal(y, quantized_linear(x.float(), weight).to(dtype))
    assert quantized_linear(x[:0], weight).shape == (0, 3, 6)
    (z,) = quantized_grouped_linear(x[0], [quantize(torch.randn(2, 6, 64), format)], torch.tensor([1, 2]))
    assert (z.shape, z.dtype) == ((3, 6), dtype)


@pytest.mark.parametrize("format", FORMATS)
def test_any_layout_in(format: Format, scattered: Callable[[Tensor], Tensor]) -> None:
    x, w = torch.randn(5, 64), torch.randn(3, 4, 64)
    plain, strided = quantize(w, format), quantize(scattered(w), format)
    counts = torch.tensor([2, 0, 3])
    assert torch.equal(quantized_linear(x, plain[0]), quantized_linear(scattered(x), strided[0]))
    (y,) = quantized_grouped_linear(x, [plain], counts)
    assert torch.equal(quantized_grouped_linear(scattered(x), [strided], scattered(counts))[0], y)


@pytest.mark.parametrize("format", FORMATS)
def test_gradient_is_that_of_the_rounded_weight(format: Format) -> None:
    x = torch.randn(4, 96, requires_grad=True)
    weight, dy = quantize(torch.randn(10, 96), format), torch.randn(4, 10)
    (dx,) = torch.autograd.grad(quantized_linear(x, weight), x, dy)
    torch.testing.assert_close(dx, dy @ weight.values())
    stacks = [quantize(torch.randn(3, 10, 96), format) for _ in range(2)]
    counts = torch.tensor([1, 0, 3])
    first, second = quantized_grouped_linear(x, stacks, counts)
    (dx,) = torch.autograd.grad([first, second], x, [dy, 2 * dy])
    for rows, expert in ((slice(0, 1), 0), (slice(1, 4), 2)):
        wanted = dy[rows] @ stacks[0].values()[expert] + 2 * dy[rows] @ stacks[1].values()[expert]
        torch.testing.assert_close(dx[rows], wanted, rtol=1e-5, atol=1e-5)


def test_memory_of_a_stack_is_rounded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from leadline.ops.quantized_linear import weight as module

    w = torch.randn(5, 130, 64)
    for format in FORMATS:
        whole = quantize(w, format)
        monkeypatch.setattr(module, "_VALUES_AT_ONCE", 2 * 130 * 64)
        pieces = quantize(w, format)
        monkeypatch.undo()
        assert torch.equal(whole.codes.view(torch.uint8), pieces.codes.view(torch.uint8))
        assert torch.equal(whole.scale.view(torch.uint8), pieces.scale.view(torch.uint8))
        assert whole.shape == pieces.shape == w.shape
        assert torch.equal(whole.values(), pieces.values())


def test_scales_of_the_base_models() -> None:
    w = torch.randn(130, 256)
    bytes_, floats = quantize(w, "fp8"), quantize(w, "fp8", scale_dtype=torch.float32)
    assert (bytes_.scale.dtype, floats.scale.dtype) == (torch.float8_e8m0fnu, torch.float32)
    x = torch.randn(3, 256)
    assert torch.equal(quantized_linear(x, bytes_), quantized_linear(x, floats))
    third = QuantizedWeight.of(floats.codes, floats.scale / 3)
    torch.testing.assert_close(quantized_linear(x, third), quantized_linear(x, floats) / 3, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    codes, scale = fp8.quantize_weight(torch.randn(130, 64))
    with pytest.raises(ValueError, match=r"wq_a: codes \[130, 64\] need scales \[2, 1\], got \[1, 1\]"):
        QuantizedWeight.of(codes, scale[:1], "wq_a")
    with pytest.raises(ValueError, match=r"wq_a: torch.int32 is no quantised format"):
        QuantizedWeight.of(torch.zeros(4, 4, dtype=torch.int32), scale, "wq_a")
    with pytest.raises(ValueError, match=r"torch.bfloat16 and torch.float32: do not cast"):
        QuantizedWeight(codes.bfloat16(), scale)
    with pytest.raises(ValueError, match=r"torch.bfloat16: do not cast"):
        QuantizedWeight(codes, scale.bfloat16())
    wide = torch.ones(2, 64)
    wide[1, 32:] = 2.0**-13
    with pytest.raises(ValueError, match=r"experts.w1: the sub-scales of block \[0, 0\] differ by 2\^13"):
        quantize(wide, "fp4", "experts.w1")
