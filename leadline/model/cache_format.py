"""Cache formats: what window keys, entries and index keys are rounded to before anything looks at them.

The released models keep the first K - R values of a key or entry in FP8 (blocks of 64) and the R rotary values in BF16,
and index queries and keys in FP4 (blocks of 32) after a Hadamard rotation (report 5.2.1). `SERVED` rounds through these
formats and back; `EXACT` leaves every value as computed and is the default.

The gradient passes straight through the rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from leadline.formats import fp4, fp8, hadamard

Rounding = Callable[[Tensor], Tensor]

FP8_BLOCK = 64


@dataclass(frozen=True)
class CacheFormat:
    """Roundings of the two kinds of cached vectors.

    key: applied to window keys and entries [..., K] given the width of their rotary part.
    index: applied to index queries and keys [..., I].
    """

    name: str
    key: Callable[[Tensor, int], Tensor]
    index: Rounding


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    return x + (rounded - x).detach() if x.requires_grad else rounded


def _served_key(x: Tensor, rotary_width: int) -> Tensor:
    rounded = x.detach().clone()
    rounded[..., :-rotary_width] = fp8.fake_quantize(rounded[..., :-rotary_width], FP8_BLOCK)
    return _straight_through(x, rounded)


def _served_index(x: Tensor) -> Tensor:
    rotated = hadamard.rotate(x)
    return _straight_through(rotated, fp4.fake_quantize(rotated.detach()))


EXACT = CacheFormat("exact", lambda x, rotary_width: x, lambda x: x)
SERVED = CacheFormat("served", _served_key, _served_index)
CACHE_FORMATS = {"exact": EXACT, "served": SERVED}
