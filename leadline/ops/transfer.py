"""Transfers: numbers from the host to a device and results back, without waiting for what is queued there.

A copy between pageable memory and a GPU makes the host wait until the device has come to it. From and to pinned memory
it is queued like a kernel. torch gives pinned memory out again only when the copies that use it are done, so nobody
has to keep it alive.
"""

from __future__ import annotations

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, on a device."""
    return _pinned(values, device).to(device, non_blocking=True)


def fill(target: Tensor, values: Tensor) -> None:
    """Copy values of the host or of the target's device into a tensor of the same shape."""
    target.copy_(_pinned(values, target.device), non_blocking=True)


def _pinned(values: Tensor, device: torch.device) -> Tensor:
    return values.pin_memory() if device.type == "cuda" and not values.is_cuda else values


class Arrival:
    """A tensor on its way to the host. What is queued behind its making may overwrite the original."""

    def __init__(self, values: Tensor):
        self._values = values
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))

    @property
    def has_come(self) -> bool:
        """Whether the device has come to the copy."""
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """The tensor on the host, when the device has come to the copy."""
        if self._event is not None:
            self._event.synchronize()
        return self._values
