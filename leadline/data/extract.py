"""Extract: the text of one file, or the reason why it has none.

Text is UTF-8, or UTF-16 with its mark in front. A zero byte makes a file binary, as in git, and so does a share of
faulty bytes that no slip explains. Few faults in a text are replaced by U+FFFD, and the note says how many.

The text of a PDF is what its pages spell, in their order; pictures of pages spell nothing.
"""

from __future__ import annotations

import codecs
import io
import os
import stat
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# More faults than this share of the characters are another encoding, not a slip.
MOST_FAULTS = 0.1
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
PDF_MARK = b"%PDF-"
# A PDF is mostly fonts and pictures: its size says little about its text.
MAX_PDF_BYTES = 2**28

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Extract:
    """text: None if there is none to read. note: why there is none, or what is odd about it."""

    text: str | None
    note: str | None = None


def extract(path: Path, max_bytes: int) -> Extract:
    """The text of a file; larger than `max_bytes`, the file or the text of a PDF, it is left out whole.

    Never raises for what a file holds: damaged, unreadable and odd files give a note.
    """
    try:
        content = _read(path, max_bytes)
    except OSError as error:
        return Extract(None, f"cannot be read: {error.strerror}")
    if content is None:
        return Extract(None, "too large")
    if not content.startswith(PDF_MARK):
        return decode(content)
    found = _pdf(content)
    too_large = found.text is not None and len(found.text.encode()) > max_bytes
    return Extract(None, "too large") if too_large else found


def decode(content: bytes) -> Extract:
    """Bytes as text."""
    if content.startswith(_UTF16_MARKS):
        text = content.decode("utf-16", errors="replace")
    elif b"\0" in content:
        return Extract(None, "binary")
    else:
        text = content.removeprefix(codecs.BOM_UTF8).decode("utf8", errors="replace")
    faults = text.count(REPLACEMENT) - content.count(REPLACEMENT.encode())
    if faults > MOST_FAULTS * len(text):
        return Extract(None, "not UTF-8")
    return Extract(text, f"{faults} faults of encoding replaced by {REPLACEMENT}" if faults > 0 else None)


def _read(path: Path, max_bytes: int) -> bytes | None:
    """The content; None if it is too large. A file may have become something else since it was listed: nothing that
    is no regular file is read, and nothing waits for a writer."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(0, "not a regular file")
        content = file.read(max_bytes + 1)
        if content.startswith(PDF_MARK):
            content += file.read(max(MAX_PDF_BYTES - len(content), 0) + 1)
            return content if len(content) <= MAX_PDF_BYTES else None
        return content if len(content) <= max_bytes else None


def _pdf(content: bytes) -> Extract:
    if not find_spec("pypdf"):
        return Extract(None, 'PDF, which needs pypdf: pip install "leadline[pack]"')
    import pypdf

    try:
        reader = pypdf.PdfReader(io.BytesIO(content))
        if reader.is_encrypted and not reader.decrypt(""):
            return Extract(None, "PDF with a password")
        pages = [page.extract_text() for page in reader.pages]
    except Exception as error:  # the library meets damage with nearly every type of error
        return Extract(None, f"damaged PDF: {type(error).__name__}")
    # A font table can claim a lone half of a surrogate pair, which no UTF-8 has.
    texts = [page.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip() for page in pages]
    if not any(texts):
        return Extract(None, "PDF without text")
    return Extract("\n\n".join(f"[page {number}]\n{text}" for number, text in enumerate(texts, start=1) if text) + "\n")
