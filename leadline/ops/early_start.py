"""Kernels that start while the ones before are still running, which hides the time that a start takes.

A step of decoding is more than a thousand kernels of a few microseconds, and a start costs nearly one. From Hopper on a
kernel may be started early; it waits before it reads what others have written. What nobody writes any more, such as
weights, may be read before: for a step, whose time is that of reading weights, this is half of the gain.

Each kernel lets the next one start before it waits itself, so that several may be waiting in a row, each for the one
before it. A kernel ends after its wait, so when a wait is over, all earlier kernels are done. Before it, only those are
known to be that have a kernel between them and this one that did not start early, such as any of PyTorch's own. So a
weight that is read before the wait must not have been made by a kernel that starts early.

A launcher passes `launch_pdl=early` and EARLY=early, with early = `starts_early(device)`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def begin(EARLY: tl.constexpr):
    """The first line of a kernel that was started early and has nothing to read before it waits."""
    let_next_start(EARLY)
    wait_for_earlier(EARLY)


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """Lets the next kernel start as soon as all programs of this one have; the first line of a kernel."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_earlier(EARLY: tl.constexpr):
    """Waits until all earlier kernels are done and what they wrote can be read. Every program must."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


def starts_early(device: torch.device) -> bool:
    """Whether kernels on this device can start early: GPUs from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
