"""The prefix cache on disk: pages and fixed blocks that outlive the process.

A record is what all layers keep of one page of 128 tokens, or a fixed block. Its key is a hash over everything that it
depends on: the model (`fingerprint`), the namespace, and all tokens from the first one on, chained page by page. So a
record can neither be found by another text nor by another model, and nothing has to be read at the start.

The store is LMDB: a write is a transaction, so a process that is killed, or a machine that stops, leaves the last
complete state. Each record carries a checksum; a damaged one is dropped and counts as absent. When the records outgrow
`max_bytes`, those that were not used for the longest time go. A full disk ends the writing, not the serving; a store
that is damaged itself is set aside, and an empty one takes its place. Several processes may use one folder. What is in
it tells what was asked, so it is readable for its owner alone.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

DIGEST_BYTES = 16
# LMDB wants to know how far its file may grow; pages of the tree and records that are being replaced come on top.
MAP_FACTOR, MAP_SPARE_BYTES = 1.25, 64 * 2**20
MOST_NOTES = 1024
_CLOCK, _BYTES = b"clock", b"bytes"


class DiskCacheError(ValueError):
    """The folder cannot serve as a disk cache; the message names it and the reason."""


@dataclass
class DiskCounts:
    """What happened since the start. damaged: records dropped because their checksum was wrong."""

    hits: int = 0
    misses: int = 0
    written: int = 0
    evicted: int = 0
    damaged: int = 0


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a page that holds `tokens` and follows the page of key `parent`."""
    return blake2b(np.asarray(tokens, dtype="<i8").tobytes(), digest_size=DIGEST_BYTES, key=parent).digest()


def root_key(fingerprint: str, namespace: str) -> bytes:
    """The key before the first page."""
    lengths = struct.pack("<QQ", len(fingerprint.encode()), len(namespace.encode()))
    return blake2b(lengths + fingerprint.encode() + namespace.encode(), digest_size=DIGEST_BYTES).digest()


class DiskCache:
    """folder: its own, made if missing. max_bytes: of all records. report: gets one line when something goes wrong."""

    def __init__(self, folder: str | Path, fingerprint: str, max_bytes: int, report: Callable[[str], None]):
        self.folder, self.fingerprint, self.max_bytes, self.report = Path(folder), fingerprint, max_bytes, report
        self.counts = DiskCounts()
        self.readable = self.writable = True
        self._uses: dict[bytes, None] = {}  # records that were read since the last write, the latest last
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._env = self._opened()
            self._env.reader_check()  # a reader that was killed would keep the space of old records
            self._records = self._env.open_db(b"records")
            self._used = self._env.open_db(b"used")  # key of a record to the clock reading of its last use
            self._order = self._env.open_db(b"order")  # the same the other way round, oldest first
            self._meta = self._env.open_db(b"meta")
        except (OSError, lmdb.Error) as error:
            raise DiskCacheError(f"{folder}: cannot be opened as a disk cache: {error}") from error

    def close(self) -> None:
        self._change(self._note_uses)
        self._env.close()

    @property
    def num_bytes(self) -> int:
        """Bytes of all records."""
        return _number(self._get(_BYTES, self._meta))

    def has_page(self, key: bytes) -> bool:
        return self._has(b"p" + key)

    def has_block(self, key: bytes) -> bool:
        """Whether the fixed block at the end of the page of this key is stored."""
        return self._has(b"b" + key)

    def read_page(self, key: bytes) -> dict[str, Tensor] | None:
        """Tensors of a page by name, or None when it is not there or damaged."""
        return self._read(b"p" + key)

    def read_block(self, key: bytes) -> dict[str, Tensor] | None:
        return self._read(b"b" + key)

    def write(self, pages: Mapping[bytes, Mapping[str, Tensor]], blocks: Mapping[bytes, Mapping[str, Tensor]]) -> None:
        """Store pages and fixed blocks, all or none of them."""
        records = {b"p" + key: tensors for key, tensors in pages.items()}
        records |= {b"b" + key: tensors for key, tensors in blocks.items()}
        if not self.writable or not records:
            return
        try:
            with self._begin(write=True) as change:
                self._note_uses(change)
                for key, tensors in records.items():
                    self._put(change, key, _encoded(tensors))
                self._shrink(change)
        except (OSError, lmdb.Error) as error:
            self.writable = False
            self.report(f"{self.folder}: the disk cache stops writing: {error}")

    def _opened(self) -> lmdb.Environment:
        """The store, or an empty one in place of one that is damaged."""
        size = int(self.max_bytes * MAP_FACTOR) + MAP_SPARE_BYTES
        store = self.folder / "data.mdb"
        for _ in range(2):
            try:
                env = lmdb.open(str(self.folder), map_size=size, max_dbs=4, subdir=True, mode=0o600)
                if (env.info()["last_pgno"] + 1) * env.stat()["psize"] <= store.stat().st_size:
                    return env
                env.close()  # the file was cut; reading what is missing would end the process
            except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError):
                pass
            store.replace(store.with_suffix(".damaged"))
            self.report(f"{store}: is damaged; it was renamed to {store.stem}.damaged, and the disk cache begins anew")
        raise DiskCacheError(f"{self.folder}: cannot be opened as a disk cache: {store.name} stays damaged")

    # -- records ---------------------------------------------------------------------------------------------------

    def _has(self, key: bytes) -> bool:
        return self._get(key, self._used) is not None

    def _get(self, key: bytes, table: Any) -> bytes | None:
        if not self.readable:
            return None
        try:
            with self._begin() as read:
                value = read.get(key, db=table)
                return None if value is None else bytes(value)
        except lmdb.Error as error:
            self.readable = self.writable = False
            self.report(f"{self.folder}: the disk cache cannot be read any more and is left alone: {error}")
            return None

    def _begin(self, write: bool = False) -> lmdb.Transaction:
        try:
            return self._env.begin(write=write)
        except lmdb.MapResizedError:  # another process allows it more
            self._env.set_mapsize(0)
            return self._env.begin(write=write)

    def _read(self, key: bytes) -> dict[str, Tensor] | None:
        value = self._get(key, self._records)
        if value is None:
            self.counts.misses += 1
            return None
        tensors = _decoded(value)
        if tensors is None:
            self.counts.damaged += 1
            self.report(f"{self.folder}: record {key.hex()} is damaged and was dropped")
            self._change(lambda change: self._drop(change, key))
            return None
        self.counts.hits += 1
        self._uses.pop(key, None)
        self._uses[key] = None
        if len(self._uses) >= MOST_NOTES:
            self._change(self._note_uses)
        return tensors

    def _change(self, act: Callable[[lmdb.Transaction], None]) -> None:
        """A small change that may fail without harm, such as noting a use."""
        if not self.writable:
            return
        try:
            with self._begin(write=True) as change:
                act(change)
        except (OSError, lmdb.Error) as error:
            self.writable = False
            self.report(f"{self.folder}: the disk cache stops writing: {error}")

    def _note_uses(self, change: lmdb.Transaction) -> None:
        """Uses are noted many at a time: a transaction takes longer than reading a record."""
        for key in self._uses:
            if change.get(key, db=self._used) is not None:
                self._touch(change, key)
        self._uses.clear()

    def _put(self, change: lmdb.Transaction, key: bytes, value: bytes) -> None:
        if change.get(key, db=self._used) is None:
            change.put(key, value, db=self._records)
            self._add_bytes(change, len(value))
            self.counts.written += 1
        self._touch(change, key)

    def _touch(self, change: lmdb.Transaction, key: bytes) -> None:
        clock = _number(change.get(_CLOCK, db=self._meta)) + 1
        before = change.get(key, db=self._used)
        if before is not None:
            change.delete(before, db=self._order)
        change.put(_CLOCK, struct.pack(">Q", clock), db=self._meta)
        change.put(key, struct.pack(">Q", clock), db=self._used)
        change.put(struct.pack(">Q", clock), key, db=self._order)

    def _drop(self, change: lmdb.Transaction, key: bytes) -> None:
        value, used = change.get(key, db=self._records), change.get(key, db=self._used)
        if value is not None:
            self._add_bytes(change, -len(value))
            change.delete(key, db=self._records)
        if used is not None:
            change.delete(used, db=self._order)
            change.delete(key, db=self._used)

    def _shrink(self, change: lmdb.Transaction) -> None:
        while _number(change.get(_BYTES, db=self._meta)) > self.max_bytes:
            with change.cursor(db=self._order) as cursor:
                if not cursor.first():
                    return
                oldest = bytes(cursor.value())
            self._drop(change, oldest)
            self.counts.evicted += 1

    def _add_bytes(self, change: lmdb.Transaction, count: int) -> None:
        change.put(_BYTES, struct.pack(">Q", _number(change.get(_BYTES, db=self._meta)) + count), db=self._meta)


def _number(value: bytes | memoryview | None) -> int:
    return 0 if value is None else struct.unpack(">Q", value)[0]


def _encoded(tensors: Mapping[str, Tensor]) -> bytes:
    body = safetensors.torch.save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
    return blake2b(body, digest_size=DIGEST_BYTES).digest() + body


def _decoded(value: bytes) -> dict[str, Tensor] | None:
    digest, body = value[:DIGEST_BYTES], value[DIGEST_BYTES:]
    if blake2b(body, digest_size=DIGEST_BYTES).digest() != digest:
        return None
    try:
        return safetensors.torch.load(body)
    except SafetensorError:
        return None
