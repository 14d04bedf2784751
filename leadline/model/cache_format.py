"""Cache formats: what window keys, entries and index keys are rounded to before anything looks at them.

The released models keep the first K - R values of a key or entry in FP8 (blocks of 64) and the R rotary values in BF16,
and index queries and keys in FP4 (blocks of 32) after a Hadamard rotation (report 5.2.1).

- `EXACT`, the default, leaves every value as computed.
- `SERVED` rounds through these formats and back, so that floats hold what the bytes would.
- `PACKED` rounds the same way, and a state keeps the bytes (`formats.cache_entry`). Every logit has the bits of
  `SERVED`; only the memory differs.

The rounding itself is part of `ops.norm_rope`; gradients pass straight through it.
"""

from __future__ import annotations

from dataclasses import dataclass

from leadline.ops.norm_rope import Rounding


@dataclass(frozen=True)
class CacheFormat:
    """What the two kinds of cached vectors are rounded to, and the form that a state keeps them in.

    key: of window keys and entries [..., K]. index: of index queries and keys [..., I]. None: as computed.
    packed: whether a state keeps bytes, in place of floats in the model's dtype.
    """

    name: str
    key: Rounding | None
    index: Rounding | None
    packed: bool = False


EXACT = CacheFormat("exact", key=None, index=None)
SERVED = CacheFormat("served", key="fp8", index="fp4")
PACKED = CacheFormat("packed", key="fp8", index="fp4", packed=True)
CACHE_FORMATS = {"exact": EXACT, "served": SERVED, "packed": PACKED}
