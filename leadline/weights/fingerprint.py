"""Fingerprint: which model a folder holds, without reading all of its weights.

A cache that outlives the process must not answer for other weights. Names, dtypes and shapes do not tell two stages of
one training apart, so the fingerprint also covers when the files were written and how long they are, and some blocks of
each. A copy of the folder with new times counts as another model: a cold start, which is the harmless mistake.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

from leadline.weights.files import CheckpointReader
from leadline.weights.header import CheckpointError, dtype_name

DIGEST_BYTES = 16
SAMPLES, SAMPLE_BYTES = 16, 4096


def fingerprint(folder: str | Path) -> str:
    """A hash over config.json, all headers, and per file its time, length and 16 blocks; raises CheckpointError."""
    reader = CheckpointReader(folder)
    digest = blake2b(digest_size=DIGEST_BYTES)
    files = sorted({reader.file_of(name) for name in reader.tensors})
    try:
        digest.update((reader.folder / "config.json").read_bytes())
        for name, info in sorted(reader.tensors.items()):
            place = [name, dtype_name(info.dtype), info.shape, info.begin, info.end, reader.file_of(name).name]
            digest.update(repr(place).encode())
        for path in files:
            found = path.stat()
            digest.update(repr([path.name, found.st_size, found.st_mtime_ns]).encode())
            with path.open("rb") as file:
                for number in range(SAMPLES):
                    file.seek(max(found.st_size - SAMPLE_BYTES, 0) * number // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()
