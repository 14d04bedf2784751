"""Reading documents: every container, stable order, hostile files, and a held-out split that cannot leak."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import lzma
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leadline.data import corpus
from leadline.data.corpus import Corpus, CorpusError, Document, documentation, is_held_out, standard_library_documents

ROWS = [{"text": "first\u2028line", "n": 1}, {"text": "zweite Zeile 🌊"}, {"text": "third\n"}]
TEXTS = [row["text"] for row in ROWS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode("utf8")


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def parquet(columns: dict[str, list[object]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), sink)
    return sink.getvalue()


CONTAINERS: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: LINES,
    "a.jsonl.gz": lambda: gzip.compress(LINES),
    "a.jsonl.xz": lambda: lzma.compress(LINES),
    "a.jsonl.zst": lambda: zstd(LINES),
    "a.parquet": lambda: parquet({"n": [1, 2, 3], "text": list(TEXTS)}),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CONTAINERS[name]())
    documents = list(Corpus(tmp_path / name))
    assert [document.text for document in documents] == TEXTS
    assert [document.source for document in documents] == [f"{name}:1", f"{name}:2", f"{name}:3"]


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_several_compressed_streams_in_one_file(tmp_path: Path, ending: str) -> None:
    name = f"a.jsonl{ending}"
    (tmp_path / name).write_bytes(CONTAINERS[name]() * 2)
    assert [document.text for document in Corpus(tmp_path)] == TEXTS * 2


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_container_is_an_error_of_one_line(tmp_path: Path, name: str, damage: str) -> None:
    content = CONTAINERS[name]()
    (tmp_path / name).write_bytes(content[: len(content) // 2] if damage == "cut" else b"no such format")
    with pytest.raises(CorpusError, match=rf"{name}: cannot be read \(.+\)$") as caught:
        list(Corpus(tmp_path))
    assert "\n" not in str(caught.value)


def test_cut_parquet_page_is_an_error(tmp_path: Path) -> None:
    content = bytearray(parquet({"text": ["x" * 1000] * 50}))
    content[8:60] = b"\xff" * 52
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(CorpusError, match=r"a\.parquet: cannot be read") as caught:
        list(Corpus(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"content": "x", "id": 3}', "has no field 'text'; its fields are content, id"),
        (b"{}", "has no field 'text'; its fields are none"),
        (b'{"text": 3}', "field 'text' holds a int, expected text"),
        (b'["text"]', "holds a list, expected an object with a field 'text'"),
        (b'{"text": "cut of', "not valid JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b"1" * 5000, "not valid JSON"),
    ],
)
def test_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(CorpusError, match=r"a\.jsonl:3: ") as caught:
        list(Corpus(tmp_path))
    assert message in str(caught.value)


def test_parquet_without_the_field_names_its_columns(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet({"id": [1], "content": ["x"]}))
    with pytest.raises(CorpusError, match="has no field 'text'; its fields are id, content"):
        list(Corpus(tmp_path))
    assert [document.text for document in Corpus(tmp_path, field="content")] == ["x"]


def test_parquet_text_must_be_utf8(tmp_path: Path) -> None:
    column = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    pyarrow.parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet: a text field is not UTF-8"):
        list(Corpus(tmp_path))


def test_null_and_unwritable_text_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "\\ud800"}\n{"text": " \\n"}\n{"text": "ok"}\n')
    read = Corpus(tmp_path)
    assert [document.text for document in read] == ["ok"]
    assert read.skipped == {"empty": 2, "not UTF-8": 1}


def test_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}')
    assert [document.text for document in Corpus(tmp_path)] == ["one", "two"]


# -- folders ----------------------------------------------------------------------------------------------------


def test_folder_is_read_in_path_order_and_skips_are_counted(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, content in {
        "b/z.py": b"print()",
        "b/a.md": b"# title",
        "b.txt": b"line\r\nline",
        "a.bin": b"\x00\x01",
        "latin.txt": b"caf\xe9",
        "nothing.txt": b"",
        ".hidden": b"hidden",
        ".git/config": b"hidden",
    }.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "broken").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.jsonl")
    read = Corpus(tmp_path)
    for _ in range(2):  # a corpus can be read again, and counts anew
        assert [(document.source, document.text) for document in read] == [
            ("b/a.md", "# title"),
            ("b/z.py", "print()"),
            ("b.txt", "line\r\nline"),
        ]
        assert read.skipped == {"binary": 1, "not UTF-8": 1, "not a regular file": 2, "empty": 1}


def test_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "dbca":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    expected = list(Corpus(tmp_path))
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: reversed(list(walk(*a, **k))))
    assert list(Corpus(tmp_path)) == expected == [Document(name, f"{name}/x.txt") for name in "abcd"]


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no such file or folder"):
        Corpus(tmp_path / "gone")
    with pytest.raises(CorpusError, match=r"holds no text \(no files\)"):
        list(Corpus(tmp_path))
    (tmp_path / "a.bin").write_bytes(b"\0")
    with pytest.raises(CorpusError, match=r"holds no text \(1 binary\)"):
        list(Corpus(tmp_path / "a.bin"))


def test_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(CorpusError, match=r"cannot be read \(Permission denied\)"):
        list(Corpus(tmp_path))


@settings(max_examples=50, deadline=None)
@given(lines=st.lists(st.text(st.characters(codec="utf8", exclude_characters="\0\n"), max_size=12), min_size=1))
def test_long_text_file_is_cut_at_line_ends_and_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    text = "\n".join(["x", *lines])
    path = tmp_path_factory.mktemp("corpus") / "long.txt"
    path.write_bytes(text.encode("utf8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "MAX_DOCUMENT_BYTES", 16)
        # One beyond the public iterator, which drops parts of white space only.
        parts = [document.text for document in Corpus(path)._documents(path)]
    assert "".join(parts) == text.removeprefix("\ufeff")
    assert all(part.endswith("\n") for part in parts[:-1])
    assert all(len(part.encode("utf8")) <= 16 + 1 + 4 * 12 for part in parts)


# -- the held-out split -----------------------------------------------------------------------------------------


def test_held_out_share_and_monotony() -> None:
    documents = [Document(f"document {number}", "") for number in range(4000)]
    held = {percent: {d.text for d in documents if is_held_out(d, percent)} for percent in (0, 1, 5, 50, 100)}
    assert len(held[0]) == 0
    assert len(held[100]) == 4000
    assert 150 < len(held[5]) < 250  # 200 expected, standard deviation 14
    assert held[1] < held[5] < held[50]


def test_held_out_depends_on_the_text_alone() -> None:
    # Frozen: another outcome would move documents between training and held-out text of existing runs.
    sides = [
        is_held_out(Document(text, source), 50) for text in ("a", "b", "c", "d", "e", "é") for source in ("x", "y")
    ]
    assert sides[::2] == sides[1::2] == [True, False, True, False, True, False]
    assert is_held_out(Document("a", "", kinship="b"), 50) is False


@pytest.mark.parametrize("percent", [-1, 101, float("nan")])
def test_held_out_percent_is_checked(percent: float) -> None:
    with pytest.raises(CorpusError, match="must be between 0 and 100"):
        is_held_out(Document("a", ""), percent)


# -- the standard library ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> list[Document]:
    return list(standard_library_documents())


def test_standard_library_is_a_corpus_of_megabytes(library: list[Document]) -> None:
    sources = {document.source: document.text for document in library}
    assert len(sources) == len(library)
    assert sum(len(text) for text in sources.values()) > 5e6
    assert sources["stdlib/textwrap.py"] == Path(sysconfig.get_path("stdlib"), "textwrap.py").read_text(encoding="utf8")
    assert sources["stdlib/textwrap.py#documentation"].startswith("textwrap\n\nText wrapping and filling.\n")
    assert "Augmented assignment" in sources["stdlib/pydoc_data/topics.py#assignment"]
    assert not any(
        part in source for source in sources for part in ("/test/", "/tests/", "site-packages", "encodings/")
    )


def test_standard_library_order_is_stable(library: list[Document]) -> None:
    names = [document.source.split("#")[0].removeprefix("stdlib/") for document in library]
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert list(itertools.islice(standard_library_documents(), 50)) == library[:50]


def test_documentation_stays_on_the_side_of_its_source(library: list[Document]) -> None:
    sides = {document.source: is_held_out(document, 20) for document in library}
    pairs = [(source, f"{source}#documentation") for source in sides if f"{source}#documentation" in sides]
    assert len(pairs) > 300
    assert all(sides[source] == sides[prose] for source, prose in pairs)
    assert len({sides[source] for source, _ in pairs}) == 2


def test_documentation_of_a_module() -> None:
    source = (
        '"""Module."""\n'
        'class A:\n    """Class.\n\n    More.\n    """\n'
        '    async def f(self):\n        """Method."""\n    def g(self): pass\n'
        'def h():\n    """Function."""\n    def inner():\n        """Inner."""\n'
    )
    assert documentation(source, "m.n") == (
        "m.n\n\nModule.\n\nA\n\nClass.\n\nMore.\n\nA.f\n\nMethod.\n\nh\n\nFunction.\n\nh.inner\n\nInner.\n"
    )
    assert documentation("x = 1", "m") == ""
    assert documentation("no python", "m") == ""


def test_missing_standard_library_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(CorpusError, match="holds no Python sources; name a file or folder"):
        list(standard_library_documents())
