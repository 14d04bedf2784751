"""Transfers bring every number across, and on a card the host does not wait for them."""

from __future__ import annotations

import pytest
import torch

from leadline.ops.transfer import Arrival, fill, send

CARD = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.mark.parametrize("device", ["cpu", CARD])
@pytest.mark.parametrize("values", [torch.arange(5), torch.randn(3, 1), torch.tensor([True, False]), torch.ones(0)])
def test_numbers_go_there_and_back(values: torch.Tensor, device: str) -> None:
    there = send(values, torch.device(device))
    assert there.device.type == device
    target = torch.zeros_like(there)
    fill(target, values)
    twice = torch.zeros_like(there)
    fill(twice, target)
    for tensor in (there, target, twice):
        assert torch.equal(Arrival(tensor).wait(), values)


@pytest.mark.gpu
def test_the_host_waits_for_an_arrival_only_and_that_is_what_was_there() -> None:
    values = torch.zeros(4, dtype=torch.int64, device="cuda")

    def queue() -> Arrival:
        fill(values, torch.arange(4))
        values.add_(send(torch.arange(4), values.device))
        arrival = Arrival(values)
        values.zero_()
        return arrival

    # What is done for the first time, pinned memory above all, makes the host wait.
    for arrival in [queue() for _ in range(3)]:
        arrival.wait()
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType]
    arrival = queue()
    assert not arrival.has_come
    assert arrival.wait().tolist() == [0, 2, 4, 6]
    assert arrival.has_come
