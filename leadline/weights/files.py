"""Folders of safetensors files, read and written one tensor at a time.

A folder holds either `model.safetensors`, or several shards and `model.safetensors.index.json`, which says which shard
holds which tensor. Nothing here knows a model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from leadline.weights.header import (
    CheckpointError,
    TensorInfo,
    build_header,
    dtype_name,
    lay_out,
    num_bytes,
    read_header,
    unique_keys,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
# Opening a file parses its header of thousands of tensors; a weight and its scales may lie in two files.
OPEN_FILES = 4

TensorSpec = tuple[str, torch.dtype, tuple[int, ...]]


class CheckpointReader:
    """The tensors of a folder. Opening reads and checks all headers; data is read only when asked for.

    tensors: name -> TensorInfo of every tensor, shard by shard in the order of their bytes.

    Opening raises CheckpointError, naming file and tensor, for a file that is cut short or damaged, an index that
    names a missing file or one outside the folder, a tensor that occurs twice, and an index and shards that disagree.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        weight_map = _read_index(self.folder)
        for path in _files_of(self.folder, weight_map):
            for name, info in read_header(path).tensors.items():
                if name in self._files:
                    raise CheckpointError(f"{path}: tensor {name} is in {self._files[name].name} too")
                self._files[name] = path
                self.tensors[name] = info
        if weight_map is not None:
            _check_index(self.folder / INDEX_FILE, weight_map, self._files)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU in its own dtype.

        Its memory is the file, mapped: pages are read when touched and can be dropped again, so looking at a tensor
        costs no memory of the process. Writing into it does not change the file.
        """
        path = self._files[name]
        try:
            return self._handle(path).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: tensor {name} cannot be read ({error})") from None

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, in the order of `tensors`."""
        for name in self.tensors:
            yield name, self.read(name)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            if len(self._open) == OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]


class ShardWriter:
    """Writes one file whose tensors are known beforehand by name, dtype and shape.

        with ShardWriter(path, [("a", torch.float32, (4, 3))]) as shard:
            shard.append("a", first_row)
            shard.append("a", other_rows)

    Because all sizes are known, the header is written first and every piece goes straight to its place: tensors in any
    order, alternating if need be, and none of them held. Leaving the block raises CheckpointError if a tensor is not
    complete. The file is open from the first piece to `close`, and opens again if more follows.

    tensors: name -> TensorInfo, in the order of their place in the file.
    """

    def __init__(self, path: Path, tensors: Iterable[TensorSpec]) -> None:
        self.path = path
        self.tensors = lay_out(tensors)
        # transformers refuses files that do not say "pt".
        header = build_header(self.tensors, {"format": "pt"})
        path.write_bytes(header)
        self._data_start = len(header)
        self._written = dict.fromkeys(self.tensors, 0)
        self._file: BinaryIO | None = None

    def append(self, name: str, piece: Tensor) -> None:
        """Write the next elements of a tensor, in row-major order; the piece may lie on any device.

        Raises CheckpointError for an unknown name, and for a piece whose dtype differs or which is longer than what is
        missing.
        """
        if name not in self.tensors:
            raise CheckpointError(f"tensor {name} was not announced")
        info = self.tensors[name]
        size = num_bytes(piece.dtype, piece.shape)
        if piece.dtype != info.dtype or size > self.missing_bytes(name):
            raise CheckpointError(
                f"tensor {name} {info} does not take a piece of {dtype_name(piece.dtype)} {list(piece.shape)}"
            )
        if self._file is None:
            self._file = self.path.open("r+b")
        self._file.seek(self._data_start + info.begin + self._written[name])
        self._file.write(_bytes_of(piece))
        self._written[name] += size

    def missing_bytes(self, name: str) -> int:
        """How many bytes of a tensor are still to be written."""
        info = self.tensors[name]
        return info.end - info.begin - self._written[name]

    def close(self) -> None:
        """Hand what was written to the operating system."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self.close()
        if kind is None:
            for name, info in self.tensors.items():
                if self.missing_bytes(name):
                    raise CheckpointError(f"tensor {name} {info} was given {self.missing_bytes(name)} bytes too few")


def plan_shards(groups: Iterable[Sequence[TensorSpec]], max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """File name -> tensors of each file of a folder. The tensors of a group lie in one file, and a file takes at most
    `max_shard_bytes` of data unless a single group is larger."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes {max_shard_bytes} must be positive")
    shards: list[list[TensorSpec]] = [[]]
    room, seen = max_shard_bytes, set()
    for group in groups:
        size = sum(num_bytes(dtype, shape) for _, dtype, shape in group)
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        room -= size
        for tensor in group:
            if tensor[0] in seen:
                raise CheckpointError(f"tensor {tensor[0]} was announced twice")
            seen.add(tensor[0])
            shards[-1].append(tensor)
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": shard for number, shard in enumerate(shards, start=1)}


def write_index(folder: Path, shards: Mapping[str, Iterable[TensorSpec]]) -> None:
    """Write the index of a folder with several files, as `plan_shards` gave them; a single file needs none."""
    if len(shards) == 1:
        return
    weight_map = {name: file_name for file_name, tensors in shards.items() for name, _, _ in tensors}
    total = sum(num_bytes(dtype, shape) for tensors in shards.values() for _, dtype, shape in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf8")


def _read_index(folder: Path) -> dict[str, str] | None:
    """The index's map from tensor to file name, or None when the folder has a single file."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if not index.exists():
        if single.exists():
            return None
        raise CheckpointError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    if single.exists():
        raise CheckpointError(
            f"{folder}: holds both {SINGLE_FILE} and {INDEX_FILE}: remove the one that is out of date"
        )
    try:
        content = json.loads(index.read_text(encoding="utf8"), object_pairs_hook=unique_keys)
    except CheckpointError as error:
        raise CheckpointError(f"{index}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not valid JSON ({error})") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map from tensor names to file names")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not _is_plain(file_name):
            raise CheckpointError(
                f"{index}: tensor {name} is said to be in {file_name!r}, which is no file of the folder"
            )
    return weight_map


def _is_plain(file_name: str) -> bool:
    """Whether a name from an index stays inside the folder."""
    return file_name not in ("", ".", "..") and not set(file_name) & {"/", "\\", "\0"}


def _files_of(folder: Path, weight_map: Mapping[str, str] | None) -> list[Path]:
    if weight_map is None:
        return [folder / SINGLE_FILE]
    for name, file_name in weight_map.items():
        if not os.path.isfile(folder / file_name):
            raise CheckpointError(
                f"{folder / INDEX_FILE}: tensor {name} is said to be in {file_name}, which is missing"
            )
    return [folder / file_name for file_name in sorted(set(weight_map.values()))]


def _check_index(index: Path, weight_map: Mapping[str, str], files: Mapping[str, Path]) -> None:
    for name, file_name in weight_map.items():
        if name not in files:
            raise CheckpointError(f"{index}: tensor {name} is said to be in {file_name}, which does not hold it")
        if files[name].name != file_name:
            raise CheckpointError(f"{index}: tensor {name} is said to be in {file_name}, it is in {files[name].name}")
    for name, path in files.items():
        if name not in weight_map:
            raise CheckpointError(f"{index}: tensor {name} of {path.name} is not listed")


def _bytes_of(piece: Tensor) -> memoryview:
    flat = piece.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
