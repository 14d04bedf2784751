"""Two folders, tensor by tensor: are the values the same, whatever the format, the naming and the shards?

Values are compared as the folders mean them, dequantised, in float64; equal bytes are not looked at twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from leadline.weights.contents import Contents
from leadline.weights.stored import Quantized, Value, as_float, pieces


@dataclass(frozen=True)
class Difference:
    """How far two tensors of one name are apart; one that is missing, or has another shape, is infinitely far.

    largest: the largest absolute difference; relative: |a - b| / |b| in the Euclidean norm, b from the second folder;
    both NaN where one folder has a NaN that the other has not. equal: no value differs. note: what is wrong, if it is
    not the values.
    """

    name: str
    largest: float
    relative: float
    equal: bool
    note: str = ""

    def within(self, tolerance: float) -> bool:
        """Whether the relative difference is at most `tolerance`; NaN never is."""
        return self.equal or self.relative <= tolerance


def compare(
    first: Contents, second: Contents, advance: Callable[[int], None] = lambda read: None
) -> Iterator[Difference]:
    """The difference of every tensor that a folder has, in the order of the model.

    advance: told the number of values, as they are compared. CheckpointError for damage found while reading.
    """
    names = {**dict.fromkeys(first.shapes), **dict.fromkeys(second.shapes)}
    for ours in names:
        shapes = [contents.shapes.get(ours) for contents in (first, second)]
        if None in shapes:
            holder, lacks = (first, second) if shapes[1] is None else (second, first)
            yield Difference(ours, math.inf, math.inf, False, f"{lacks.folder} lacks what {holder.folder} has")
        elif shapes[0] != shapes[1]:
            yield Difference(ours, math.inf, math.inf, False, f"shapes {shapes[0]} and {shapes[1]}")
        else:
            yield _difference(first, second, ours, advance)


def _difference(first: Contents, second: Contents, ours: str, advance: Callable[[int], None]) -> Difference:
    largest, squares, reference, equal = 0.0, 0.0, 0.0, True
    for part in first.matrices(ours):
        for a, b in zip(pieces(first.read(part)), pieces(second.read(part)), strict=True):
            advance(math.prod(a.shape))
            if _same_bytes(a, b):
                # Without a difference anywhere the norm of b has no say; with one, these values have theirs.
                reference += float(as_float(b).double().square().nansum())
                continue
            x, y = as_float(a).double(), as_float(b).double()
            apart = (x - y).masked_fill((x == y) | (x.isnan() & y.isnan()), 0.0)
            equal = equal and not bool((apart != 0).any())
            largest = _larger(largest, float(apart.abs().max()) if apart.numel() else 0.0)
            squares += float(apart.square().sum())
            reference += float(y.square().nansum())
    relative = 0.0 if squares == 0 else math.sqrt(squares / reference) if reference else math.inf
    return Difference(ours, largest, relative, equal)


def _same_bytes(a: Value, b: Value) -> bool:
    if isinstance(a, Quantized) and isinstance(b, Quantized):
        return a.format == b.format and _same_bits(a.codes, b.codes) and _same_bits(a.scale, b.scale)
    return isinstance(a, Tensor) and isinstance(b, Tensor) and _same_bits(a, b)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype:
        return False
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def _larger(a: float, b: float) -> float:
    """The larger one; NaN if there is one."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
