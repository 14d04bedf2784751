"""Reading and writing rows of a cache in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.formats.cache_entry import (
    PackedIndex,
    PackedKeys,
    pack_index,
    pack_keys,
    unpack_index,
    unpack_keys,
)


@torch.no_grad()
def read_rows_reference(
    source: Tensor | PackedKeys | PackedIndex, rows_X: Tensor, width: int, dtype: torch.dtype
) -> Tensor:
    row_X = rows_X.clamp_min(0).long()
    if isinstance(source, Tensor):
        vectors_XK = source.index_select(0, row_X).to(dtype)
    elif isinstance(source, PackedKeys):
        rotary_width = source.payload.shape[-1] - width
        vectors_XK = unpack_keys(PackedKeys(source.payload[row_X], source.scales[row_X]), rotary_width, dtype)
    else:
        vectors_XK = unpack_index(PackedIndex(source.codes[row_X], source.scales[row_X]), dtype)
    return vectors_XK.masked_fill((rows_X < 0)[..., None], 0.0)


@torch.no_grad()
def write_rows_reference(target: Tensor | PackedKeys | PackedIndex, rows_X: Tensor, vectors_XK: Tensor) -> None:
    if not len(rows_X):
        return
    if isinstance(target, Tensor):
        _write(target, rows_X, vectors_XK.to(target.dtype))
        return
    if isinstance(target, PackedKeys):
        packed = pack_keys(vectors_XK, target.payload.shape[-1] - vectors_XK.shape[-1])
    else:
        packed = pack_index(vectors_XK)
    for part, values in zip(target, packed, strict=True):
        _write(part, rows_X, values)


def _write(target: Tensor, rows_X: Tensor, values_XB: Tensor) -> None:
    """target[rows] = values, but for rows -1: these repeat the first write that is made, or, where none is, put row 0
    in its own place. So the shapes do not depend on how many there are, and a compiled step has no other path."""
    kept_X = rows_X >= 0
    first_1 = kept_X.int().argmax(0, keepdim=True)
    row_1 = rows_X[first_1].clamp_min(0).long()
    value_1B = torch.where(kept_X[first_1, None], values_XB[first_1], target[row_1])
    target[torch.where(kept_X, rows_X, row_1)] = torch.where(kept_X[:, None], values_XB, value_1B)
