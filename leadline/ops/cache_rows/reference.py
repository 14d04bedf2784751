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
        vectors_XK = source[row_X].to(dtype)
    elif isinstance(source, PackedKeys):
        rotary_width = source.payload.shape[-1] - width
        vectors_XK = unpack_keys(PackedKeys(source.payload[row_X], source.scales[row_X]), rotary_width, dtype)
    else:
        vectors_XK = unpack_index(PackedIndex(source.codes[row_X], source.scales[row_X]), dtype)
    return vectors_XK.masked_fill((rows_X < 0)[..., None], 0.0)


@torch.no_grad()
def write_rows_reference(target: Tensor | PackedKeys | PackedIndex, rows_X: Tensor, vectors_XK: Tensor) -> None:
    kept = rows_X >= 0
    row_X, vectors_XK = rows_X[kept].long(), vectors_XK[kept]
    if isinstance(target, Tensor):
        target[row_X] = vectors_XK.to(target.dtype)
        return
    if isinstance(target, PackedKeys):
        packed = pack_keys(vectors_XK, target.payload.shape[-1] - vectors_XK.shape[-1])
    else:
        packed = pack_index(vectors_XK)
    for part, values in zip(target, packed, strict=True):
        part[row_X] = values
