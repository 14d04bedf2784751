"""The kernels of token permutation against the reference: interpreted in float32, compiled in bfloat16 and float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.dispatch import implementation
from leadline.ops.token_permutation import ExpertOrder, combine, dispatch, expert_order

# tokens, choices, experts
SIZES = [(1, 1, 1), (3, 2, 4), (4, 4, 4), (127, 2, 3), (128, 1, 200), (129, 6, 8), (0, 2, 4)]
GPU_SIZES = [(1, 6, 256), (64, 6, 256), (127, 6, 256), (4001, 6, 256), (4001, 6, 384), (8192, 8, 64), (0, 6, 256)]


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from leadline.ops.token_permutation import kernel

    monkeypatch.setattr(kernel, "PAIRS_ALONE", 16)
    monkeypatch.setattr(kernel, "PAIRS_PER_RUN", 16)
    monkeypatch.setattr(kernel, "PAIRS_AT_ONCE", 4)


def random_choices(tokens: int, choices: int, experts: int, device: str = "cpu") -> Tensor:
    return torch.rand(tokens, experts, device=device).argsort(1)[:, :choices]


def check_order(chosen_TA: Tensor, experts: int) -> None:
    with implementation("kernel"):
        found = expert_order(chosen_TA, experts)
    with implementation("reference"):
        expected = expert_order(chosen_TA, experts)
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(found, expected, strict=True))


@pytest.mark.interpret
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_order(size: tuple[int, int, int]) -> None:
    check_order(random_choices(*size), size[2])


@pytest.mark.interpret
@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("tokens", [7, 8, 9, 33, 80])
def test_order_over_several_runs(tokens: int) -> None:
    check_order(random_choices(tokens, 2, 5), 5)


@pytest.mark.interpret
@pytest.mark.usefixtures("short_runs")
def test_all_to_one_expert() -> None:
    check_order(torch.full((50, 1), 2), 4)


@pytest.mark.interpret
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("width", [1, 5, 130])
def test_rows(size: tuple[int, int, int], width: int, against_reference: Callable[..., None]) -> None:
    (tokens, choices, experts) = size
    order = expert_order(random_choices(*size), experts)
    against_reference(lambda x: dispatch(x, order), [torch.randn(tokens, width)], 1e-6)
    against_reference(lambda y: combine(y, order), [torch.randn(tokens * choices, width)], 1e-6)
    rows = torch.randn(tokens * choices, width), torch.randn(tokens, width)
    against_reference(lambda y, plus: combine(y, order, plus), rows, 1e-6)


@pytest.mark.interpret
def test_rows_longer_than_a_tile(against_reference: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    from leadline.ops.token_permutation import kernel

    monkeypatch.setattr(kernel, "VALUES_PER_SMALL_TILE", 32)
    order = expert_order(random_choices(9, 3, 4), 4)
    against_reference(lambda x: dispatch(x, order), [torch.randn(9, 100)], 1e-6)
    against_reference(lambda y: combine(y, order), [torch.randn(27, 100)], 1e-6)


@pytest.mark.interpret
def test_any_layout_in(scattered: Callable[[Tensor], Tensor], against_reference: Callable[..., None]) -> None:
    chosen = random_choices(9, 3, 4)
    with implementation("kernel"):
        order = expert_order(scattered(chosen), 4)
    assert torch.equal(order.pair_X, expert_order(chosen, 4).pair_X)
    strided = ExpertOrder(*map(scattered, order))
    against_reference(lambda x: dispatch(x, strided), [scattered(torch.randn(9, 6))], 1e-6)
    rows = scattered(torch.randn(27, 6)), scattered(torch.randn(9, 6))
    against_reference(lambda y, plus: combine(y, strided, plus), rows, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("size", GPU_SIZES, ids=str)
def test_order_compiled(size: tuple[int, int, int]) -> None:
    check_order(random_choices(*size, "cuda"), size[2])


@pytest.mark.gpu
@pytest.mark.parametrize("size", GPU_SIZES, ids=str)
@pytest.mark.parametrize("width", [1, 384, 4096])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float32, 1e-6)])
def test_rows_compiled(
    size: tuple[int, int, int],
    width: int,
    dtype: torch.dtype,
    tolerance: float,
    against_reference: Callable[..., None],
) -> None:
    (tokens, choices, experts) = size
    order = expert_order(random_choices(*size, "cuda"), experts)
    x, y = (torch.randn(rows, width, device="cuda").to(dtype) for rows in (tokens, tokens * choices))
    against_reference(lambda x: dispatch(x, order), [x], tolerance)
    against_reference(lambda y: combine(y, order), [y], tolerance)
    against_reference(lambda y, plus: combine(y, order, plus), [y, x], tolerance)
