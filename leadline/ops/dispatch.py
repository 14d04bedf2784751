"""Which implementation of an op runs: its Triton kernel on a CUDA device, its reference everywhere else.

The reference is the meaning, the kernel its fast equal, so nothing but speed and rounding may depend on the choice.
Float64 always goes to the reference: gradient checks and oracles are what it is used for, and no kernel computes in it.

`implementation` overrides the choice for a block of code. It holds in the thread that entered it; the backward of a
CUDA graph of nodes would normally run in a thread of its own, where activation recomputation would then choose anew and
differently, so inside of the block autograd stays in the same thread.

`batch_invariant` (`ops/invariance.py`) narrows it: inside of its block only the kernels of `INVARIANT` run, and every
other op is its reference, whatever the device. What belongs there is said beside the list.

torch.compile asks once, while it traces: a compiled function keeps the choice that held then.

Triton's interpreter runs kernels on CPU tensors, slowly, for tests: set TRITON_INTERPRET=1 before Triton is imported,
and force "kernel". Numbers in bfloat16 are not to be trusted there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

Implementation = Literal["reference", "kernel"]

_TRITON_INSTALLED = find_spec("triton") is not None
_forced: ContextVar[Implementation | None] = ContextVar("leadline_ops_implementation", default=None)
_batch_invariant: ContextVar[bool] = ContextVar("leadline_batch_invariant", default=False)

# The kernels that may run inside of `batch_invariant`. Each makes a row of its result from that row of its operands
# alone: it copies or compares, computes number by number, or adds up in an order that widths decide and the number of
# rows does not. And it is the only one of its kind: the same for a chunk and for a step, with and without gradients. An
# op that has one kernel for chunks and another for steps, as attention and indexer do, is not of them.
INVARIANT = frozenset(
    (
        "read_rows",
        "write_rows",
        "select_topk",
        "token_permutation",
        "rms_norm",
        "rope",
        "unrotate_",
        "norm_rope",
        "swiglu",
        "gated_pool",
        "route",
        "hyper_connection",  # without its kernels for few tokens
        "grouped_linear",  # as tiles, without the library's product
        "quantized_linear",  # without its kernel for few tokens
        "ordered_sums",
    )
)


class KernelError(ValueError):
    """A kernel was demanded where it cannot run; the message names the op, the device and the remedy."""


@contextmanager
def implementation(name: Implementation) -> Iterator[None]:
    """Inside of the block every op runs as "reference" or as "kernel"; an op that has no kernel has no choice to make.

    Run the backward inside of the block as well. Blocks nest; the innermost decides.
    """
    if name not in ("reference", "kernel"):
        raise KernelError(f"implementation '{name}': expected 'reference' or 'kernel'")
    token = _forced.set(name)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        _forced.reset(token)


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Inside of the block a token's numbers have the same bits whatever is computed beside it."""
    token = _batch_invariant.set(True)
    try:
        yield
    finally:
        _batch_invariant.reset(token)


@torch.compiler.assume_constant_result
def is_batch_invariant() -> bool:
    """Whether a `batch_invariant` block is open."""
    return _batch_invariant.get()


def use_kernel(op: str, x: Tensor) -> bool:
    """Whether `op` runs as a kernel on x: on CUDA with Triton installed, unless x is float64, `implementation` says
    otherwise, or `batch_invariant` leaves it to the reference. KernelError when a kernel is demanded where none can
    run."""
    forced = _demanded()
    if forced == "reference" or (is_batch_invariant() and op not in INVARIANT):
        return False
    obstacle = _obstacle(x)
    if forced == "kernel" and obstacle:
        raise KernelError(f"{op}: no kernel for {x.dtype} on {x.device}: {obstacle}")
    return not obstacle and (x.is_cuda or forced == "kernel")


@torch.compiler.assume_constant_result
def _demanded() -> Implementation | None:
    return _forced.get()


def _obstacle(x: Tensor) -> str | None:
    """Why no kernel can run on x, as a remedy for the user; None when one can."""
    if not triton_installed():
        return "install triton, or use implementation('reference')"
    if x.dtype == torch.float64:
        return "kernels compute in float32; use implementation('reference')"
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "move the tensors to a CUDA device, or set TRITON_INTERPRET=1 before the start to run the interpreter"
    return None


def triton_installed() -> bool:
    """Whether Triton can be imported; it is not, until a kernel runs."""
    return _TRITON_INSTALLED
