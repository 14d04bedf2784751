"""The rotation kernel against the reference: interpreted in float32, compiled in bfloat16 and float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.dispatch import implementation
from leadline.ops.rope import rope, rotations, unrotate_

# tokens, heads (0 = no axis of heads), width, rotated part
SHAPES = [(1, 0, 2, 2), (3, 2, 8, 8), (127, 0, 9, 6), (5, 7, 20, 12), (4001, 0, 3, 2), (0, 2, 8, 4)]
GPU_SHAPES = [(1, 64, 512, 64), (127, 64, 512, 64), (4001, 5, 128, 64), (4001, 0, 512, 64), (127, 8, 96, 32)]


def inputs(shape: tuple[int, int, int, int], device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, width, rotated = shape
    x = torch.randn((tokens, heads, width) if heads else (tokens, width), device=device)
    positions = torch.randint(0, 1000, (tokens,), device=device)
    return x, *rotations(positions, torch.rand(rotated // 2, device=device))


@pytest.mark.interpret
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("inverse", [False, True], ids=["forth", "back"])
def test_interpreted(shape: tuple[int, int, int, int], inverse: bool, against_reference: Callable[..., None]) -> None:
    against_reference(lambda x, cos, sin: rope(x, cos, sin, inverse=inverse), inputs(shape), 2e-6)


@pytest.mark.interpret
def test_any_layout_in(scattered: Callable[[Tensor], Tensor], against_reference: Callable[..., None]) -> None:
    against_reference(rope, [scattered(x) for x in inputs((5, 3, 10, 4))], 2e-6)


@pytest.mark.interpret
def test_values_that_pass_through_are_untouched() -> None:
    """Also beside NaN and infinity in the rotated part."""
    x, cos, sin = inputs((3, 2, 10, 4))
    x[..., 6:] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    with implementation("kernel"):
        assert torch.equal(rope(x, cos, sin)[..., :6], x[..., :6])


def check_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The same bits as out of place, whether the rows lie one behind the other or not."""
    with implementation("kernel"):
        wanted = rope(x, cos, sin, inverse=True)
        room = torch.full((*x.shape[:-1], x.shape[-1] + 3), 7.0, dtype=x.dtype, device=x.device)
        room[..., 1:-2] = x
        unrotate_(room[..., 1:-2], cos, sin)
        unrotate_(x, cos, sin)
    assert torch.equal(x, wanted)
    assert torch.equal(room[..., 1:-2], wanted)
    assert (room[..., [0, -2, -1]] == 7.0).all()


@pytest.mark.interpret
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_in_place(shape: tuple[int, int, int, int]) -> None:
    check_in_place(*inputs(shape))


@pytest.mark.interpret
def test_in_place_traced_as_one_operation() -> None:
    x, cos, sin = inputs((3, 2, 8, 4))
    wanted = rope(x, cos, sin, inverse=True) * 2
    with implementation("kernel"):
        compiled = torch.compile(lambda x: unrotate_(x * 1, cos, sin) * 2, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_compiled_in_place(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x, cos, sin = inputs(shape, "cuda")
    check_in_place(x.to(dtype), cos, sin)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-3), (torch.float32, 1e-6)])
def test_compiled(
    shape: tuple[int, int, int, int], dtype: torch.dtype, tolerance: float, against_reference: Callable[..., None]
) -> None:
    x, cos, sin = inputs(shape, "cuda")
    against_reference(rope, [x.to(dtype), cos, sin], tolerance)
