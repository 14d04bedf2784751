"""Every op test runs in poisoned memory, and can measure the largest tensor that an op makes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leadline.ops.reach import Reach
from leadline.ops.rehearsal import rehearsal
from leadline.recipes.bench_ops.gate import differences, results


@pytest.fixture(autouse=True)
def _poison(poisoned_memory: None) -> None:
    """Outputs that an op leaves unwritten are NaN."""


class LargestTensor(TorchDispatchMode):
    """Context manager: `elements` becomes the size of the largest tensor made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                # The storage, not the shape: an expanded view holds no memory.
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


@pytest.fixture
def largest_tensor() -> LargestTensor:
    return LargestTensor()


@pytest.fixture
def scattered() -> Callable[[Tensor], Tensor]:
    """The same values in a layout that no op can take for contiguous: every second element, axes stored in reverse."""

    def scatter(x: Tensor) -> Tensor:
        store = torch.full((*x.shape[::-1], 2), float("nan") if x.is_floating_point() else 0, dtype=x.dtype)
        view = store[..., 0].permute(*range(x.ndim - 1, -1, -1))
        view.copy_(x)
        return view.detach()

    return scatter


@dataclass(frozen=True)
class LookingBack:
    """A random ragged segment as the ops that look back see it, and the same as full masks.

    keys, entries: rows that the op is given. sees_key_TX, sees_entry_TC: bool, who sees what. picked_TM: random picks
    among the visible entries, with -1 anywhere; sees_picked_TC: the same as a mask.
    """

    reach: Reach
    keys: int
    entries: int
    sees_key_TX: Tensor
    sees_entry_TC: Tensor
    picked_TM: Tensor
    sees_picked_TC: Tensor

    @property
    def queries(self) -> int:
        return len(self.sees_key_TX)


def look_back(
    lengths: Sequence[int], past: Sequence[int], window: int, ratio: int, picks: int, gap: int = 0, seed: int = 0
) -> LookingBack:
    """Sequences of `lengths` new tokens after `past` old ones. Each sequence's entries stand in one run, with `gap`
    rows that nobody sees before and behind it."""
    generator = torch.Generator().manual_seed(seed)
    first_key, last_key, first_entry, visible = [], [], [], []
    keys = entries = 0
    for length, before in zip(lengths, past, strict=True):
        oldest = max(0, before - window + 1)
        entries += gap
        for position in range(before, before + length):
            first_key.append(keys + max(0, position - window + 1) - oldest)
            last_key.append(keys + position - oldest)
            first_entry.append(entries)
            visible.append((position + 1) // ratio)
        keys += before + length - oldest
        entries += (before + length) // ratio + gap
    columns = [
        torch.tensor(values, dtype=torch.int64)[:, None] for values in (first_key, last_key, first_entry, visible)
    ]
    first_key_T1, last_key_T1, first_entry_T1, visible_T1 = columns
    key, entry = torch.arange(keys), torch.arange(entries)
    sees_entry = (entry >= first_entry_T1) & (entry < first_entry_T1 + visible_T1)
    picked = torch.full((len(first_key), picks), -1)
    sees_picked = torch.zeros_like(sees_entry)
    for row, (first, count) in enumerate(zip(first_entry, visible, strict=True)):
        chosen = torch.randperm(count, generator=generator)[: int(torch.randint(0, picks + 1, (), generator=generator))]
        places = torch.randperm(picks, generator=generator)[: len(chosen)]
        picked[row, places] = chosen
        sees_picked[row, first + chosen] = True
    reach = Reach(tuple(lengths), *(column.flatten() for column in columns), most_visible=max(visible, default=0))
    sees_key = (key >= first_key_T1) & (key <= last_key_T1)
    return LookingBack(reach, keys, entries, sees_key, sees_entry, picked, sees_picked)


@pytest.fixture(scope="session", name="look_back")
def _look_back() -> Callable[..., LookingBack]:
    return look_back


def against_reference(op: Callable[..., Any], inputs: Sequence[Tensor | None], tolerance: float) -> None:
    """op(*inputs) and its gradients, as a kernel and as the reference in float64, differ by at most `tolerance`, and
    two runs of the kernel not at all: `leadline.recipes.bench_ops.gate.differences`, the gate of the benchmark."""
    if any(x is not None and x.is_cuda for x in inputs):
        with rehearsal():
            results(op, inputs, "kernel", ())
    found = differences(op, inputs)
    assert all(difference.relative <= tolerance for difference in found), found  # NaN is above every tolerance


@pytest.fixture(scope="session", name="against_reference")
def _against_reference() -> Callable[[Callable[..., Any], Sequence[Tensor | None], float], None]:
    return against_reference


@pytest.fixture
def loops_to_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops whose ends a kernel has loaded: Triton's interpreter keeps scalars as arrays of one element, which NumPy no
    longer takes for an int."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.fixture
def dots_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of tiles, one summand after the other in every number, as on a GPU. Triton's interpreter leaves them to
    a library, which does not treat the rows of a tile alike."""
    from triton.runtime import interpreter

    def create_dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
        sums = d.data.copy()
        with np.errstate(invalid="ignore"):
            for column, row in zip(a.data.T, b.data, strict=True):
                sums += column[:, None] * row
        return interpreter.TensorHandle(sums, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(scope="session")
def gluon() -> Any:
    """The stand-in for an interpreter of Gluon, which Triton has not."""
    spec = importlib.util.spec_from_file_location("gluon_interpreter", Path(__file__).with_name("gluon_interpreter.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Launcher:
    """In the place of a Gluon kernel: runs it in the stand-in, and counts."""

    def __init__(self, kernels: Any, name: str):
        self.kernels, self.name, self.launches = kernels, name, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.launches += 1
            for option in ("num_warps", "maxnreg", "launch_pdl"):
                constants.pop(option, None)
            self.kernels.run(self.name, grid, *arguments, **constants)

        return launch


@pytest.fixture
def interpreted_gluon(gluon: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], Launcher]:
    """Puts a launcher into a module in the place of one of its kernels."""

    def replace(module: Any, name: str) -> Launcher:
        launcher = Launcher(gluon.Kernels(Path(module.__file__)), name)
        monkeypatch.setattr(module, name, launcher)
        return launcher

    return replace
