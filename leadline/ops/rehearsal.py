"""Compile the kernels of a piece of work ahead of it, many at the same time.

A kernel is compiled when it is launched for the first time, and whoever launches it waits. Work that meets fifty cold
kernels one after the other waits for their sum, on one of the many cores that a machine with a card has. A rehearsal
goes through the same work once without launching anything: each kernel is handed to a pool of threads, and what it
would have written is zero. The compiler's passes and the assembler run outside of Python's lock, so the threads do not
wait for one another. Afterwards the kernels are in memory, and in Triton's cache on disk.

Triton compiles without launching where a launch asks for it (`warmup`); here every launch is made to ask, since those
of the ops are many and what they are given depends on what came before.

What is rehearsed must not ask for more of its numbers than that they are there. Zero is a valid index, count and
offset everywhere, so operations of torch in between run as they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_EMPTY = {
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}


class _ZerosForEmpty(TorchDispatchMode):
    """Inside of the block uninitialised memory is zero."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.zero_() if func.overloadpacket in _EMPTY else result


@contextmanager
def rehearsal(threads: int | None = None) -> Iterator[None]:
    """Inside of the block kernels are compiled and not run. At its end all of them are compiled.

    threads: that compile at the same time; without a number, one for each core. A kernel that cannot be compiled is
    left out: it fails where it is launched. Not for several Python threads at a time.
    """
    from triton import AsyncCompileMode
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: Any, **named: Any) -> Any:
        return run(self, *arguments, grid=grid, warmup=True, **named)

    JITFunction.run = compile_only
    try:
        with (
            ThreadPoolExecutor(threads or os.cpu_count()) as pool,
            AsyncCompileMode(pool, ignore_errors=True),
            torch.autograd.set_multithreading_enabled(False),
            _ZerosForEmpty(),
        ):
            yield
    finally:
        JITFunction.run = run
