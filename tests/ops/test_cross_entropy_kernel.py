"""The cross entropy kernel against the reference: interpreted in float32, compiled in bfloat16 and float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.cross_entropy import cross_entropy
from leadline.ops.dispatch import implementation


def inputs(tokens: int, width: int, vocabulary: int, device: str = "cpu") -> list[Tensor]:
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    targets[1::4] = -1
    hidden = torch.randn(tokens, width, device=device)
    return [hidden, torch.randn(vocabulary, width, device=device) * 2 * width**-0.5, targets]


@pytest.mark.interpret
@pytest.mark.parametrize("shape", [(1, 4, 7), (9, 3, 64), (40, 8, 33), (0, 4, 5)], ids=str)
def test_interpreted(
    shape: tuple[int, int, int], against_reference: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from leadline.ops.cross_entropy import kernel

    monkeypatch.setattr(kernel, "VOCABULARY_PER_TILE", 16)
    monkeypatch.setattr(kernel, "TOKENS_PER_TILE", 15)
    against_reference(cross_entropy, inputs(*shape), 2e-6)


@pytest.mark.interpret
def test_any_layout_in(scattered: Callable[[Tensor], Tensor], against_reference: Callable[..., None]) -> None:
    against_reference(cross_entropy, [scattered(x) for x in inputs(7, 4, 10)], 2e-6)


@pytest.mark.interpret
def test_large_logits_and_tokens_without_target() -> None:
    hidden, weight, targets = inputs(8, 4, 6)
    with implementation("kernel"):
        nll = cross_entropy(hidden * 1e4, weight, targets)
    assert torch.isfinite(nll).all()
    assert (nll[targets == -1] == 0).all()
    torch.testing.assert_close(nll, cross_entropy(hidden * 1e4, weight, targets), rtol=1e-5, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 512, 20000), (127, 4096, 8192), (4001, 512, 20000), (9000, 64, 9000)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float32, 1e-5)])
def test_compiled(
    shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float, against_reference: Callable[..., None]
) -> None:
    hidden, weight, targets = inputs(*shape, "cuda")
    against_reference(cross_entropy, [hidden.to(dtype), weight.to(dtype), targets], tolerance)
