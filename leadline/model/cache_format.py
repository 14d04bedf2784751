"""Cache formats: what window keys, entries and index keys are rounded to before anything looks at them.

The released models keep the first K - R values of a key or entry in FP8 (blocks of 64) and the R rotary values in BF16,
and index queries and keys in FP4 (blocks of 32) after a Hadamard rotation (report 5.2.1).

- `EXACT`, the default, leaves every value as computed.
- `SERVED` rounds through these formats and back, so that floats hold what the bytes would.
- `PACKED` rounds the same way, and a state keeps the bytes (`formats.cache_entry`). Every logit has the bits of
  `SERVED`; only the memory differs.

The gradient passes straight through the rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from leadline.formats import fp4, hadamard
from leadline.formats.cache_entry import round_keys

Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class CacheFormat:
    """Roundings of the two kinds of cached vectors, and the form that a state keeps them in.

    key: applied to window keys and entries [..., K] given the width of their rotary part.
    index: applied to index queries and keys [..., I].
    packed: whether a state keeps bytes, in place of floats in the model's dtype.
    """

    name: str
    key: Callable[[Tensor, int], Tensor]
    index: Rounding
    packed: bool = False


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    return x + (rounded - x).detach() if x.requires_grad else rounded


def _served_key(x: Tensor, rotary_width: int) -> Tensor:
    return _straight_through(x, round_keys(x.detach(), rotary_width))


def _served_index(x: Tensor) -> Tensor:
    rotated = hadamard.rotate(x)
    return _straight_through(rotated, fp4.fake_quantize(rotated.detach()))


EXACT = CacheFormat("exact", lambda x, rotary_width: x, lambda x: x)
SERVED = CacheFormat("served", _served_key, _served_index)
PACKED = CacheFormat("packed", _served_key, _served_index, packed=True)
CACHE_FORMATS = {"exact": EXACT, "served": SERVED, "packed": PACKED}
