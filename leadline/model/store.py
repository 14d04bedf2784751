"""Stores: rows of cached vectors, as floats or packed."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.formats.cache_entry import PackedIndex, PackedKeys, index_widths, key_widths
from leadline.ops.cache_rows import Source, read_rows, write_rows


class Store:
    """Vectors of one kind and width as rows.

    source: what ops read: floats [rows, width], or the bytes of packed keys or index keys. dtype: of the vectors that
    go in and come out.
    """

    def __init__(self, source: Source, width: int, dtype: torch.dtype):
        self.source, self.width, self.dtype = source, width, dtype

    @classmethod
    def floats(cls, rows: int, width: int, dtype: torch.dtype, device: torch.device | str) -> Store:
        return cls(torch.zeros(rows, width, dtype=dtype, device=device), width, dtype)

    @classmethod
    def packed_keys(
        cls, rows: int, width: int, rotary_width: int, dtype: torch.dtype, device: torch.device | str
    ) -> Store:
        return cls(PackedKeys(*_bytes(rows, key_widths(width, rotary_width), device)), width, dtype)

    @classmethod
    def packed_index(cls, rows: int, width: int, dtype: torch.dtype, device: torch.device | str) -> Store:
        return cls(PackedIndex(*_bytes(rows, index_widths(width), device)), width, dtype)

    def read(self, rows_X: Tensor) -> Tensor:
        """Vectors [X, width] of some rows, unpacked; zeros for row -1."""
        return read_rows(self.source, rows_X, self.width, self.dtype)

    def write(self, rows_X: Tensor, vectors_XK: Tensor) -> None:
        """Put vectors into rows that differ; those for row -1 go nowhere. Packed stores round."""
        write_rows(self.source, rows_X, vectors_XK)

    def tensors(self) -> dict[str, Tensor]:
        """What is held, by name; the first axis of each counts the rows."""
        return {"rows": self.source} if isinstance(self.source, Tensor) else self.source._asdict()

    def grow(self, groups: int, rows: int) -> None:
        """Lengthen each of `groups` equal runs of rows to `rows`, with zeros."""
        longer = {name: _lengthened(tensor, groups, rows) for name, tensor in self.tensors().items()}
        self.source = longer["rows"] if isinstance(self.source, Tensor) else type(self.source)(**longer)


def _bytes(rows: int, widths: tuple[int, int], device: torch.device | str) -> list[Tensor]:
    return [torch.zeros(rows, width, dtype=torch.uint8, device=device) for width in widths]


def _lengthened(tensor: Tensor, groups: int, rows: int) -> Tensor:
    runs = tensor.unflatten(0, (groups, len(tensor) // groups))
    return torch.nn.functional.pad(runs, (0, 0, 0, rows - runs.shape[1])).flatten(0, 1)
