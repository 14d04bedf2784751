"""The program of native steps: compiled for the widths of a model, loaded, and called with words.

A *word* is 64 bits: a number, or the address of a tensor. The structures of `step.cpp` are words only, so that a list
in the order of their fields is all that it takes to fill one.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from leadline.model.config import ModelConfig

SOURCE = Path(__file__).with_name("step.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


Words = ctypes.Array[ctypes.c_uint64]


class BuildError(ValueError):
    """The program cannot be compiled here; the message says why."""


class Program:
    """The three functions of `step.cpp` for one set of widths. seconds: how long compiling them took."""

    def __init__(self, path: Path, seconds: float):
        library = ctypes.CDLL(str(path))  # lets other threads of Python run during a call
        self.begin, self.through_block, self.end = library.begin, library.through_block, library.end
        self.seconds = seconds


def words(*values: Tensor | int | None) -> Words:
    """Numbers, and addresses of tensors, which have to be contiguous and must outlive their use; None is address 0."""
    numbers = [_word(value) for value in values]
    return (ctypes.c_uint64 * len(numbers))(*numbers)


def _word(value: Tensor | int | None) -> int:
    if not isinstance(value, Tensor):
        return value or 0
    assert value.is_contiguous()
    return value.data_ptr()


def program(config: ModelConfig) -> Program:
    """The program for a model, compiled anew in each process, once for all models of its widths: what suits one
    processor may not run on the next. BuildError without a compiler, or when it refuses."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    compiler = shutil.which(name)
    if compiler is None:
        raise BuildError(f"compile_steps needs a C++ compiler, and {name} is not there: install it, or set CXX")
    return _built(compiler, _widths(config))


def _widths(config: ModelConfig) -> str:
    """The constants that the source takes, as a line of C++."""
    c = config
    widths = {
        "S": c.hc_mult,
        "D": c.hidden_size,
        "H": c.num_attention_heads,
        "K": c.head_dim,
        "R": c.qk_rope_head_dim,
        "Q": c.q_lora_rank,
        "O": c.o_groups,
        "L": c.o_lora_rank,
        "W": c.sliding_window,
        "M": c.index_topk,
        "J": c.index_n_heads,
        "I": c.index_head_dim,
        "E": c.n_routed_experts,
        "A": c.num_experts_per_tok,
        "F": c.moe_intermediate_size,
        "V": c.vocab_size,
        "ROUNDS": c.hc_sinkhorn_iters,
    }
    numbers = {
        "RMS_EPS": c.rms_norm_eps,
        "HC_EPS": c.hc_eps,
        "LIMIT": c.swiglu_limit,
        "ROUTE_SCALE": c.routed_scaling_factor,
    }
    integers = ", ".join(f"{name} = {value}" for name, value in widths.items())
    floats = ", ".join(f"{name} = float({value!r})" for name, value in numbers.items())
    return f"constexpr int {integers}; constexpr float {floats};\n"


@functools.cache
def _built(compiler: str, widths: str) -> Program:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.so"
        source = widths + f'#line 1 "{SOURCE.name}"\n' + SOURCE.read_text(encoding="utf8")
        _run([compiler, *FLAGS, "-x", "c++", "-", "-o", str(path)], source)
        return Program(path, time.perf_counter() - start)  # what is loaded stays when its file goes


def _run(command: Sequence[str], source: str) -> None:
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.splitlines()
        reason = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
        raise BuildError(f"{command[0]} could not compile steps: {reason}; serve without compile_steps")
