"""Shards: token ids on disk, mapped into memory when read.

`build_shards` cuts a stream of documents into runs of about `SHARD_BYTES` bytes of text and writes each run as one
shard, two files in numpy's own format:

- `<digest>.tokens.npy`     all token ids one after the other, uint16 where the vocabulary allows it, else uint32;
- `<digest>.documents.npy`  int64 [documents, 2]: where each document's ids end, and how many UTF-8 bytes its text has.

A document is stored as BOS, its ids, EOS. `index.json` lists the shards in order and names the vocabulary.

The digest in a shard's name is a hash of its texts and of the tokenizer. That makes a build behave like `make`: a shard
whose files exist is finished and is not written again; a killed build continues where it stopped; a changed corpus
rebuilds what changed. A file appears in one step, complete, and the index comes after the shards it lists, so a reader
finds the old shards or the new ones, never a mixture.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from leadline.data.corpus import Document
from leadline.text.tokenizer import Tokenizer

SHARD_BYTES = 32 * 2**20

# Text tokenised in one call: enough documents to keep all cores busy, few enough for a progress bar that moves.
_BATCH_BYTES = 2**20

_VERSION = 1
_INDEX, _TOKENS, _DOCUMENTS = "index.json", ".tokens.npy", ".documents.npy"

Progress = Callable[[int, int | None], None]
"""Called with (done, total) documents; total is None where it is not known in advance."""


class ShardError(ValueError):
    """Shards cannot be used; one line that names the file, what was found and what to do."""


@dataclass(frozen=True)
class ShardInfo:
    """A shard's line in the index. bytes: UTF-8 bytes of its texts."""

    digest: str
    tokens: int
    documents: int
    bytes: int


# -- writing ----------------------------------------------------------------------------------------------------


def build_shards(
    documents: Iterable[Document],
    folder: str | Path,
    tokenizer: Tokenizer,
    *,
    source: str,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Shards:
    """Tokenise documents into `folder` and open the result.

    Safe to repeat and to interrupt: shards that are finished are kept. Equal documents and an equal tokenizer give
    equal files. source: what the documents are, for people who read the index.
    Raises ShardError when there is no document.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    total = len(documents) if isinstance(documents, Sized) else None
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    infos: list[ShardInfo] = []
    for run in _runs(documents, shard_bytes):
        digest = _digest(run, tokenizer)
        info = _finished(folder, digest)
        if info is None:
            info = _write_shard(folder, digest, run, tokenizer, advance)
        else:
            advance(len(run))
        infos.append(info)
    if not infos:
        raise ShardError(f"{folder}: no document to write; check the corpus ({source}) and the held-out share")
    _write_index(folder, infos, tokenizer, source)
    _remove_unlisted(folder, infos)
    return Shards(folder)


def _runs(documents: Iterable[Document], run_bytes: int) -> Iterator[list[Document]]:
    """Cut the stream after every document that completes `run_bytes` of text."""
    run: list[Document] = []
    size = 0
    for document in documents:
        run.append(document)
        size += len(document.text.encode("utf8"))
        if size >= run_bytes:
            yield run
            run, size = [], 0
    if run:
        yield run


def _digest(run: list[Document], tokenizer: Tokenizer) -> str:
    head = f"{_VERSION} {tokenizer.fingerprint} {tokenizer.bos_id} {tokenizer.eos_id}"
    digest = hashlib.blake2b(head.encode(), digest_size=16)
    for document in run:
        text = document.text.encode("utf8")
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return digest.hexdigest()


def _finished(folder: Path, digest: str) -> ShardInfo | None:
    """The shard's line in the index if both its files are there and whole."""
    try:
        tokens, documents = _open_shard(folder, digest)
    except ShardError:
        return None
    return ShardInfo(digest, tokens=len(tokens), documents=len(documents), bytes=int(documents[:, 1].sum()))


def _write_shard(
    folder: Path, digest: str, run: list[Document], tokenizer: Tokenizer, advance: Callable[[int], None]
) -> ShardInfo:
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    ids: list[np.ndarray] = []
    for batch in _runs(run, _BATCH_BYTES):
        for document_ids in tokenizer.encode_batch([document.text for document in batch]):
            ids.append(np.array([tokenizer.bos_id, *document_ids, tokenizer.eos_id], dtype=dtype))
        advance(len(batch))
    ends = np.cumsum([len(document_ids) for document_ids in ids], dtype=np.int64)
    sizes = np.array([len(document.text.encode("utf8")) for document in run], dtype=np.int64)
    _write_array(folder / f"{digest}{_DOCUMENTS}", np.stack([ends, sizes], axis=1))
    _write_array(folder / f"{digest}{_TOKENS}", np.concatenate(ids))
    return ShardInfo(digest, tokens=int(ends[-1]), documents=len(run), bytes=int(sizes.sum()))


def _write_index(folder: Path, infos: list[ShardInfo], tokenizer: Tokenizer, source: str) -> None:
    index = {
        "version": _VERSION,
        "source": source,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "tokens": sum(info.tokens for info in infos),
        "documents": sum(info.documents for info in infos),
        "bytes": sum(info.bytes for info in infos),
        "shards": [asdict(info) for info in infos],
    }
    content = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    _write_atomically(folder / _INDEX, lambda file: file.write(content.encode("utf8")))


def _remove_unlisted(folder: Path, infos: list[ShardInfo]) -> None:
    """Delete shards of an earlier corpus, and what a killed build left half written."""
    listed = {info.digest for info in infos}
    for path in folder.iterdir():
        unlisted = path.name.endswith((_TOKENS, _DOCUMENTS)) and path.name.split(".")[0] not in listed
        half_written = path.name.startswith(".") and path.name.endswith(".npy.tmp")
        if unlisted or half_written:
            path.unlink()


def _write_array(path: Path, array: np.ndarray) -> None:
    _write_atomically(path, lambda file: np.save(file, array, allow_pickle=False))


def _write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# -- reading ----------------------------------------------------------------------------------------------------


class Shards:
    """The documents of a folder of shards, numbered 0..num_documents-1 in the order of the corpus.

    lengths: int64 [documents], tokens of each document, BOS and EOS included. text_bytes: int64 [documents], UTF-8
    bytes of each text. The ids stay on disk until `tokens` reads them. Raises ShardError when the folder holds no
    finished build or a file is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        try:
            self.source: str = index["source"]
            self.tokenizer_fingerprint: str = index["tokenizer"]
            self.vocab_size: int = index["vocab_size"]
            infos = [ShardInfo(**line) for line in index["shards"]]
        except (KeyError, TypeError) as error:
            raise ShardError(f"{self.folder / _INDEX}: damaged ({error}); build the shards again") from None
        self._tokens: list[np.ndarray] = []
        tables: list[np.ndarray] = []
        for info in infos:
            tokens, table = _open_shard(self.folder, info.digest)
            if (len(tokens), len(table)) != (info.tokens, info.documents):
                raise ShardError(
                    f"{self.folder / info.digest}{_TOKENS}: holds {len(tokens)} tokens of {len(table)} documents, the "
                    f"index says {info.tokens} of {info.documents}; build the shards again"
                )
            self._tokens.append(tokens)
            tables.append(table)
        self._shard_of_document = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        self.lengths = np.concatenate([np.diff(table[:, 0], prepend=0) for table in tables])
        self._start_in_shard = np.concatenate([table[:, 0] for table in tables]) - self.lengths
        self.text_bytes = np.concatenate([table[:, 1] for table in tables])
        self.fingerprint = hashlib.blake2b("".join(info.digest for info in infos).encode(), digest_size=16).hexdigest()

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def num_bytes(self) -> int:
        return int(self.text_bytes.sum())

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Ids start..stop-1 of a document, a view into the file; stop = None means its end."""
        stop = int(self.lengths[document]) if stop is None else stop
        if not 0 <= start <= stop <= self.lengths[document]:
            raise IndexError(f"tokens {start}..{stop} of document {document}, which has {self.lengths[document]}")
        first = int(self._start_in_shard[document])
        return self._tokens[self._shard_of_document[document]][first + start : first + stop]

    def require_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ShardError unless these shards are written in the tokenizer's vocabulary."""
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise ShardError(
                f"{self.folder}: written with another tokenizer ({self.tokenizer_fingerprint[:8]}, {self.vocab_size} "
                f"tokens) than this one ({tokenizer.fingerprint[:8]}, {tokenizer.vocab_size}); build the shards again"
            )


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / _INDEX
    try:
        index = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise ShardError(f"{path}: no such file; build the shards, or let an interrupted build finish") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ShardError(f"{path}: not valid JSON ({error}); build the shards again") from None
    if not isinstance(index, dict) or index.get("version") != _VERSION:
        raise ShardError(f"{path}: not an index of version {_VERSION}; build the shards again")
    return index


def _open_shard(folder: Path, digest: str) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays of a shard, the tokens mapped into memory."""
    tokens = _open_array(folder / f"{digest}{_TOKENS}", mapped=True)
    table = _open_array(folder / f"{digest}{_DOCUMENTS}", mapped=False)
    fits = (
        tokens.ndim == 1
        and tokens.dtype in (np.uint16, np.uint32)
        and table.ndim == 2
        and table.shape[1] == 2
        and table.dtype == np.int64
        and len(table) > 0
        and table[-1, 0] == len(tokens)
        and np.all(np.diff(table[:, 0], prepend=0) >= 2)
    )
    if not fits:
        raise ShardError(f"{folder / digest}{_DOCUMENTS}: does not describe its tokens; build the shards again")
    return tokens, table


def _open_array(path: Path, mapped: bool) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except FileNotFoundError:
        raise ShardError(f"{path}: no such file; build the shards again") from None
    except (ValueError, EOFError, OSError) as error:
        size = path.stat().st_size
        raise ShardError(f"{path}: cut off or damaged at {size} bytes ({error}); build the shards again") from None
