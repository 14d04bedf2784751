"""Corpus: documents from files, in a stable order.

A document is one piece of text that belongs together: a file, a line of a JSON Lines file, a row of a parquet table.
Attention never crosses its borders, so what counts as one document decides what a model can learn from.

What is read: plain text of any ending (.txt, .md, .py, ...), `.jsonl` plain or compressed (.xz, .zst, .gz), and
`.parquet`. In the last two the text stands in one field, `text` unless said otherwise. A folder is read recursively, in
the order of its paths; names that start with a dot and links to folders are left out. Files that are not text (a zero
byte, not UTF-8) and empty documents are passed over, and `Corpus.skipped` tells how many of which kind. A damaged
container is an error: half of a JSON Lines file is not the corpus that was asked for.

Every machine with Python also has a corpus: the sources of its standard library and the documentation in them
(`standard_library_documents`).

A document belongs to the held-out text by a hash of its content (`is_held_out`). So the split needs no list of names,
does not move when files are added or reordered, and two copies of a text never end up on different sides.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import json
import lzma
import os
import sysconfig
import tokenize
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet

# A longer text file becomes several documents, cut at line ends: tokenising needs about 100 bytes per token.
MAX_DOCUMENT_BYTES = 4 * 2**20


class CorpusError(ValueError):
    """A corpus cannot be read; one line that names the file and what is wrong."""


@dataclass(frozen=True)
class Document:
    """A text and where it came from.

    kinship: the text whose hash decides about the held-out side, where this is not the document's own. Documents cut
    from one text share it, so that no held-out sentence is also in the training text.
    """

    text: str
    source: str
    kinship: str | None = None


def is_held_out(document: Document, percent: float) -> bool:
    """Whether a document is among the given percent that training never sees. Depends on its content only."""
    if not 0 <= percent <= 100:
        raise CorpusError(f"held-out percent = {percent}: must be between 0 and 100")
    content = document.text if document.kinship is None else document.kinship
    digest = hashlib.blake2b(content.encode("utf8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < percent / 100 * 2**64


# -- files ------------------------------------------------------------------------------------------------------


class Corpus:
    """The documents of a file or folder; can be iterated again and again.

    Raises CorpusError when the path does not exist, when a container is damaged or lacks the field, and at the end of
    an iteration that found no document.
    """

    def __init__(self, path: str | Path, field: str = "text") -> None:
        self.path = Path(path)
        self.field = field
        self.skipped: Counter[str] = Counter()  # of the latest iteration: reason -> number
        if not self.path.exists():
            raise CorpusError(f"{self.path}: no such file or folder")

    def files(self) -> list[Path]:
        """The files to read, sorted by path."""
        if not self.path.is_dir():
            return [self.path]
        return _files_below(self.path, leave_out=lambda name: name.startswith("."))

    def __iter__(self) -> Iterator[Document]:
        self.skipped = Counter()
        found = False
        for path in self.files():
            for document in self._documents(path):
                if not document.text.strip():
                    self.skipped["empty"] += 1
                    continue
                found = True
                yield document
        if not found:
            reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(self.skipped.items())) or "no files"
            raise CorpusError(f"{self.path}: holds no text ({reasons}); expected text, .jsonl or .parquet files")

    def _documents(self, path: Path) -> Iterator[Document]:
        if not path.is_file():
            self.skipped["not a regular file"] += 1  # a broken link, a socket
            return
        name = path.name if path == self.path else path.relative_to(self.path).as_posix()
        opener = next((opener for ending, opener in _JSONL_OPENERS.items() if path.name.endswith(ending)), None)
        try:
            if opener is not None:
                yield from self._jsonl(path, name, opener)
            elif path.suffix == ".parquet":
                yield from self._parquet(path, name)
            else:
                yield from self._plain(path, name)
        except UnicodeDecodeError as error:
            raise CorpusError(f"{path}: a text field is not UTF-8 ({error})") from None
        except (OSError, EOFError, lzma.LZMAError, zlib.error, pa.ArrowException) as error:
            raise CorpusError(f"{path}: cannot be read ({_reason(error)})") from None

    def _plain(self, path: Path, name: str) -> Iterator[Document]:
        with open(path, "rb") as file:
            for part, block in enumerate(_blocks(file), start=1):
                if b"\0" in block:
                    self.skipped["binary"] += 1
                    return
                try:
                    text = block.decode("utf-8-sig" if part == 1 else "utf8")
                except UnicodeDecodeError:
                    self.skipped["not UTF-8"] += 1
                    return
                yield Document(text, name if part == 1 else f"{name}#{part}")

    def _jsonl(self, path: Path, name: str, opener: Callable[[Path], Any]) -> Iterator[Document]:
        with opener(path) as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}:{number}"
                if line.strip():
                    yield from self._field(_json_value(line, where), where, f"{name}:{number}")

    def _parquet(self, path: Path, name: str) -> Iterator[Document]:
        with pyarrow.parquet.ParquetFile(path) as table:
            columns = table.schema_arrow.names
            if self.field not in columns:
                raise CorpusError(f"{path}: has no field {self.field!r}; its fields are {', '.join(columns)}")
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[self.field]):
                for row in batch.to_pylist():
                    number += 1
                    yield from self._field(row, f"{path}:{number}", f"{name}:{number}")

    def _field(self, row: object, where: str, source: str) -> Iterator[Document]:
        """The row's text, or nothing where it is null or has no UTF-8 form."""
        if not isinstance(row, dict):
            raise CorpusError(f"{where}: holds a {type(row).__name__}, expected an object with a field {self.field!r}")
        fields = cast("dict[str, object]", row)
        if self.field not in fields:
            raise CorpusError(f"{where}: has no field {self.field!r}; its fields are {', '.join(fields) or 'none'}")
        text = fields[self.field]
        if text is None:
            self.skipped["empty"] += 1
        elif not isinstance(text, str):
            raise CorpusError(f"{where}: field {self.field!r} holds a {type(text).__name__}, expected text")
        elif not _has_utf8_form(text):
            self.skipped["not UTF-8"] += 1
        else:
            yield Document(text, source)


def _files_below(root: Path, leave_out: Callable[[str], bool]) -> list[Path]:
    """All files in the order of their paths, without the files and folders whose name is left out."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root, onerror=_refuse_folder):
        subfolders[:] = [name for name in subfolders if not leave_out(name)]
        found.extend(Path(folder, name) for name in names if not leave_out(name))
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _open_zstd(path: Path) -> BinaryIO:
    # Arrow's stream, unlike most, reports a file that was cut off.
    stream = pa.CompressedInputStream(pa.OSFile(str(path), "rb"), "zstd")
    return io.BufferedReader(cast(io.RawIOBase, stream), buffer_size=2**20)


_JSONL_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".jsonl": partial(open, mode="rb"),
    ".jsonl.xz": lzma.open,
    ".jsonl.gz": gzip.open,
    ".jsonl.zst": _open_zstd,
}


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """The content in blocks of about MAX_DOCUMENT_BYTES that end at a line's end; one empty block for an empty file."""
    first = True
    while (block := file.read(MAX_DOCUMENT_BYTES)) or first:
        yield block if block.endswith(b"\n") else block + file.readline()
        first = False


def _json_value(line: bytes, where: str) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise CorpusError(f"{where}: not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where}: not valid JSON ({error})") from None


def _has_utf8_form(text: str) -> bool:
    """False for a lone surrogate, which JSON can spell but UTF-8 cannot."""
    try:
        text.encode("utf8")
    except UnicodeEncodeError:
        return False
    return True


def _refuse_folder(error: OSError) -> None:
    raise CorpusError(f"{error.filename}: cannot be read ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    """The first line of an error's text; Arrow's run over several."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return text.splitlines()[0] if text else type(error).__name__


# -- the standard library ---------------------------------------------------------------------------------------

# Test data, installed packages, and tables of characters.
_LIBRARY_FOLDERS_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
_LANGUAGE_TOPICS = "pydoc_data/topics.py"


def standard_library_documents() -> Iterator[Document]:
    """The standard library of the running Python as a corpus: per module its source and its documentation as prose.

    The order is that of the paths. The language reference behind `help()` gives one document for each topic. Left out
    are test data, character tables and the build configuration of this machine.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in _files_below(root, _left_out_of_library) if path.suffix == ".py"]
    if not paths:
        raise CorpusError(f"{root}: holds no Python sources; name a file or folder of text instead")
    for path in paths:
        name = path.relative_to(root).as_posix()
        with tokenize.open(path) as file:  # honours a coding line
            source = file.read()
        if name == _LANGUAGE_TOPICS:
            yield from _topic_documents(source)
        elif source.strip():
            yield Document(source, f"stdlib/{name}")
            prose = documentation(source, name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
            if prose:
                yield Document(prose, f"stdlib/{name}#documentation", kinship=source)


def documentation(source: str, module: str) -> str:
    """The documentation strings of a module as one text, each under the name of what it documents; "" if none."""
    parts: list[str] = []

    def visit(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> None:
        if text := ast.get_docstring(node):
            parts.append(f"{name}\n\n{text}\n")
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, child.name if isinstance(node, ast.Module) else f"{name}.{child.name}")

    try:
        visit(ast.parse(source), module)
    except SyntaxError:
        return ""
    return "\n".join(parts)


def _left_out_of_library(name: str) -> bool:
    return name in _LIBRARY_FOLDERS_LEFT_OUT or name.startswith("_sysconfigdata")


def _topic_documents(source: str) -> Iterator[Document]:
    assignment = next(node for node in ast.parse(source).body if isinstance(node, ast.Assign))
    topics: dict[str, str] = ast.literal_eval(assignment.value)
    for topic, text in sorted(topics.items()):
        yield Document(text, f"stdlib/{_LANGUAGE_TOPICS}#{topic}")
