"""Bundle: many files as one text for a prompt.

    The files below are given, each under its path.

    ```
    README.md
    logo.png (left out: binary)
    src/
      main.py
    ```

    ## README.md

    ```
    ...
    ```

What stands where decides what a prefix cache can keep. The tree holds names and no sizes, sections come in the order of
the names, and a section depends on nothing but its own file: when one file changes, everything before it stays byte for
byte the same. A folder of which nothing is read, for one and the same reason, takes one line in the tree.

A file cannot break out of its section. Its fence is longer than any run of backticks in it, so no line of it closes the
fence; and a name with a line break or another unprintable character is spelled in JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from leadline.data.extract import extract
from leadline.data.gather import Gathered, Identity, gather

FOREWORD = "The files below are given, each under its path."
_FENCE = "`"
_SHORTEST_FENCE = 3

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


class BundleError(ValueError):
    """Files that give no prompt; the message says how much was found and what to do."""


@dataclass(frozen=True)
class Limits:
    """file_bytes: most of one file, beyond which it is left out. total_bytes: most of all text together, beyond which
    there is no bundle: half of the files are not what was asked for."""

    file_bytes: int = 2**20
    total_bytes: int = 2**26


USUAL_LIMITS = Limits()


@dataclass(frozen=True)
class File:
    """What was read. name: with `/` between its parts. text: None if the file is to be named only. note: why, or what
    is odd about the text."""

    name: str
    text: str | None
    note: str | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the text."""
        return len((self.text or "").encode())


@dataclass(frozen=True)
class Section:
    """One file. name: its path in the bundle. text: the section as it stands there, header and fence included. note:
    what is odd about the file, or None."""

    name: str
    text: str
    note: str | None = None


@dataclass(frozen=True)
class Bundle:
    """tree: the opening, with the names of all files. left_out: name and reason of each that is named only."""

    tree: str
    sections: Sequence[Section]
    left_out: Sequence[tuple[str, str]]

    @property
    def pieces(self) -> list[str]:
        """The tree and the sections. V4's tokenizer always cuts between them, so their tokens add up to the whole's."""
        return [self.tree, *(section.text for section in self.sections)]

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)


def bundle(
    paths: Iterable[str | Path],
    *,
    exclude: Sequence[str] = (),
    limits: Limits = USUAL_LIMITS,
    not_these: frozenset[Identity] = frozenset(),
    progress: Progress | None = None,
) -> Bundle:
    """Read folders and files into one text; `gather` says which of them, `extract` what of each.

    Equal files give an equal text, wherever they lie and whenever they were written. Raises GatherError, and
    BundleError when no file holds text or all of them hold too much.
    """
    found = gather(paths, exclude, not_these)
    files: list[File] = []
    total_bytes = 0
    for number, each in enumerate(found, start=1):
        files.append(_read(each, limits))
        total_bytes += files[-1].num_bytes
        if total_bytes > limits.total_bytes:
            raise _too_much(files, limits)
        if progress is not None:
            progress(number, len(found))
    return lay_out(files)


def lay_out(files: Iterable[File]) -> Bundle:
    """A bundle of files in the given order."""
    sections: list[Section] = []
    left_out: list[tuple[str, str]] = []
    reasons: dict[str, str | None] = {}
    for file in files:
        if file.text is None:
            left_out.append((file.name, file.note or "no text"))
        else:
            sections.append(Section(file.name, _section(file.name, file.text, file.note), file.note))
        reasons[file.name] = left_out[-1][1] if file.text is None else None
    if not sections:
        found = ", ".join(sorted({reason for _, reason in left_out})) or "no files"
        raise BundleError(f"nothing to read ({found}): name files of text, or a folder with some")
    tree = "\n".join(_tree(_folded(reasons)))
    return Bundle(f"{FOREWORD}\n\n{_fenced(tree)}\n", sections, left_out)


def spelled(name: str) -> str:
    """A name on one line: itself, or a JSON string where it has characters that do not print."""
    return name if name.isprintable() and not name.startswith('"') else json.dumps(name)


# -- reading ------------------------------------------------------------------------------------------------------


def _read(file: Gathered, limits: Limits) -> File:
    if file.left_out is not None:
        return File(file.name, None, file.left_out)
    found = extract(file.path, limits.file_bytes)
    return File(file.name, found.text, found.note)


def _too_much(files: Sequence[File], limits: Limits) -> BundleError:
    largest = sorted(files, key=lambda file: -file.num_bytes)[:3]
    names = ", ".join(f"{spelled(file.name)} ({file.num_bytes:,})" for file in largest)
    return BundleError(
        f"the files hold more than {limits.total_bytes:,} bytes of text, the largest so far are {names}: name fewer, "
        f"exclude some, or raise total_bytes"
    )


# -- layout -------------------------------------------------------------------------------------------------------


def _section(name: str, text: str, note: str | None) -> str:
    remark = f"({note})\n\n" if note else ""
    return f"## {spelled(name)}\n\n{remark}{_fenced(text)}\n"


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall(f"{_FENCE}+", text)), default=0)
    fence = _FENCE * max(_SHORTEST_FENCE, longest + 1)
    end = "" if text.endswith("\n") or not text else "\n"
    return f"{fence}\n{text}{end}{fence}\n"


def _folded(reasons: Mapping[str, str | None]) -> dict[str, str | None]:
    """Names and why they are left out; instead of the names in a folder of which nothing is read, all for the same
    reason, the folder's own with a slash behind it."""
    common: dict[str, set[str | None]] = {}
    for name, reason in reasons.items():
        for folder in _folders(name):
            common.setdefault(folder, set()).add(reason)
    lines: dict[str, str | None] = {}
    for name, reason in reasons.items():
        closed = (f"{folder}/" for folder in _folders(name) if reason is not None and common[folder] == {reason})
        lines[next(closed, name)] = reason
    return lines


def _folders(name: str) -> Iterator[str]:
    """The folders that a file lies in, the outermost first."""
    parts = name.split("/")[:-1]
    return ("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))


def _tree(lines: Mapping[str, str | None]) -> Iterator[str]:
    """The names as an indented list; a folder stands once, in front of what it holds."""
    open_folders: list[str] = []
    for name, reason in lines.items():
        *folders, last = name.removesuffix("/").split("/")
        shared = 0
        while shared < min(len(folders), len(open_folders)) and folders[shared] == open_folders[shared]:
            shared += 1
        for depth in range(shared, len(folders)):
            yield f"{'  ' * depth}{spelled(folders[depth])}/"
        open_folders = folders
        slash, remark = "/" * name.endswith("/"), f" (left out: {reason})" if reason else ""
        yield f"{'  ' * len(folders)}{spelled(last)}{slash}{remark}"
