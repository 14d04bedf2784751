"""Ordered sums: a row has the same bits alone, in the middle, and among hundreds; and they are the right numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from leadline.ops.dispatch import KernelError, implementation
from leadline.ops.ordered_sums import ordered_bmm, ordered_sum

RUNS = ((0, 1), (5, 6), (14, 18), (1, 36))
DEVICES = [pytest.param("cpu", marks=pytest.mark.interpret), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True, params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _kernels(device: str, request: pytest.FixtureRequest) -> Iterator[None]:
    if device == "cpu":
        request.getfixturevalue("dots_in_order")
    with implementation("kernel"):
        yield


def dtypes(device: str) -> list[torch.dtype]:
    """The interpreter's bfloat16 is not to be trusted."""
    return [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("width", "columns"), [(1, 1), (4, 7), (96, 40), (70, 130)])
def test_a_row_of_a_product_has_the_same_bits_among_any_number(width: int, columns: int, device: str) -> None:
    for dtype in dtypes(device):
        a_XN, w_ON = torch.randn(36, width).to(device, dtype), torch.randn(columns, width).to(device, dtype)
        whole = ordered_bmm(a_XN[None], w_ON.T[None])[0]
        for start, stop in RUNS:
            assert torch.equal(ordered_bmm(a_XN[None, start:stop], w_ON.T[None])[0], whole[start:stop])
            # And in a batch of matrices, each row one of them.
            alone = ordered_bmm(a_XN[start:stop, None], w_ON.T.expand(stop - start, -1, -1))
            assert torch.equal(alone[:, 0], whole[start:stop])
        expected = (a_XN.double() @ w_ON.double().T).to(dtype)
        torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize("width", [1, 6, 128, 2500])
def test_a_row_has_the_same_sum_among_any_number(width: int, device: str) -> None:
    for dtype in dtypes(device):
        x = torch.randn(36, width).to(device, dtype)
        whole = ordered_sum(x)
        for start, stop in RUNS:
            assert torch.equal(ordered_sum(x[start:stop]), whole[start:stop])
        assert torch.equal(ordered_sum(x.unflatten(0, (4, 9))).flatten(), whole)
        torch.testing.assert_close(whole, x.double().sum(-1).to(dtype), atol=1e-4, rtol=1.6e-2)


def test_a_neighbour_that_is_no_number_stays_one(device: str) -> None:
    a_bXN, w_bNO = torch.randn(2, 9, 40, device=device), torch.randn(2, 40, 70, device=device)
    expected, sums = ordered_bmm(a_bXN, w_bNO), ordered_sum(a_bXN)
    a_bXN[0, 3], w_bNO[1, :, 5] = torch.nan, torch.inf
    found = ordered_bmm(a_bXN, w_bNO)
    assert found[0, 3].isnan().all()
    kept = torch.ones_like(found, dtype=torch.bool)
    kept[0, 3], kept[1, :, 5] = False, False
    assert torch.equal(found[kept], expected[kept])
    assert torch.equal(ordered_sum(a_bXN)[1], sums[1])


def test_any_layout_in(scattered: Callable[[Tensor], Tensor], device: str) -> None:
    a_bXN, w_bNO = torch.randn(3, 20, 33), torch.randn(3, 33, 17)
    expected = ordered_bmm(a_bXN.to(device), w_bNO.to(device))
    assert torch.equal(ordered_bmm(scattered(a_bXN).to(device), scattered(w_bNO).to(device)), expected)
    assert torch.equal(ordered_sum(scattered(a_bXN).to(device)), ordered_sum(a_bXN.to(device)))


def test_nothing_to_add_up(device: str) -> None:
    empty = torch.empty(0, 5, device=device)
    assert ordered_bmm(empty[None], torch.ones(1, 5, 3, device=device)).shape == (1, 0, 3)
    assert ordered_sum(empty).shape == (0,)


def test_the_result_may_be_wider_than_the_operands(device: str) -> None:
    if device == "cuda":
        a_XN, w_ON = torch.randn(5, 300).to(device, torch.bfloat16), torch.randn(9, 300).to(device, torch.bfloat16)
        found = ordered_bmm(a_XN[None], w_ON.T[None], torch.float32)[0]
        torch.testing.assert_close(found, a_XN.float() @ w_ON.float().T, atol=1e-4, rtol=1e-5)


def test_gradients_are_those_of_the_reference(device: str) -> None:
    a_bXN, w_bNO, x = torch.randn(2, 5, 33), torch.randn(2, 33, 7), torch.randn(4, 9)
    found = []
    for kernel in (False, True):
        inputs = [y.clone().to(device if kernel else "cpu").requires_grad_() for y in (a_bXN, w_bNO, x)]
        with nullcontext() if kernel else implementation("reference"):
            (ordered_bmm(inputs[0], inputs[1]).square().sum() + ordered_sum(inputs[2]).square().sum()).backward()
        found.append([y.grad.cpu() for y in inputs if y.grad is not None])
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-5)


def test_a_gpu_never_falls_back_to_sums_without_an_order(device: str) -> None:
    if device == "cuda":
        with implementation("reference"), pytest.raises(KernelError, match="it needs Triton and at most 32 bits"):
            ordered_sum(torch.ones(3, device=device))
