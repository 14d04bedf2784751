"""Grouped products against the reference: the library's in float32 on CPU and in bfloat16 on the card, the tiles for
all that it does not take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.dispatch import implementation
from leadline.ops.grouped_linear import grouped_linear, kernel


def inputs(counts: list[int], width: int, hidden: int, device: str = "cpu") -> list[Tensor]:
    x = torch.randn(sum(counts), width, device=device)
    weight = torch.randn(len(counts), hidden, width, device=device) * width**-0.5
    return [x, weight, torch.tensor(counts, device=device)]


@pytest.mark.interpret
@pytest.mark.parametrize("counts", [[1], [0, 3, 0, 4, 0], [127, 1, 2], [5, 5, 5, 5]], ids=str)
def test_on_cpu(counts: list[int], against_reference: Callable[..., None]) -> None:
    against_reference(grouped_linear, inputs(counts, 8, 16), 2e-6)


@pytest.mark.interpret
def test_any_layout_in(scattered: Callable[[Tensor], Tensor], against_reference: Callable[..., None]) -> None:
    against_reference(grouped_linear, [scattered(x) for x in inputs([2, 0, 5], 8, 16)], 2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "counts", [[1], [0, 3, 0, 4, 0], [127, 1, 4001], [0, 190, 210, 5] * 16], ids=["1", "2", "3", "4"]
)
def test_compiled(counts: list[int], against_reference: Callable[..., None]) -> None:
    x, weight, counts_E = inputs(counts, 256, 512, "cuda")
    against_reference(grouped_linear, [x.bfloat16(), weight.bfloat16(), counts_E], 4e-3)


@pytest.mark.gpu
def test_the_host_does_not_wait() -> None:
    x, weight, counts_E = inputs([0, 64, 100], 256, 512, "cuda")
    x, weight = x.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with implementation("kernel"):
            grouped_linear(x, weight, counts_E).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.interpret
@pytest.mark.parametrize("counts", [[1], [0, 3, 0, 4, 0], [17, 0, 33], [0, 0, 0, 1]], ids=str)
@pytest.mark.parametrize(("width", "hidden"), [(5, 7), (40, 70)])
def test_tiles_interpreted(
    counts: list[int], width: int, hidden: int, monkeypatch: pytest.MonkeyPatch, against_reference: Callable[..., None]
) -> None:
    monkeypatch.setattr(kernel, "takes", lambda *_: False)
    against_reference(grouped_linear, inputs(counts, width, hidden), 2e-6)


@pytest.mark.interpret
def test_tiles_of_no_rows(monkeypatch: pytest.MonkeyPatch, against_reference: Callable[..., None]) -> None:
    monkeypatch.setattr(kernel, "takes", lambda *_: False)
    against_reference(grouped_linear, inputs([0, 0], 8, 8), 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [[3, 0, 9], [127, 1, 4001]], ids=["few", "many"])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 256), (torch.bfloat16, 12)], ids=str)
def test_what_the_library_cannot_take(
    dtype: torch.dtype, width: int, counts: list[int], against_reference: Callable[..., None]
) -> None:
    x, weight, counts_E = inputs(counts, width, 512, "cuda")
    against_reference(grouped_linear, [x.to(dtype), weight.to(dtype), counts_E], 4e-3)
