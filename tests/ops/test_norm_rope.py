"""Norm, rotation and rounding in one pass: the same numbers as one operation after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from leadline.formats import fp4, fp8, hadamard
from leadline.ops.norm_rope import norm_rope
from leadline.ops.rms_norm import rms_norm
from leadline.ops.rope import rope, rotations

EPS = 1e-6
NORMS = ["none", "weightless", "weight"]


def angles(tokens: int, rotary: int) -> tuple[Tensor, Tensor]:
    return rotations(torch.randint(0, 1000, (tokens,)), torch.rand(rotary // 2))


def norm_of(name: str, width: int) -> dict[str, Any]:
    """The arguments that say which norm."""
    return {"none": {}, "weightless": {"eps": EPS}, "weight": {"eps": EPS, "weight": torch.rand(width)}}[name]


def one_after_the_other(x: Tensor, cos: Tensor, sin: Tensor, norm: dict[str, Any]) -> Tensor:
    return rope(rms_norm(x, norm.get("weight"), EPS) if norm else x, cos, sin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("shape", "rotary"), [((1, 2), 2), ((3, 6), 4), ((5, 3, 16), 8), ((127, 2, 32), 32), ((0, 2, 8), 4)]
)
def test_without_rounding(shape: tuple[int, ...], rotary: int, norm: str, dtype: torch.dtype) -> None:
    x, rotation, arguments = torch.randn(shape).to(dtype), angles(shape[0], rotary), norm_of(norm, shape[-1])
    y = norm_rope(x, *rotation, **arguments)
    assert y.dtype == dtype
    assert torch.equal(y, one_after_the_other(x, *rotation, arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("width", "rotary"), [(96, 32), (512, 64), (80, 16), (16, 16), (32, 2)])
def test_keys_are_fp8_and_bf16(width: int, rotary: int, norm: str, dtype: torch.dtype) -> None:
    x, rotation, arguments = torch.randn(5, width).to(dtype), angles(5, rotary), norm_of(norm, width)
    kept = x.clone()
    y, plain = norm_rope(x, *rotation, **arguments, rounding="fp8"), one_after_the_other(x, *rotation, arguments)
    assert y.dtype == dtype
    assert torch.equal(y[:, -rotary:], plain[:, -rotary:].bfloat16().to(dtype))
    assert torch.equal(y[:, :-rotary], fp8.fake_quantize(plain[:, :-rotary], 64))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("norm", NORMS)
def test_index_vectors_are_rotated_twice_and_rounded(norm: str) -> None:
    x, rotation, arguments = torch.randn(5, 3, 64), angles(5, 16), norm_of(norm, 64)
    y, plain = norm_rope(x, *rotation, **arguments, rounding="fp4"), one_after_the_other(x, *rotation, arguments)
    assert torch.equal(y, fp4.fake_quantize(hadamard.rotate(plain)))


@pytest.mark.parametrize("rounding", ["fp8", "fp4"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_passes_straight_through(norm: str, rounding: Any) -> None:
    x, rotation, arguments = torch.randn(4, 64, requires_grad=True), angles(4, 16), norm_of(norm, 64)
    inputs = [x, *(part.requires_grad_() for name, part in arguments.items() if name == "weight")]
    dy = torch.randn(4, 64)
    plain = one_after_the_other(x, *rotation, arguments)
    wanted = torch.autograd.grad(plain, inputs, hadamard.rotate(dy) if rounding == "fp4" else dy)
    found = torch.autograd.grad(norm_rope(x, *rotation, **arguments, rounding=rounding), inputs, dy)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm: str) -> None:
    cos, sin = angles(3, 4)
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, dtype=torch.float64, requires_grad=True)
    inputs = (x, weight) if norm == "weight" else (x,)

    def function(x: Tensor, weight: Tensor | None = None) -> Tensor:
        return norm_rope(x, cos, sin, weight=weight, eps=None if norm == "none" else 1e-3)

    assert torch.autograd.gradcheck(function, inputs)


def test_any_layout_in(scattered: Callable[[Tensor], Tensor]) -> None:
    x, rotation, weight = torch.randn(5, 3, 32), angles(5, 8), torch.rand(32)
    wanted = norm_rope(x, *rotation, weight=weight, eps=EPS, rounding="fp8")
    found = norm_rope(
        scattered(x), *map(scattered, rotation), weight=scattered(weight), eps=EPS, rounding="fp8"
    )  # fmt: skip
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("width", "rotary", "rounding", "message"),
    [
        (9, 4, None, "vectors of 9 values have no 2 pairs at their end"),
        (6, 8, "fp8", "vectors of 6 values have no 4 pairs at their end"),
        (96, 8, "fp4", "vectors of 96 values cannot be rounded to FP4"),
        (16, 8, "fp4", "vectors of 16 values cannot be rounded to FP4"),
    ],
)
def test_widths_that_cannot_be(width: int, rotary: int, rounding: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        norm_rope(torch.randn(2, width), *angles(2, rotary), rounding=rounding)
