"""The header of a safetensors file: what it says, and whether it can be true.

A file is 8 bytes of header length N (little endian), N bytes of JSON, then the data. The JSON maps each tensor's name
to its dtype, its shape and its half-open range of bytes in the data; `__metadata__` maps strings to strings. The
ranges leave no gap and end where the file ends, so the header alone shows that a file was cut short, and which tensor
lost its bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Weights are converted between these and no others.
CASTABLE = (torch.float32, torch.bfloat16, torch.float16)

_CODES = {dtype: code for code, dtype in DTYPES.items()}

# The limit of the safetensors library. Any real header is smaller, and a length beyond it is damage.
MAX_HEADER_BYTES = 100_000_000


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message names the file and the tensor."""


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of one tensor, and the range of its bytes counted from the start of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)} {list(self.shape)}"


@dataclass(frozen=True)
class Header:
    """The tensors of one file by name, in the order of their bytes, and where the data begins in the file."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int


def dtype_name(dtype: torch.dtype) -> str:
    """The code of a dtype in safetensors files, or torch's name where the format has none."""
    return _CODES.get(dtype, str(dtype))


def num_bytes(dtype: torch.dtype, shape: Iterable[int]) -> int:
    """Size of a tensor in a file."""
    return dtype.itemsize * math.prod(shape)


def read_header(path: Path) -> Header:
    """Read and check the header of a file; CheckpointError says in one line what is wrong, and with which tensor."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: {size} bytes are no safetensors file: it is cut short")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: header of {length} bytes: the file is damaged or no safetensors file")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if len(text) < length:
        raise CheckpointError(f"{path}: cut short inside the header ({len(text)} of {length} bytes)")
    entries = _parse(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ does not map strings to strings")
    tensors = {name: _read_entry(path, name, entry) for name, entry in entries.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_ranges(path, tensors, size - 8 - length)
    return Header(tensors, metadata, 8 + length)


def lay_out(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """Give tensors their ranges of bytes in one file.

    Larger elements come first: every tensor then starts at a multiple of its element size, which readers that map the
    file into memory rely on.
    """
    result, begin = {}, 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -tensor[1].itemsize):
        end = begin + num_bytes(dtype, shape)
        result[name] = TensorInfo(dtype, tuple(shape), begin, end)
        begin = end
    return result


def build_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data of a file with these tensors, padded so that the data is aligned to 8."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, info in tensors.items():
        if info.dtype not in _CODES:
            raise CheckpointError(f"tensor {name} is {info.dtype}, which safetensors files cannot hold")
        entries[name] = {
            "dtype": _CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [info.begin, info.end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(object_pairs_hook=...)`: a key that occurs twice is an error, not a silent choice of the last."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise CheckpointError(f"'{twice}' occurs twice")
    return result


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(text.decode("utf8"), object_pairs_hook=unique_keys)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: in the header, {error}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: the header is not JSON: the file is damaged or no safetensors file") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(entries).__name__}, not an object")
    return entries


def _read_entry(path: Path, name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{path}: tensor {name} is not described by dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name} has dtype {code!r}, known are {', '.join(DTYPES)}")
    if not _are_sizes(shape):
        raise CheckpointError(f"{path}: tensor {name} has shape {shape!r}, expected a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path}: tensor {name} has data_offsets {offsets!r}, expected [begin, end]")
    info = TensorInfo(DTYPES[code], tuple(shape), *offsets)
    needed = num_bytes(info.dtype, shape)
    if info.end - info.begin != needed:
        raise CheckpointError(f"{path}: tensor {name} {info} takes {needed} bytes, not {info.end - info.begin}")
    return info


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_ranges(path: Path, tensors: Mapping[str, TensorInfo], data_bytes: int) -> None:
    position = 0
    for name, info in tensors.items():
        if info.begin != position:
            raise CheckpointError(
                f"{path}: tensor {name} begins at byte {info.begin} of the data, the one before ends at {position}"
            )
        if info.end > data_bytes:
            raise CheckpointError(
                f"{path}: cut short inside tensor {name} {info}: the data ends at byte {data_bytes}, "
                f"the tensor at {info.end}; fetch the file again"
            )
        position = info.end
    if position != data_bytes:
        raise CheckpointError(f"{path}: {data_bytes - position} bytes follow the last tensor: the file is damaged")
