"""The kernel of norm, rotation and rounding against the reference: interpreted in float32, compiled in both dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.formats import fp4, hadamard
from leadline.formats.cache_entry import round_keys
from leadline.ops.dispatch import implementation
from leadline.ops.norm_rope import Rounding, norm_rope
from leadline.ops.rms_norm import rms_norm
from leadline.ops.rope import rope, rotations

EPS = 1e-6
# tokens, heads (0 = no axis of heads), width, rotated part
Shape = tuple[int, int, int, int]
SHAPES: list[Shape] = [(1, 0, 2, 2), (3, 2, 8, 8), (127, 0, 10, 6), (5, 7, 20, 12), (0, 2, 8, 4), (2, 0, 1280, 64)]
GPU_SHAPES: list[Shape] = [
    (1, 64, 512, 64),
    (1, 0, 512, 64),
    (127, 64, 512, 64),
    (4001, 5, 128, 64),
    (4001, 0, 512, 64),
    (127, 8, 96, 32),
    (129, 64, 64, 64),
    (0, 2, 8, 4),
]
NORMS = ["none", "weightless", "weight"]


def inputs(shape: Shape, norm: str, device: str = "cpu") -> list[Tensor | None]:
    """x, weight, cos, sin."""
    tokens, heads, width, rotary = shape
    x = torch.randn((tokens, heads, width) if heads else (tokens, width), device=device)
    positions = torch.randint(0, 1000, (tokens,), device=device)
    weight = torch.rand(width, device=device) if norm == "weight" else None
    return [x, weight, *rotations(positions, torch.rand(rotary // 2, device=device))]


def operation(norm: str, rounding: Rounding | None = None) -> Callable[..., Tensor]:
    eps = None if norm == "none" else EPS
    return lambda x, weight, cos, sin: norm_rope(x, cos, sin, weight=weight, eps=eps, rounding=rounding)


def hostile(rows: int, width: int, device: str = "cpu") -> Tensor:
    """Blocks of zeros, tiny and huge ones, ties between codes."""
    x = torch.randn(rows, width, device=device) * torch.exp(4 * torch.randn(rows, 1, device=device))
    x[0] = 0.0
    x[1:3] = torch.randint(-16, 17, (2, width), device=device) / 4
    x[3] *= 1e-30
    x[4] *= 1e25
    return x


def unturned(rows: int, rotary: int, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """A rotation by nothing."""
    return torch.ones(rows, rotary // 2, device=device), torch.zeros(rows, rotary // 2, device=device)


def rounded(x: Tensor, rotary: int, rounding: Rounding) -> Tensor:
    return round_keys(x, rotary) if rounding == "fp8" else fp4.fake_quantize(hadamard.rotate(x))


def check_rounding(x: Tensor, rotary: int, rounding: Rounding) -> None:
    """Bits of the rounding alone."""
    with implementation("kernel"):
        y = norm_rope(x, *unturned(len(x), rotary, x.device), rounding=rounding)
    assert torch.equal(y, rounded(x, rotary, rounding))


@pytest.mark.interpret
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_interpreted(shape: Shape, norm: str, against_reference: Callable[..., None]) -> None:
    against_reference(operation(norm), inputs(shape, norm), 2e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("shape", "rounding"),
    [
        ((3, 0, 512, 64), "fp8"),
        ((5, 2, 80, 16), "fp8"),
        ((129, 0, 16, 8), "fp8"),
        ((3, 0, 32, 16), "fp4"),
        ((2, 3, 64, 16), "fp4"),
    ],
    ids=str,
)
def test_interpreted_rounding(shape: Shape, norm: str, rounding: Rounding) -> None:
    """Values and gradients; a value at a border may fall to either side, because norms add up in another order."""
    parts: list[Any] = inputs(shape, norm)
    results, dy = [], torch.randn_like(parts[0])
    for name in ("kernel", "reference"):
        with implementation(name):
            leaves = [x.clone().requires_grad_() if x is not None else None for x in parts[:2]]
            y = operation(norm, rounding)(*leaves, *parts[2:])
            results.append((y.detach(), *torch.autograd.grad(y, [x for x in leaves if x is not None], dy)))
    (y, *gradients), (wanted, *wanted_gradients) = results
    assert (y == wanted).double().mean() > 0.99
    torch.testing.assert_close(y, wanted, rtol=0.5, atol=0.5)
    for ours, theirs in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("width", "rotary", "rounding"),
    [(512, 64, "fp8"), (80, 16, "fp8"), (16, 8, "fp8"), (16, 16, "fp8"), (32, 16, "fp4"), (128, 64, "fp4")],
)
def test_interpreted_bits_of_the_rounding(width: int, rotary: int, rounding: Rounding) -> None:
    check_rounding(hostile(9, width), rotary, rounding)


@pytest.mark.interpret
@settings(max_examples=10)
@given(st.lists(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100), min_size=32, max_size=32))
def test_any_values(values: list[float]) -> None:
    """At any magnitude whose sums stay finite."""
    x = torch.tensor(values).view(1, 32)
    check_rounding(x, 2, "fp8")
    check_rounding(x, 2, "fp4")


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, of the interpreter
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize(("rounding", "spoiled"), [("fp8", 64), ("fp4", 128)])
def test_a_broken_block_stays_broken(broken: float, rounding: Rounding, spoiled: int) -> None:
    """And no other, but that the Hadamard rotation spreads it over the vector."""
    x = torch.ones(2, 128)
    x[0, 3] = broken
    with implementation("kernel"):
        y = norm_rope(x, *unturned(2, 16), rounding=rounding)
    assert y[0, :spoiled].isnan().all()
    assert torch.equal(y[0, spoiled:], torch.ones(128 - spoiled))
    assert y[1].isfinite().all()


@pytest.mark.interpret
def test_values_that_pass_through_are_untouched() -> None:
    """Also beside NaN and infinity in the rotated part."""
    x, _, cos, sin = inputs((3, 2, 10, 4), "none")
    assert x is not None
    x[..., 6:] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    with implementation("kernel"):
        assert torch.equal(operation("none")(x, None, cos, sin)[..., :6], x[..., :6])


@pytest.mark.interpret
def test_any_layout_in(scattered: Callable[[Tensor], Tensor], against_reference: Callable[..., None]) -> None:
    parts = [scattered(x) for x in inputs((5, 3, 10, 4), "weight") if x is not None]
    against_reference(operation("weight"), parts, 2e-6)


@pytest.mark.interpret
def test_more_rows_than_partial_sums(against_reference: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    from leadline.ops.norm_rope import kernel

    monkeypatch.setattr(kernel, "PARTIAL_SUMS", 3)
    monkeypatch.setattr(kernel, "VALUES_PER_WARP", 64)
    monkeypatch.setattr(kernel, "FEW_WARPS", 2)
    against_reference(operation("weight"), inputs((23, 2, 8, 4), "weight"), 2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float32, 2e-6)])
def test_compiled(
    shape: Shape, norm: str, dtype: torch.dtype, tolerance: float, against_reference: Callable[..., None]
) -> None:
    x, weight, *rotation = inputs(shape, norm, "cuda")
    assert x is not None
    weight = None if weight is None else weight.to(dtype)
    against_reference(operation(norm), [x.to(dtype), weight, *rotation], tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "width", "rotary", "rounding"),
    [
        (4001, 512, 64, "fp8"),
        (127, 96, 32, "fp8"),
        (129, 80, 16, "fp8"),
        (4001, 128, 64, "fp4"),
        (127, 64, 16, "fp4"),
        (8192, 32, 16, "fp4"),
    ],
)
def test_compiled_bits_of_the_rounding(
    rows: int, width: int, rotary: int, rounding: Rounding, dtype: torch.dtype
) -> None:
    check_rounding(hostile(rows, width, "cuda").to(dtype), rotary, rounding)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("shape", "rounding"), [((4001, 0, 512, 64), "fp8"), ((127, 64, 128, 64), "fp4")], ids=str)
def test_compiled_like_one_kernel_after_the_other(shape: Shape, norm: str, rounding: Rounding) -> None:
    """In bfloat16, where every step rounds: but for sums that lie in the middle of two steps, the same bits."""
    x, weight, cos, sin = inputs(shape, norm, "cuda")
    assert x is not None
    assert cos is not None
    assert sin is not None
    x = x.bfloat16()
    with implementation("kernel"):
        y = operation(norm, rounding)(x, weight, cos, sin)
        plain = rope(x if norm == "none" else rms_norm(x, weight, EPS), cos, sin)
    assert (y == rounded(plain, shape[-1], rounding)).double().mean() > 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", [None, "fp8", "fp4"])
def test_a_vector_does_not_depend_on_how_many_come_with_it(rounding: Rounding | None) -> None:
    parts: list[Any] = inputs((4001, 64, 128, 64), "weight", "cuda")
    x, weight, cos, sin = parts
    x = x.bfloat16()
    with implementation("kernel"):
        many = operation("weight", rounding)(x, weight, cos, sin)
        for one in (slice(0, 1), slice(77, 80), slice(4000, 4001)):
            assert torch.equal(operation("weight", rounding)(x[one], weight, cos[one], sin[one]), many[one])
