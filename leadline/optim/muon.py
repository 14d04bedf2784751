"""Muon: momentum, orthogonalised matrix by matrix (report 2.4, Algorithm 1).

For each logically independent matrix W (n x m) with gradient G:

    M <- 0.95 M + G
    U  = 0.95 M + G                           (Nesterov's form, without a factor 1 - 0.95)
    O  = NewtonSchulz(U) * 0.18 sqrt(max(n, m))
    W <- W (1 - lr * 0.1) - lr * O

NewtonSchulz(U) has min(n, m) singular values of 1, hence a root mean square of 1 / sqrt(max(n, m)): the factor makes
the RMS of every update 0.18 lr, near that of AdamW, so that one learning rate serves both optimisers.

"Logically independent" is not always how a tensor is stored. A tensor of three dimensions is a stack of matrices. A
two-dimensional one may hold several matrices one below the other; its parameter group says so (`rows`), and
`optim/groups.py` says why. All matrices of one shape, from whatever parameter, go through Newton-Schulz in one batch.

The update depends on the direction of U only. An expert that receives no tokens keeps moving at full step along its old
momentum, which shrinks by 0.95 a step and reaches zero after about 2,000 steps in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leadline.ops.newton_schulz import newton_schulz

MOMENTUM = 0.95
WEIGHT_DECAY = 0.1
UPDATE_RMS = 0.18

# Elements that one call of Newton-Schulz may hold: bounds its work space at a few times this many numbers.
MAX_BATCH_ELEMENTS = 1 << 26


class Muon(torch.optim.Optimizer):
    """The optimiser of all matrices.

    parameters: parameter groups, or what `torch.optim.Optimizer` takes in their place; (name, parameter) pairs keep
    names in the state and in errors. Beside `lr`, `momentum`, `weight_decay` and `update_rms`, a group has `rows`: how
    its 2-D tensors are cut along dimension 0 into matrices, as the second argument of `torch.split` (a height that
    divides the tensor's, or the list of all heights; None: not cut).

    Parameters must be float32 (or float64): in bfloat16 most updates of 0.18 lr would round to nothing. ValueError
    names a parameter that is no matrix, has another dtype, or is not divided by its group's `rows`.

    The state is one momentum buffer per parameter, in its dtype and layout; saving and loading it continues bitwise.
    Parameters without a gradient are passed over.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float,
        *,
        momentum: float = MOMENTUM,
        weight_decay: float = WEIGHT_DECAY,
        update_rms: float = UPDATE_RMS,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "update_rms": update_rms, "rows": None,
        }  # fmt: skip
        super().__init__(parameters, defaults)
        for group in self.param_groups:
            names = group.get("param_names", ["parameter"] * len(group["params"]))
            for name, parameter in zip(names, group["params"], strict=True):
                _check(name, parameter, group["rows"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return what `closure`, if given, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for batch in _batches(self._stacks()):
            _update(batch)
        return loss

    def _stacks(self) -> Iterator[_Stack]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                views = (logical_matrices(x, group["rows"]) for x in (parameter, state["momentum"], parameter.grad))
                for weight, momentum, gradient in zip(*views, strict=True):
                    yield _Stack(weight, momentum, gradient, group)


def logical_matrices(x: Tensor, rows: int | list[int] | None) -> list[Tensor]:
    """Views [B, n, m] of a parameter that together hold each of its independent matrices once."""
    if x.ndim == 3:
        return [x]
    if rows is None:
        return [x.unsqueeze(0)]
    if isinstance(rows, int):
        return [x.unflatten(0, (-1, rows))]
    return [block.unsqueeze(0) for block in x.split(rows)]


@dataclass(frozen=True)
class _Stack:
    """B matrices of one shape: views of a weight, its momentum and its gradient, and the group with their numbers."""

    weight_BNM: Tensor
    momentum_BNM: Tensor
    gradient_BNM: Tensor
    group: dict[str, Any]

    def split(self, count: int) -> Iterator[_Stack]:
        """The same matrices, at most `count` to a stack."""
        parts = (x.split(count) for x in (self.weight_BNM, self.momentum_BNM, self.gradient_BNM))
        for weight, momentum, gradient in zip(*parts, strict=True):
            yield _Stack(weight, momentum, gradient, self.group)


def _batches(stacks: Iterable[_Stack]) -> Iterator[list[_Stack]]:
    """Stacks of equal shape together, each batch at most MAX_BATCH_ELEMENTS (or one matrix) large."""
    by_shape: dict[tuple[Any, ...], list[_Stack]] = {}
    for stack in stacks:
        weight = stack.weight_BNM
        by_shape.setdefault((weight.shape[1:], weight.dtype, weight.device), []).append(stack)
    for (shape, _, _), alike in by_shape.items():
        capacity = max(1, MAX_BATCH_ELEMENTS // max(1, shape.numel()))
        batch, count = [], 0
        for part in (part for stack in alike for part in stack.split(capacity)):
            if count + len(part.weight_BNM) > capacity:
                yield batch
                batch, count = [], 0
            batch.append(part)
            count += len(part.weight_BNM)
        yield batch


def _update(batch: list[_Stack]) -> None:
    nesterov = []
    for stack in batch:
        momentum = stack.group["momentum"]
        stack.momentum_BNM.mul_(momentum).add_(stack.gradient_BNM)
        nesterov.append(stack.gradient_BNM.add(stack.momentum_BNM, alpha=momentum))
    directions = newton_schulz(torch.cat(nesterov)).split([len(stack.weight_BNM) for stack in batch])
    for stack, direction_BNM in zip(batch, directions, strict=True):
        group = stack.group
        scale = group["update_rms"] * math.sqrt(max(direction_BNM.shape[-2:]))
        stack.weight_BNM.mul_(1.0 - group["lr"] * group["weight_decay"])
        stack.weight_BNM.add_(direction_BNM, alpha=-group["lr"] * scale)


def _check(name: str, parameter: Tensor, rows: int | list[int] | None) -> None:
    what = f"{name} {tuple(parameter.shape)}"
    if parameter.ndim not in (2, 3):
        raise ValueError(f"Muon takes matrices or stacks of matrices, not {what}: give it to AdamW")
    if parameter.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"Muon needs float32 weights, {what} is {parameter.dtype}: updates would round away")
    if rows is None:
        return
    if parameter.ndim == 3:
        raise ValueError(f"Muon got rows={rows} for {what}, which is a stack of matrices already")
    height = parameter.shape[0]
    fits = height % rows == 0 if isinstance(rows, int) else sum(rows) == height
    if not fits:
        raise ValueError(f"Muon cannot cut {what} into blocks of {rows} rows")
