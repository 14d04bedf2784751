"""Rehearses kernels for a GPU that is not there; a program of its own, because a process that interprets kernels cannot
compile them. Prints one JSON object: what was compiled and what was written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from leadline.ops.rehearsal import rehearsal


class Absent:
    """As much of a driver as a compiler needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@triton.jit
def copy_kernel(x_ptr, y_ptr, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(y_ptr + place, tl.load(x_ptr + place))


@triton.jit
def broken_kernel(x_ptr):
    tl.static_assert(False, "not to be compiled")


def launch(kernel: Any, *arguments: Any) -> None:
    kernel[(1,)](*arguments, num_warps=1)


def copied(x: torch.Tensor, block: int) -> torch.Tensor:
    y = torch.empty_like(x)
    launch(copy_kernel, x, y, block)
    return y


def main() -> None:
    compiled: list[str] = []
    absent: Any = Absent()
    driver.set_active(absent)
    knobs.compilation.listener = lambda **about: compiled.append(about["src"].name)
    run, x = JITFunction.run, torch.ones(16)
    with rehearsal(threads=2):
        indexes = copied(torch.full((16,), 99), 16)
        found = [copied(x, 16), copied(x, 16), copied(x, 8), x[indexes]]
        launch(broken_kernel, x)
    once = sorted(compiled)
    with rehearsal(threads=2):
        copied(x, 16)
    try:
        with rehearsal(threads=2):
            raise KeyError
    except KeyError:
        restored = JITFunction.run is run
    sums = [float(y.sum()) for y in found]
    print(json.dumps({"compiled": once, "again": len(compiled) - len(once), "sums": sums, "restored": restored}))


if __name__ == "__main__":
    main()
