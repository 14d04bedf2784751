"""Extraction: text comes out as it is, and everything else with the reason."""

from __future__ import annotations

import codecs
import io
import os
from pathlib import Path

import pypdf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from leadline.data import extract as module
from leadline.data.extract import Extract, decode, extract


@settings(max_examples=100)
@given(text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\ufffd")))
def test_text_survives_in_its_encodings(text: str) -> None:
    for encoding in ("utf8", "utf-8-sig", "utf-16"):
        content = text.encode(encoding)
        assert decode(content) == Extract(text.removeprefix("\ufeff") if encoding == "utf8" else text)


@settings(max_examples=100)
@given(content=st.binary())
def test_any_bytes_give_text_or_a_reason(content: bytes) -> None:
    found = decode(content)
    assert (found.text is None) <= (found.note is not None)
    if found.text is not None:
        found.text.encode()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", Extract("")),
        (b"a\0b", Extract(None, "binary")),
        ("Привет, мир".encode("cp1251"), Extract(None, "not UTF-8")),
        (b"twenty good letters \xff", Extract("twenty good letters \ufffd", "1 faults of encoding replaced by \ufffd")),
        ("spelled \ufffd".encode(), Extract("spelled \ufffd")),
        (codecs.BOM_UTF8 + b"x\r\n", Extract("x\r\n")),
    ],
)
def test_oddities_are_said(content: bytes, expected: Extract) -> None:
    assert decode(content) == expected


def test_size_limits_hold_at_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100)
    assert extract(path, 100).text == "x" * 100
    assert extract(path, 99) == Extract(None, "too large")


def test_a_huge_file_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2**40)
    assert extract(path, 1000) == Extract(None, "too large")


def test_what_cannot_be_read_is_a_note(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert extract(tmp_path / "pipe", 10) == Extract(None, "cannot be read: not a regular file")
    assert extract(tmp_path / "none", 10) == Extract(None, "cannot be read: No such file or directory")
    assert extract(Path("/proc/self/mem"), 10) == Extract(None, "cannot be read: Input/output error")


# -- PDF ----------------------------------------------------------------------------------------------------------


def pdf(*pages: str, password: str = "") -> bytes:
    writer = pypdf.PdfWriter()
    for text in pages:
        page = writer.add_blank_page(200, 200)
        font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
        fonts = DictionaryObject(
            {NameObject("/F1"): DictionaryObject({NameObject(k): NameObject(v) for k, v in font.items()})}
        )
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = stream
    if password:
        writer.encrypt(password, algorithm="RC4-128")
    file = io.BytesIO()
    writer.write(file)
    return file.getvalue()


def test_pages_of_a_pdf_in_order(tmp_path: Path) -> None:
    path = tmp_path / "without an ending"
    path.write_bytes(pdf("first words", "", "last words"))
    assert extract(path, 2**20) == Extract("[page 1]\nfirst words\n\n[page 3]\nlast words\n")
    assert extract(path, 20) == Extract(None, "too large")  # the text counts, not the fonts


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (pdf(""), "PDF without text"),
        (pdf("secret", password="pass"), "PDF with a password"),
        (b"%PDF-1.7\nnothing more", "damaged PDF: "),
        (pdf("words")[:300], "damaged PDF: "),
    ],
)
def test_a_pdf_without_readable_text_says_why(tmp_path: Path, content: bytes, note: str) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(content)
    found = extract(path, 2**20)
    assert found.text is None
    assert str(found.note).startswith(note)


def test_without_the_library_the_note_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf("words"))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert extract(path, 2**20) == Extract(None, 'PDF, which needs pypdf: pip install "leadline[pack]"')
