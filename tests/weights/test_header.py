"""The header of a safetensors file: agreement with the library, and every way in which it can lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from leadline.weights.header import DTYPES, CheckpointError, build_header, lay_out, num_bytes, read_header


def write(path: Path, entries: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_agrees_with_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {code: torch.zeros(3, 2).to(dtype) for code, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    raw = path.read_bytes()
    info = header.tensors["scalar"]
    assert raw[header.data_start + info.begin : header.data_start + info.end] == b"\0\0\xc0\x3f"


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
        max_size=8,
    )
)
def test_what_is_built_can_be_read_by_us_and_by_the_library(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[str, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    placed = lay_out((name, DTYPES[code], tuple(shape)) for name, (code, shape) in tensors.items())
    size = max((info.end for info in placed.values()), default=0)
    path.write_bytes(build_header(placed, {"format": "pt"}) + bytes(size))
    header = read_header(path)
    assert header.tensors == placed
    assert header.data_start % 8 == 0
    assert all(info.begin % info.dtype.itemsize == 0 for info in placed.values())
    loaded = load_file(path)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in loaded.items()} == {
        name: (info.dtype, info.shape) for name, info in placed.items()
    }


def test_file_cut_at_every_byte(tmp_path: Path) -> None:
    path, cut = tmp_path / "x.safetensors", tmp_path / "cut.safetensors"
    save_file({"first": torch.zeros(3), "second": torch.zeros(2, 2), "third": torch.zeros(5).bfloat16()}, path)
    raw, header = path.read_bytes(), read_header(path)
    for size in range(len(raw)):
        cut.write_bytes(raw[:size])
        with pytest.raises(CheckpointError) as caught:
            read_header(cut)
        message = str(caught.value)
        assert str(cut) in message
        assert "cut short" in message
        assert "\n" not in message
        if size >= header.data_start:
            lost = next(n for n, info in header.tensors.items() if header.data_start + info.end > size)
            assert f"inside tensor {lost} " in message


def test_appended_bytes_are_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="1 bytes follow the last tensor"):
        read_header(path)


def test_any_flipped_header_byte_is_an_error_or_another_valid_header(tmp_path: Path) -> None:
    """Damage never surfaces as anything but CheckpointError."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, path)
    raw, start = path.read_bytes(), read_header(path).data_start
    refused = 0
    for position in range(start):
        damaged = bytearray(raw)
        damaged[position] ^= 0x15
        path.write_bytes(damaged)
        try:
            header = read_header(path)
        except CheckpointError:
            refused += 1
        else:
            assert sum(num_bytes(info.dtype, info.shape) for info in header.tensors.values()) == len(raw) - start
    assert refused > 0.7 * start


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        (b"{", b"", "not JSON"),
        (b"\xff\xfe", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        (b"[1]", b"", "JSON list, not an object"),
        (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":1}', b"", "'a' occurs twice"),
        ({"a": 3}, b"", "tensor a is not described"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", "tensor a is not described"),
        ({"a": entry(dtype="F12")}, bytes(8), "tensor a has dtype 'F12'"),
        ({"a": {**entry(), "dtype": ["F32"]}}, bytes(8), "tensor a has dtype"),
        ({"a": entry(shape=[-2])}, bytes(8), r"tensor a has shape \[-2\]"),
        ({"a": entry(shape=[2.0])}, bytes(8), r"tensor a has shape \[2.0\]"),
        ({"a": entry(shape=[True, 2])}, bytes(8), "tensor a has shape"),
        ({"a": entry(shape=2)}, bytes(8), "tensor a has shape 2"),
        ({"a": entry(shape=[2**62, 2**62])}, bytes(8), "tensor a F32 .* takes"),
        ({"a": entry(shape=[3])}, bytes(8), r"tensor a F32 \[3\] takes 12 bytes, not 8"),
        ({"a": entry(offsets=[8, 0])}, bytes(8), "tensor a has data_offsets"),
        ({"a": entry(offsets=[0])}, bytes(8), "tensor a has data_offsets"),
        ({"a": entry(offsets=[-8, 0])}, bytes(8), "tensor a has data_offsets"),
        ({"a": entry(offsets=[4, 12])}, bytes(12), "tensor a begins at byte 4 of the data, the one before ends at 0"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "tensor b begins at byte 4"),
        ({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20), "tensor b begins at byte 12"),
        ({"a": entry(), "b": entry()}, bytes(8), "tensor b begins at byte 0"),
        ({"__metadata__": {"format": 1}}, b"", "__metadata__"),
        ({"__metadata__": []}, b"", "__metadata__"),
    ],
    ids=str,
)
def test_lies_are_named(tmp_path: Path, entries: Any, data: bytes, message: str) -> None:
    path = write(tmp_path / "x.safetensors", entries, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(str(path))


def test_absurd_header_length_is_not_allocated(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", b"{}", length=2**63)
    with pytest.raises(CheckpointError, match="the file is damaged or no safetensors file"):
        read_header(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)
