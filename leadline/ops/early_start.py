"""Kernels that start while the one before is still running, which hides the time that a start takes.

A step of decoding is more than a thousand kernels of a few microseconds, and a start costs nearly one. From Hopper on a
kernel may be started early; it waits before it reads what the one before has written. What nobody writes any more, such
as weights, may be read before.

A launcher passes `launch_pdl=early` and EARLY=early, with early = `starts_early(device)`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def begin(EARLY: tl.constexpr):
    """The first line of a kernel that was started early, or the first before it reads what other kernels write: waits
    until the kernel before it is done and what it wrote can be read, and lets the next one start."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def starts_early(device: torch.device) -> bool:
    """Whether kernels on this device can start early: GPUs from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
