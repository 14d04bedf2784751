"""The hyper-connection kernels against the reference: interpreted in float32, compiled in bfloat16 and float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.dispatch import implementation
from leadline.ops.hyper_connection import mix_in, mix_out

# tokens, streams, width
SHAPES = [(1, 4, 6), (7, 4, 32), (33, 4, 4), (5, 3, 17), (3, 1, 8), (2, 2, 1030)]
GPU_SHAPES = [(1, 4, 4096), (127, 4, 4096), (4001, 4, 4096), (127, 4, 7168), (300, 4, 384)]


def mix_in_inputs(tokens: int, streams: int, width: int, device: str = "cpu") -> list[Tensor]:
    rows = (2 + streams) * streams
    x = torch.randn(tokens, streams, width, device=device)
    fn = torch.randn(rows, streams * width, device=device) * (streams * width) ** -0.5
    return [x, fn, torch.randn(rows, device=device), 1 + 0.3 * torch.randn(3, device=device)]


def mix_out_inputs(tokens: int, streams: int, width: int, device: str = "cpu") -> list[Tensor]:
    x, out = torch.randn(tokens, streams, width, device=device), torch.randn(tokens, width, device=device)
    return [x, out, torch.rand(tokens, streams, device=device), torch.rand(tokens, streams, streams, device=device)]


def into(rounds: int = 20) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return lambda x, fn, base, scale: mix_in(x, fn, base, scale, rounds, 1e-6, 1e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mix_in_interpreted(shape: tuple[int, int, int], against_reference: Callable[..., None]) -> None:
    against_reference(into(5), mix_in_inputs(*shape), 1e-5)


@pytest.mark.interpret
@pytest.mark.parametrize("rounds", [1, 2, 20])
def test_rounds(rounds: int, against_reference: Callable[..., None]) -> None:
    against_reference(into(rounds), mix_in_inputs(3, 4, 8), 1e-5)


@pytest.mark.interpret
def test_several_slices_and_sums(against_reference: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    from leadline.ops.hyper_connection import kernel

    monkeypatch.setattr(kernel, "SLICE", 64)
    monkeypatch.setattr(kernel, "TOKENS_PER_SUM", 64)
    monkeypatch.setattr(kernel, "BLOCK_D", 16)
    against_reference(into(3), mix_in_inputs(139, 4, 40), 1e-5)


@pytest.mark.interpret
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mix_out_interpreted(shape: tuple[int, int, int], against_reference: Callable[..., None]) -> None:
    against_reference(mix_out, mix_out_inputs(*shape), 2e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("op", ["in", "out"])
def test_any_layout_in(op: str, scattered: Callable[[Tensor], Tensor], against_reference: Callable[..., None]) -> None:
    inputs = mix_in_inputs(5, 4, 8) if op == "in" else mix_out_inputs(5, 4, 8)
    against_reference(into(3) if op == "in" else mix_out, [scattered(x) for x in inputs], 1e-5)


@pytest.mark.interpret
def test_a_token_does_not_depend_on_its_neighbours() -> None:
    x, *parameters = mix_in_inputs(70, 4, 8)
    with implementation("kernel"):
        together, alone = into()(x, *parameters), into()(x[3:4], *parameters)
    for all_tokens, one in zip(together, alone, strict=True):
        assert torch.equal(all_tokens[3:4], one)


@pytest.mark.gpu
def test_a_token_on_the_card_does_not_depend_on_its_neighbours() -> None:
    x, *parameters = mix_in_inputs(3000, 4, 4096, "cuda")
    x = x.bfloat16()
    together, alone = into()(x, *parameters), into()(x[777:778], *parameters)
    for all_tokens, one in zip(together, alone, strict=True):
        assert torch.equal(all_tokens[777:778], one)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float32, 1e-5)])
def test_mix_in_compiled(
    shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float, against_reference: Callable[..., None]
) -> None:
    x, *parameters = mix_in_inputs(*shape, "cuda")
    against_reference(into(), [x.to(dtype), *parameters], tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float32, 3e-6)])
def test_mix_out_compiled(
    shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float, against_reference: Callable[..., None]
) -> None:
    x, out, *coefficients = mix_out_inputs(*shape, "cuda")
    against_reference(mix_out, [x.to(dtype), out.to(dtype), *coefficients], tolerance)


@pytest.mark.gpu
def test_coefficients_are_as_exact_as_float32() -> None:
    """bfloat16 streams: post and comb carry no more error than FP32 arithmetic would."""
    x, *parameters = mix_in_inputs(300, 4, 4096, "cuda")
    x = x.bfloat16()
    _, *exact = into()(x.double(), *(parameter.double() for parameter in parameters))
    with implementation("kernel"):
        _, *found = into()(x, *parameters)
    for ours, wanted in zip(found, exact, strict=True):
        assert (ours.double() - wanted).abs().max() < 2e-5
