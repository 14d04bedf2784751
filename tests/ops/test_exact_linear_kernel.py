"""The kernels for few rows against the reference: interpreted in float32, compiled in bfloat16 and float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.dispatch import implementation
from leadline.ops.exact_linear import exact_linear, exact_linears
from leadline.ops.grouped_product import grouped_product

# rows, outputs, width
SHAPES = [(1, 1, 1), (3, 5, 4), (4, 7, 127), (2, 4, 129), (1, 3, 1000), (0, 3, 4)]
# rows, outputs of two weights, width
PAIRS = [(1, 1, 1, 1), (3, 5, 8, 127), (4, 16, 2, 129), (2, 3, 3, 1000)]
# rows, outputs of two weights of one shape, width
MORE_ROWS = [(1, 16, 512), (3, 32, 40), (16, 48, 640), (17, 16, 1000), (64, 16, 513)]
# rows, groups, outputs of a group, width of a group
GROUPS = [(1, 1, 2, 3), (3, 2, 4, 127), (4, 3, 6, 129)]
GPU_SHAPES = [(1, 256, 4096), (4, 1024, 4096), (3, 257, 7168), (2, 384, 7168), (1, 3, 100)]


def few(x: Tensor, weight: Tensor) -> Tensor:
    return exact_linear(x.detach(), weight.detach())


@pytest.mark.interpret
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted(shape: tuple[int, int, int], against_reference: Callable[..., None]) -> None:
    rows, outputs, width = shape
    against_reference(few, [torch.randn(rows, width), torch.randn(outputs, width)], 1e-6)


def pair(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    return exact_linears(x.detach(), (first.detach(), second.detach()))


def groups(x: Tensor, weight: Tensor) -> Tensor:
    return grouped_product(x.detach(), weight.detach())


@pytest.mark.interpret
@pytest.mark.parametrize("shape", PAIRS, ids=str)
def test_pairs_interpreted(shape: tuple[int, int, int, int], against_reference: Callable[..., None]) -> None:
    *sizes, width = shape
    against_reference(pair, [torch.randn(size, width) for size in sizes], 1e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("shape", GROUPS, ids=str)
def test_groups_interpreted(shape: tuple[int, int, int, int]) -> None:
    rows, count, outputs, width = shape
    x, weight = torch.randn(rows, count, width), torch.randn(count, outputs, width)
    with implementation("kernel"):
        torch.testing.assert_close(groups(x, weight), torch.einsum("tox,olx->tol", x, weight))


def check_pair_of_more_rows(tokens: int, columns: int, width: int, dtype: torch.dtype, device: str) -> None:
    from leadline.ops.exact_linear import pair_kernel

    x, *weights = (torch.randn(rows, width, device=device).to(dtype) for rows in (tokens, columns, columns))
    found, again = pair_kernel.pair_of_products(x, weights), pair_kernel.pair_of_products(x, weights)
    for ours, twice, weight in zip(found, again, weights, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, twice)
        wanted = x.double() @ weight.double().T
        assert float((ours - wanted).norm()) <= 2e-6 * float(wanted.norm())


@pytest.mark.interpret
@pytest.mark.parametrize(("tokens", "columns", "width"), MORE_ROWS)
def test_pairs_of_more_rows_interpreted(tokens: int, columns: int, width: int) -> None:
    check_pair_of_more_rows(tokens, columns, width, torch.float32, "cpu")


@pytest.mark.interpret
def test_scaled() -> None:
    x, weight = torch.randn(3, 6), torch.randn(5, 6)
    with implementation("kernel"):
        torch.testing.assert_close(exact_linear(x, weight, 0.3), 0.3 * few(x, weight))


@pytest.mark.interpret
def test_any_layout_in(scattered: Callable[[Tensor], Tensor], against_reference: Callable[..., None]) -> None:
    against_reference(few, [scattered(torch.randn(3, 6)), scattered(torch.randn(5, 6))], 1e-6)


@pytest.mark.interpret
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x, weight = torch.randn(4, 300), torch.randn(7, 300)
    with implementation("kernel"):
        assert torch.equal(few(x, weight)[2:3], few(x[2:3], weight))


@pytest.mark.interpret
def test_gradients_and_many_rows_go_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from leadline.ops.exact_linear import kernel

    monkeypatch.setattr(kernel, "few_rows", None)
    monkeypatch.setattr(kernel, "few_rows_of_groups", None)
    with implementation("kernel"):
        assert grouped_product(torch.randn(5, 2, 8), torch.randn(2, 4, 8)).shape == (5, 2, 4)
        assert grouped_product(torch.randn(2, 2, 8, requires_grad=True), torch.randn(2, 4, 8)).requires_grad
        assert pair(torch.randn(5, 8), torch.randn(3, 8), torch.randn(3, 8))[1].shape == (5, 3)
        assert exact_linear(torch.randn(5, 8), torch.randn(3, 8)).shape == (5, 3)
        assert exact_linear(torch.randn(2, 8), torch.randn(3, 8, requires_grad=True)).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiled(shape: tuple[int, int, int], dtype: torch.dtype, against_reference: Callable[..., None]) -> None:
    rows, outputs, width = shape
    x, weight = (torch.randn(size, width, device="cuda").to(dtype) for size in (rows, outputs))
    against_reference(few, [x, weight], 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*PAIRS, (1, 1024, 1024, 4096), (3, 257, 64, 7168)], ids=str)
def test_pairs_compiled(shape: tuple[int, int, int, int], against_reference: Callable[..., None]) -> None:
    rows, first, second, width = shape
    against_reference(
        pair, [torch.randn(size, width, device="cuda").bfloat16() for size in (rows, first, second)], 1e-6
    )


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*GROUPS, (1, 8, 1024, 4096), (4, 16, 1024, 4096)], ids=str)
def test_groups_compiled(shape: tuple[int, int, int, int]) -> None:
    rows, count, outputs, width = shape
    x, weight = (torch.randn(size, width, device="cuda").bfloat16() for size in (rows * count, count * outputs))
    x, weight = x.unflatten(0, (rows, count)), weight.unflatten(0, (count, outputs))
    wanted = torch.einsum("tox,olx->tol", x.float(), weight.float())
    torch.testing.assert_close(groups(x, weight).float(), wanted, rtol=8e-3, atol=1e-2)
    assert torch.equal(groups(x, weight)[-1:], groups(x[-1:], weight))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "columns", "width"), [*MORE_ROWS, (5, 1024, 4096), (64, 512, 4096), (33, 256, 4096)]
)
def test_pairs_of_more_rows_compiled(tokens: int, columns: int, width: int, dtype: torch.dtype) -> None:
    check_pair_of_more_rows(tokens, columns, width, dtype, "cuda")


@pytest.mark.gpu
def test_which_pairs_are_one_launch() -> None:
    from leadline.ops.exact_linear import pair_kernel

    weight = torch.zeros(32, 16, dtype=torch.bfloat16, device="cuda")
    x = weight.new_zeros(64, 16)
    assert pair_kernel.takes(x, [weight] * 2)
    assert not pair_kernel.takes(x, [weight])
    assert not pair_kernel.takes(x, [weight, weight[:16]])
    assert not pair_kernel.takes(x, [weight[:24]] * 2)
    assert not pair_kernel.takes(x.float(), [weight.float()] * 2)
    assert not pair_kernel.takes(weight.new_zeros(65, 16), [weight] * 2)


@pytest.mark.gpu
def test_a_row_on_the_card_does_not_depend_on_its_neighbours() -> None:
    x, weight = (torch.randn(size, 4096, device="cuda").bfloat16() for size in (4, 256))
    assert torch.equal(few(x, weight)[2:3], few(x[2:3], weight))
