"""The fingerprint of a folder: the same while nothing changes, another one whenever the weights may be others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from leadline.model.config import TINY
from leadline.model.transformer import Transformer
from leadline.weights.fingerprint import fingerprint
from leadline.weights.header import CheckpointError
from leadline.weights.save import save_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(Transformer(TINY), TINY, tmp_path / "model", max_shard_bytes=200_000)
    return tmp_path / "model"


def test_it_stays_and_the_tokenizer_has_no_part_in_it(folder: Path) -> None:
    before = fingerprint(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert fingerprint(folder) == before == fingerprint(str(folder))
    assert len(before) == 32


def test_other_values_of_one_size_and_time_are_another_model(folder: Path) -> None:
    before = fingerprint(folder)
    shard = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    times = shard.stat()
    content = bytearray(shard.read_bytes())
    content[-4000:] = torch.randint(0, 255, (4000,), dtype=torch.uint8).numpy().tobytes()
    shard.write_bytes(content)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(folder) != before


@pytest.mark.parametrize("change", ["config", "time"])
def test_a_changed_config_or_time_is_another_model(folder: Path, change: str) -> None:
    before = fingerprint(folder)
    if change == "config":
        (folder / "config.json").write_text(TINY.replace(rms_norm_eps=1e-5).to_json())
    else:
        os.utime(next(folder.glob("*.safetensors")), (1, 1))
    assert fingerprint(folder) != before


def test_a_folder_without_config_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        fingerprint(folder)
