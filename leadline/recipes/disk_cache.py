"""The prefix cache on disk of the verbs that run a model: which folder, how large, and for what exactly.

A record is of use only where the same bits would be computed again. So records are kept apart by everything that
decides about them: the weights (`weights/fingerprint.py`), this package's version, dtype and cache format, the kind of
device, and what else a verb says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from leadline import __version__
from leadline.cli import UsageError
from leadline.engine.disk import DiskCache
from leadline.model.transformer import Transformer
from leadline.recipes.load_model import CacheName, DtypeName
from leadline.weights.fingerprint import fingerprint

GIB = 32.0
"""Most of a cache when nothing is said."""


def open_disk_cache(
    folder: Path | None,
    gib: float,
    checkpoint: Path,
    model: Transformer,
    *,
    dtype: DtypeName,
    cache: CacheName,
    others: str,
    report: Callable[[str], None],
) -> DiskCache | None:
    """The cache in `folder`, or None without one. gib: most of it, in GiB. others: settings that decide about the bits
    too. report: gets a line when something goes wrong later. Raises UsageError, DiskCacheError and CheckpointError."""
    if not gib > 0:
        raise UsageError(f"disk_cache_gib={gib}: expected more than 0")
    if folder is None:
        return None
    kind = model.embed.weight.device.type
    identity = f"{fingerprint(checkpoint)} {__version__} {dtype} {cache} {kind} {others}"
    return DiskCache(folder.expanduser(), identity, int(gib * 2**30), report)
