"""Folders of safetensors files, read and written one tensor at a time.

A folder holds either `model.safetensors`, or several shards and `model.safetensors.index.json`, which says which shard
holds which tensor. Nothing here knows a model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
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
        self._open: tuple[Path, Any] | None = None
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
        if self._open is None or self._open[0] != path:
            self._open = (path, safe_open(path, framework="pt"))
        return self._open[1]


class CheckpointWriter:
    """Writes the files of a folder whose tensors are known beforehand by name, dtype and shape.

        with CheckpointWriter(folder, [("a", torch.float32, (4, 3))]) as writer:
            writer.write("a", [first_row, other_rows])

    Because all sizes are known, the headers are written first and every tensor goes straight to its place: in any order
    (that of `tensors` is fastest), and holding none of them. A shard takes at most `max_shard_bytes` of data unless a
    single tensor is larger. Leaving the block writes the index, or raises CheckpointError if a tensor is missing. The
    folder must exist; wrap it in `folder.new_folder` to make the result appear whole or not at all.

    tensors: name -> TensorInfo, in the order of their place in the files.
    """

    def __init__(
        self,
        folder: str | Path,
        tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.folder = Path(folder)
        self._shards: dict[Path, dict[str, TensorInfo]] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        self._open: tuple[Path, BinaryIO] | None = None
        shards = _plan_shards(tensors, max_shard_bytes)
        for number, shard in enumerate(shards, start=1):
            file_name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            self._start_shard(self.folder / file_name, lay_out(shard))
        self.tensors = {name: info for shard in self._shards.values() for name, info in shard.items()}
        self._missing = set(self.tensors)

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Write one tensor, given as pieces whose elements follow each other in row-major order.

        Pieces may lie on any device. Raises CheckpointError for an unknown name, a name written before, or pieces whose
        dtype or number of elements does not fit.
        """
        if name not in self._missing:
            raise CheckpointError(f"tensor {name} was {'written before' if name in self.tensors else 'not announced'}")
        info = self.tensors[name]
        path, offset = self._places[name]
        file = self._handle(path)
        file.seek(offset)
        room = info.end - info.begin
        for piece in pieces:
            if piece.dtype != info.dtype or num_bytes(piece.dtype, piece.shape) > room:
                raise CheckpointError(
                    f"tensor {name} {info} does not take a piece of {dtype_name(piece.dtype)} {list(piece.shape)}"
                )
            room -= num_bytes(piece.dtype, piece.shape)
            file.write(_bytes_of(piece))
        if room:
            raise CheckpointError(f"tensor {name} {info} was given {room} bytes too few")
        self._missing.remove(name)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._close()
        if kind is None:
            self._finish()

    def _finish(self) -> None:
        if self._missing:
            raise CheckpointError(f"tensor {min(self._missing)} was never written ({len(self._missing)} missing)")
        if len(self._shards) > 1:
            weight_map = {name: path.name for name, (path, _) in self._places.items()}
            total = sum(info.end - info.begin for info in self.tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
            (self.folder / INDEX_FILE).write_text(text, encoding="utf8")

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _start_shard(self, path: Path, tensors: dict[str, TensorInfo]) -> None:
        # transformers refuses files that do not say "pt".
        header = build_header(tensors, {"format": "pt"})
        path.write_bytes(header)
        self._shards[path] = tensors
        for name, info in tensors.items():
            self._places[name] = (path, len(header) + info.begin)

    def _handle(self, path: Path) -> BinaryIO:
        if self._open is None or self._open[0] != path:
            self._close()
            self._open = (path, path.open("r+b"))
        return self._open[1]


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


def _plan_shards(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], max_shard_bytes: int
) -> list[list[tuple[str, torch.dtype, tuple[int, ...]]]]:
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes {max_shard_bytes} must be positive")
    shards, room, seen = [[]], max_shard_bytes, set()
    for name, dtype, shape in tensors:
        if name in seen:
            raise CheckpointError(f"tensor {name} was announced twice")
        size = num_bytes(dtype, shape)
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((name, dtype, shape))
        seen.add(name)
        room -= size
    return shards


def _bytes_of(piece: Tensor) -> memoryview:
    flat = piece.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
