"""Rows of a cache, read and written in the format that they are kept in: as floats, or packed in eight or four bits."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.formats.cache_entry import PackedIndex, PackedKeys
from leadline.ops.cache_rows.reference import read_rows_reference, write_rows_reference
from leadline.ops.dispatch import use_kernel

Source = Tensor | PackedKeys | PackedIndex


def read_rows(source: Source, rows_X: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """vectors[x] = source[rows[x]], unpacked, and zeros where rows[x] is -1.

    source: [rows, width] of floats, or packed keys or index keys of that width. rows_X: int32 or int64, in any order.
    Returns [X, width] in `dtype`; exact in bfloat16 and wider when the source is packed. Not differentiable.
    """
    if use_kernel("read_rows", rows_X) and dtype != torch.float64:
        from leadline.ops.cache_rows.kernel import read_rows_kernel

        return read_rows_kernel(*operands(source), rows_X, width, dtype)
    return read_rows_reference(source, rows_X, width, dtype)


def write_rows(target: Source, rows_X: Tensor, vectors_XK: Tensor) -> None:
    """target[rows[x]] = vectors[x], rounded to the format of the target; nothing is written where rows[x] is -1.

    target: as the source of `read_rows`, contiguous, changed in place. rows_X: int32 or int64, no row twice. The bytes
    are those of `pack_keys` and `pack_index`; vectors that have that precision already keep their values. Index keys
    must have been rotated (`formats.hadamard`).
    """
    if use_kernel("write_rows", vectors_XK):
        from leadline.ops.cache_rows.kernel import write_rows_kernel

        write_rows_kernel(*operands(target), rows_X, vectors_XK)
    else:
        write_rows_reference(target, rows_X, vectors_XK)


def operands(source: Source) -> tuple[Tensor, Tensor | None]:
    """A source as kernels take it: values or bytes, and the scales, which floats do not have."""
    return (source, None) if isinstance(source, Tensor) else (source[0], source[1])
