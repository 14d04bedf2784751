"""From one folder of weights to another: formats and names change, values as little as the formats allow.

    fp4 -> fp8 -> bf16     exact: eight bits hold every block of four, bfloat16 holds both
    bf16 -> fp8 -> fp4     rounded to nearest, with the scale that the released files have for such a block
    bf16 -> fp8 -> bf16    after that, nothing changes any more

Where the target has the format and the scales that the folder has already, the bytes are copied. The conversion
streams: in memory are pieces of one matrix. It can be interrupted at any moment; the next run of the same conversion
keeps the shards that were complete and gives the folder that an uninterrupted run would have given, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from leadline import __version__
from leadline.model.config import ModelConfig
from leadline.weights.contents import Contents
from leadline.weights.files import MAX_SHARD_BYTES
from leadline.weights.folder import TOKENIZER_FILES, resumable_folder
from leadline.weights.header import CheckpointError, num_bytes
from leadline.weights.names import NAMINGS
from leadline.weights.save import generation_config
from leadline.weights.stored import PLAIN
from leadline.weights.target import (
    CONFIG_SPELLING,
    SCALES,
    Advance,
    Form,
    Output,
    config_of,
    form_of,
    plan,
    write_weights,
)

FINGERPRINT_DIGITS = 16
COPIED = ("generation_config.json", *TOKENIZER_FILES)


@dataclass(frozen=True)
class Conversion:
    """What a folder is turned into; everything left at None stays as it is.

    format: one of `target.FORMATS`. naming: one of `names.NAMINGS`. scales: dtype of the scales, float32 or
    float8_e8m0fnu; None: as the released files of the format have them.
    """

    format: str | None = None
    naming: str | None = None
    scales: torch.dtype | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES

    def __post_init__(self) -> None:
        if self.naming is not None and self.naming not in NAMINGS:
            raise ValueError(f"naming {self.naming!r} is not one of {', '.join(NAMINGS)}")
        if self.scales not in (None, *SCALES.values()):
            raise ValueError(f"scales of {self.scales} are not written, only float32 and float8_e8m0fnu")


@dataclass(frozen=True)
class Job:
    """A conversion that has been planned: all outputs are known, nothing is written yet."""

    source: Contents
    config: ModelConfig
    outputs: list[Output]
    naming: str
    max_shard_bytes: int
    fingerprint: str

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights to be written."""
        return sum(num_bytes(dtype, shape) for output in self.outputs for _, dtype, shape in output.specs)


def prepare(source: str | Path, conversion: Conversion) -> Job:
    """Read the headers of a folder and plan its conversion.

    Raises ConfigError and CheckpointError, with file and tensor, for a folder that cannot be read, for tensors that
    DeepSeek-V4 does not have, and where a format does not fit a shape.
    """
    contents, config = Contents(source), ModelConfig.from_file(source)
    naming = conversion.naming or contents.naming
    forms = {ours: _form(contents, ours, conversion) for ours in contents.shapes}
    if conversion.format is not None:
        config = config_of(config, conversion.format)
    outputs = plan(contents.shapes, forms, naming)
    fingerprint = _fingerprint(contents, config, outputs, conversion.max_shard_bytes)
    return Job(contents, config, outputs, naming, conversion.max_shard_bytes, fingerprint)


def convert(job: Job, target: str | Path, advance: Advance = lambda written: None) -> None:
    """Write the folder `target`; it appears when it is complete.

    advance: told the number of bytes as weights are written. The source's tokenizer files and generation_config.json
    come along.

    Raises FileExistsError if there is a `target` already, OSError if the disk has no room, CheckpointError for damage
    found while reading; after the last one nothing is left behind, after anything else the next run goes on where this
    one stopped.
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists already: remove it, or choose another name")
    with resumable_folder(target, job.fingerprint) as folder:
        _check_room(folder, job)
        write_weights(folder, job.outputs, job.source.read, max_shard_bytes=job.max_shard_bytes, advance=advance)
        (folder / "config.json").write_text(job.config.to_json(CONFIG_SPELLING[job.naming]), encoding="utf8")
        (folder / "generation_config.json").write_text(generation_config(job.config), encoding="utf8")
        for file in sorted(job.source.folder.iterdir()):
            if any(fnmatchcase(file.name, pattern) for pattern in COPIED):
                shutil.copyfile(file, folder / file.name)


def _form(contents: Contents, ours: str, conversion: Conversion) -> Form:
    found = contents.stored(ours)
    first = found[0]
    if conversion.format is not None:
        scales = conversion.scales or SCALES.get(conversion.format, torch.float32)
        return form_of(ours, first.dtype if first.format == PLAIN else torch.float32, conversion.format, scales)
    for other in found:
        if (other.format, other.dtype, other.scale_dtype) != (first.format, first.dtype, first.scale_dtype):
            raise CheckpointError(
                f"{contents.reader.file_of(other.name)}: tensor {other.name} is {other}, {first.name} is {first}: "
                f"give a format for both to be converted to"
            )
    if first.format == PLAIN or first.scale_dtype is None:
        return Form(PLAIN, first.dtype)
    return Form(first.format, conversion.scales or first.scale_dtype)


def _fingerprint(contents: Contents, config: ModelConfig, outputs: list[Output], max_shard_bytes: int) -> str:
    """Some digits that differ when the result might."""
    files = {contents.reader.file_of(name) for name in contents.reader.entries}
    seen = [
        __version__,
        [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)],
        config.to_json(),
        [[(name, str(dtype), shape) for name, dtype, shape in output.specs] for output in outputs],
        max_shard_bytes,
    ]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:FINGERPRINT_DIGITS]


def _check_room(folder: Path, job: Job) -> None:
    there = sum(file.stat().st_size for file in folder.iterdir())
    free = shutil.disk_usage(folder).free
    if job.total_bytes - there > free:
        raise OSError(f"{folder.parent}: {job.total_bytes - there:,} bytes are needed, {free:,} are free")
