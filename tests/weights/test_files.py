"""Folders of safetensors files: round trips in every dtype, shards, and everything an index can get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from leadline.weights.files import (
    INDEX_FILE,
    MAX_SHARD_BYTES,
    CheckpointReader,
    ShardWriter,
    plan_shards,
    write_index,
)
from leadline.weights.header import DTYPES, CheckpointError

SHAPES = st.lists(st.integers(0, 4), max_size=3)


def random_tensor(dtype: torch.dtype, *shape: int) -> Tensor:
    """Any bit pattern, NaN and infinity too; booleans are 0 or 1."""
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return (raw > 127)[..., 0] if dtype == torch.bool else raw.view(dtype)[..., 0]


def same_bits(a: Tensor, b: Tensor) -> bool:
    flat_a, flat_b = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(flat_a, flat_b)


def write_folder(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    shards = plan_shards([[(name, x.dtype, tuple(x.shape))] for name, x in tensors.items()], max_shard_bytes)
    for file_name, specs in shards.items():
        with ShardWriter(folder / file_name, specs) as shard:
            for name, _, _ in specs:
                shard.append(name, tensors[name])
    write_index(folder, shards)


def sharded(folder: Path) -> dict[str, Tensor]:
    """Three tensors in three shards with an index."""
    tensors = {name: torch.randn(4, 3) for name in ("a", "b", "c")}
    write_folder(folder, tensors, max_shard_bytes=60)
    return tensors


def edit_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    for name, file_name in changes.items():
        if file_name is None:
            del index["weight_map"][name]
        else:
            index["weight_map"][name] = file_name
    (folder / INDEX_FILE).write_text(json.dumps(index))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 100, 1])
def test_every_dtype_survives_bitwise(tmp_path: Path, max_shard_bytes: int) -> None:
    tensors = {f"t.{code}": random_tensor(dtype, 5, 3) for code, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 7), "strided": torch.randn(6, 8).t()[1::2]}
    write_folder(tmp_path, tensors, max_shard_bytes=max_shard_bytes)
    reader = CheckpointReader(tmp_path)
    read = dict(reader.items())
    assert read.keys() == tensors.keys()
    assert all(same_bits(read[name], tensor) for name, tensor in tensors.items())
    by_library = {n: t for file in tmp_path.glob("*.safetensors") for n, t in load_file(file).items()}
    assert all(same_bits(by_library[name], tensor) for name, tensor in tensors.items())


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=8
    ),
    st.integers(1, 300),
    st.randoms(use_true_random=False),
)
def test_any_tensors_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[str, list[int]]], max_shard_bytes: int, random: Any
) -> None:
    folder = tmp_path_factory.mktemp("files")
    tensors = {f"t{i}": random_tensor(DTYPES[code], *shape) for i, (code, shape) in enumerate(kinds)}
    shards = plan_shards([[(name, x.dtype, tuple(x.shape))] for name, x in tensors.items()], max_shard_bytes)
    for file_name, specs in shards.items():
        halves = []
        for name, _, _ in specs:
            flat = tensors[name].reshape(-1)
            cut = random.randint(0, len(flat))
            halves.append([(name, flat[:cut]), (name, flat[cut:])])
        with ShardWriter(folder / file_name, specs) as shard:
            while halves:
                turn = random.choice(halves)
                shard.append(*turn.pop(0))
                if not turn:
                    halves.remove(turn)
                if random.random() < 0.3:
                    shard.close()
    write_index(folder, shards)
    reader = CheckpointReader(folder)
    assert all(same_bits(reader.read(name), tensor) for name, tensor in tensors.items())
    for file in folder.glob("*.safetensors"):
        sizes = [t.numel() * t.element_size() for t in load_file(file).values()]
        assert sum(sizes) <= max_shard_bytes or sum(size > 0 for size in sizes) == 1


def test_shards_are_named_as_in_the_released_folders(tmp_path: Path) -> None:
    sharded(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        INDEX_FILE,
    ]
    assert json.loads((tmp_path / INDEX_FILE).read_text())["metadata"] == {"total_size": 3 * 48}


def test_reading_does_not_write(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    CheckpointReader(tmp_path).read("a").zero_()
    assert torch.equal(CheckpointReader(tmp_path).read("a"), tensors["a"])


# -- what the writer refuses --


PLAN = [("a", torch.float32, (4,)), ("b", torch.float32, (4,))]


@pytest.mark.parametrize(
    ("name", "pieces", "message"),
    [
        ("c", [torch.zeros(4)], "tensor c was not announced"),
        ("b", [torch.zeros(4)], r"tensor b F32 \[4\] does not take a piece of F32 \[4\]"),
        ("a", [torch.zeros(4).bfloat16()], r"tensor a F32 \[4\] does not take a piece of BF16 \[4\]"),
        ("a", [torch.zeros(2), torch.zeros(3)], r"tensor a F32 \[4\] does not take a piece of F32 \[3\]"),
        ("a", [torch.zeros(3)], r"tensor a F32 \[4\] was given 4 bytes too few"),
        ("a", [], r"tensor a F32 \[4\] was given 16 bytes too few"),
    ],
    ids=["unknown", "twice", "dtype", "too long", "too short", "nothing"],
)
def test_writer_refuses_what_was_not_announced(tmp_path: Path, name: str, pieces: list[Tensor], message: str) -> None:
    def write() -> None:
        with ShardWriter(tmp_path / "model.safetensors", PLAN) as shard:
            shard.append("b", torch.zeros(4))
            for piece in pieces:
                shard.append(name, piece)

    with pytest.raises(CheckpointError, match=message):
        write()


def test_unfinished_files_do_not_read_as_a_checkpoint(tmp_path: Path) -> None:
    def write() -> None:
        with ShardWriter(tmp_path / "model.safetensors", PLAN) as shard:
            shard.append("a", torch.zeros(4))

    with pytest.raises(CheckpointError, match=r"tensor b F32 \[4\] was given 16 bytes too few"):
        write()
    with pytest.raises(CheckpointError, match="cut short inside tensor b"):
        CheckpointReader(tmp_path)


def test_a_group_stays_in_one_file() -> None:
    tensors = [("codes", torch.int8, (100,)), ("scales", torch.float8_e8m0fnu, (10,))]
    shards = plan_shards([[("first", torch.int8, (50,))], tensors, [("last", torch.int8, (60,))]], 155)
    names = {file_name: [name for name, _, _ in specs] for file_name, specs in shards.items()}
    assert names == {
        "model-00001-of-00003.safetensors": ["first"],
        "model-00002-of-00003.safetensors": ["codes", "scales"],
        "model-00003-of-00003.safetensors": ["last"],
    }


def test_bad_plans_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor a was announced twice"):
        plan_shards([[("a", torch.float32, (4,))], [("a", torch.float32, (4,))]], 100)
    with pytest.raises(ValueError, match="max_shard_bytes 0"):
        plan_shards([[("a", torch.float32, (4,))]], 0)
    with pytest.raises(CheckpointError, match=r"tensor a .*complex64"):
        ShardWriter(tmp_path / "model.safetensors", [("a", torch.complex64, (4,))])


# -- what the reader refuses --


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match="holds neither"):
        CheckpointReader(tmp_path / "absent")


def test_single_file_beside_an_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds both"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        ".",
        "",
        "a\\b.safetensors",
        "a\0b",
        7,
        None,
    ],
    ids=repr,
)
def test_index_cannot_lead_out_of_the_folder(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    sharded(folder)
    save_file({"a": torch.zeros(1)}, tmp_path / "outside.safetensors")
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["a"] = name
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"tensor a is said to be in .* which is no file of the folder"):
        CheckpointReader(folder)


def test_index_names_a_missing_file(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"tensor b is said to be in model-00002.*, which is missing"):
        CheckpointReader(tmp_path)
    edit_index(tmp_path, b="x" * 300)
    with pytest.raises(CheckpointError, match="tensor b"):
        CheckpointReader(tmp_path)


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    sharded(tmp_path)
    first = "model-00001-of-00003.safetensors"
    edit_index(tmp_path, b=first)
    with pytest.raises(CheckpointError, match=r"tensor b is said to be in model-00001.*, which does not hold it"):
        CheckpointReader(tmp_path)
    edit_index(tmp_path, b="model-00002-of-00003.safetensors", ghost=first)
    with pytest.raises(CheckpointError, match=r"tensor ghost is said to be in model-00001.*, which does not hold it"):
        CheckpointReader(tmp_path)
    edit_index(tmp_path, ghost=None)
    save_file({"b": torch.zeros(4, 3), "extra": torch.zeros(1)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor extra of model-00002.* is not listed"):
        CheckpointReader(tmp_path)


def test_tensor_in_the_wrong_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    first, second = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    edit_index(tmp_path, a=second, b=first)
    with pytest.raises(CheckpointError, match=r"tensor a is said to be in model-00002.*, it is in model-00001"):
        CheckpointReader(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"a": torch.zeros(4, 3), "b": torch.zeros(4, 3)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00002.*: tensor a is in model-00001.* too"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "no weight_map"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' occurs twice"),
    ],
    ids=["syntax", "depth", "list", "empty", "no tensors", "wrong kind", "key twice"],
)
def test_damaged_index(tmp_path: Path, text: str, message: str) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointReader(tmp_path)
    assert INDEX_FILE in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    shard = tmp_path / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00003.*: cut short inside tensor c F32 \[4, 3\]"):
        CheckpointReader(tmp_path)


def test_file_that_vanishes_after_opening(tmp_path: Path) -> None:
    sharded(tmp_path)
    reader = CheckpointReader(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.*: tensor b cannot be read"):
        reader.read("b")
