"""The rotary embedding against complex multiplication, and YaRN against its published borders."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leadline.ops.rope import frequencies, rope, rotations, unrotate_


def formula(x: Tensor, positions: Tensor, pairs: Tensor, inverse: bool) -> Tensor:
    """Pair k of token t, seen as a complex number, times exp(i t f_k); what lies before the rotary part stays."""
    x, width = x.double(), 2 * len(pairs)
    angle = positions.double()[:, None] * pairs.double()
    turn = torch.polar(torch.ones_like(angle), -angle if inverse else angle)
    if x.ndim == 3:
        turn = turn[:, None]
    rotary = torch.view_as_complex(x[..., -width:].reshape(*x.shape[:-1], width // 2, 2).contiguous())
    return torch.cat([x[..., :-width], torch.view_as_real(rotary * turn).flatten(-2)], dim=-1)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(
    ("shape", "width"),
    [
        ((1, 2), 2),
        ((3, 6), 4),
        ((4, 64), 64),
        ((5, 1, 4), 2),
        ((127, 3, 16), 8),
        ((129, 2, 10), 10),
        ((0, 2, 8), 4),
        ((3, 5), 4),
        ((4, 3, 7), 2),
    ],
)
def test_value_and_gradient(shape: tuple[int, ...], width: int, inverse: bool) -> None:
    x = torch.randn(shape, requires_grad=True)
    positions, pairs = torch.randint(0, 500, shape[:1]), frequencies(width, 100.0)
    y, expected = (
        rope(x, *rotations(positions, pairs), inverse=inverse),
        formula(x, positions, pairs, inverse),
    )
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    dy = torch.randn(shape)
    (found,), (wanted,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy.double())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_gradcheck(inverse: bool) -> None:
    rotation = rotations(torch.tensor([0, 7, 1000]), frequencies(4, 10000.0))
    for shape in ((3, 6), (3, 2, 6)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: rope(x, *rotation, inverse=inverse), (x,))


def test_any_layout_in_and_the_input_unchanged(scattered: Callable[[Tensor], Tensor]) -> None:
    x, rotation = torch.randn(5, 3, 8), rotations(torch.arange(5), frequencies(4, 10.0))
    kept = x.clone()
    torch.testing.assert_close(rope(scattered(x), *rotation), rope(x, *rotation), rtol=0, atol=0)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "width"), [((5, 3, 8), 4), ((3, 6), 6), ((127, 2, 9), 2), ((0, 2, 4), 2)])
def test_in_place_has_the_bits_of_the_inverse(shape: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    x, rotation = torch.randn(shape).to(dtype), rotations(torch.arange(shape[0]), frequencies(width, 10.0))
    wanted = rope(x, *rotation, inverse=True)
    assert unrotate_(x, *rotation) is x
    assert torch.equal(x, wanted)


def test_in_place_in_any_layout(scattered: Callable[[Tensor], Tensor]) -> None:
    x, rotation = torch.randn(5, 3, 8), rotations(torch.arange(5), frequencies(4, 10.0))
    view = scattered(x)
    unrotate_(view, *rotation)
    assert torch.equal(view, rope(x, *rotation, inverse=True))


def test_what_needs_a_gradient_is_not_changed_in_place() -> None:
    x, rotation = torch.randn(5, 8, requires_grad=True), rotations(torch.arange(5), frequencies(4, 10.0))
    for tensor in (x, x * 2):
        kept = tensor.detach().clone()
        with torch.no_grad(), pytest.raises(ValueError, match=r"requires a gradient; use rope\(..., inverse=True\)"):
            unrotate_(tensor, *rotation)
        assert torch.equal(tensor, kept)


@given(shift=st.integers(0, 1000), distance=st.integers(0, 200), seed=st.integers(0, 99))
def test_products_depend_on_the_distance_alone(shift: int, distance: int, seed: int) -> None:
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pairs = frequencies(8, 50.0)

    def product(query: int, key: int) -> Tensor:
        cos, sin = rotations(torch.tensor([query, key]), pairs)
        rotated = rope(torch.stack([q, k]), cos, sin)
        return rotated[0] @ rotated[1]

    torch.testing.assert_close(product(shift + distance, shift), product(distance, 0), rtol=1e-3, atol=1e-3)


def test_inverse_undoes_and_norms_stay() -> None:
    x, rotation = torch.randn(9, 2, 12), rotations(torch.arange(9) * 1000, frequencies(8, 1e4))
    y = rope(x, *rotation)
    torch.testing.assert_close(rope(y, *rotation, inverse=True), x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_angles_stay_float32_at_a_million_tokens() -> None:
    """A position beyond 256 is no bf16 number: the angles must not be computed in the model's dtype."""
    cos, sin = rotations(torch.tensor([1_048_575]), frequencies(64, 160000.0))
    assert cos.dtype == sin.dtype == torch.float32
    x = torch.randn(1, 64).bfloat16()
    expected = formula(x, torch.tensor([1_048_575]), frequencies(64, 160000.0), False)
    # FP32 angles of a million are off by at most half a step of 2^-4; bf16 angles would be anywhere.
    assert (rope(x, cos, sin).double() - expected).abs().max() < 0.1


def test_plain_frequencies() -> None:
    expected = torch.tensor([10000 ** (-2 * k / 64) for k in range(32)], dtype=torch.float64)
    torch.testing.assert_close(frequencies(64, 10000.0).double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(frequencies(64, 10000.0, factor=1.0, original_positions=5), frequencies(64, 10000.0))


def test_yarn_borders_of_the_released_models() -> None:
    """Pairs 0..15 untouched, 25..31 divided by 16, a straight ramp between (base 160000, 65536 positions)."""
    plain = frequencies(64, 160000.0)
    yarn = frequencies(64, 160000.0, factor=16.0, original_positions=65536)
    shares = (1 - yarn / plain) / (1 - 1 / 16)
    expected = torch.tensor([min(max((k - 15) / 10, 0.0), 1.0) for k in range(32)])
    torch.testing.assert_close(shares, expected, rtol=1e-5, atol=1e-5)


@given(
    half=st.integers(1, 40),
    base=st.floats(2.0, 1e6),
    factor=st.floats(1.0, 64.0),
    original=st.integers(1, 10**6),
    beta_slow=st.floats(0.1, 10.0),
    spread=st.floats(0.1, 50.0),
)
def test_yarn_only_slows_and_at_most_by_the_factor(
    half: int, base: float, factor: float, original: int, beta_slow: float, spread: float
) -> None:
    yarn = frequencies(
        2 * half, base, factor=factor, original_positions=original, beta_fast=beta_slow + spread, beta_slow=beta_slow
    )
    plain = frequencies(2 * half, base)
    assert yarn.shape == (half,)
    assert all(math.isfinite(value) for value in yarn.tolist())
    assert (yarn <= plain * (1 + 1e-6)).all()
    assert (yarn >= plain / factor * (1 - 1e-6)).all()
