"""Gather: which files below some folders belong into a prompt, in an order that does not change.

What git ignores stays out (`ignore.py`), and so does what a repository keeps about itself. A file or folder that is
named outright is never left out.

The order is that of the paths, character by character. So a file that changes keeps its place, and with it everything
in front of it stays what it was: a prefix cache then answers from there.

Symbolic links are listed and not followed. Their targets either lie in the folder too, and are gathered there, or
outside, where nobody asked to look; and a link can lead in a circle. Links that are named outright are followed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from leadline.data.ignore import IgnoreError, Rules, read_patterns, rules_above, rules_in

REPOSITORY_FOLDERS = frozenset({".git", ".hg", ".svn", ".jj"})

Identity = tuple[int, int]
"""Device and inode of a file."""


class GatherError(ValueError):
    """A path that cannot be gathered; the message names it and the reason."""


@dataclass(frozen=True)
class Gathered:
    """One file, or one thing that is listed only.

    name: below the common folder of all paths, with `/` between its parts. left_out: why it is not read, or None.
    """

    name: str
    path: Path
    left_out: str | None = None


def gather(
    paths: Iterable[str | Path], exclude: Sequence[str] = (), not_these: frozenset[Identity] = frozenset()
) -> list[Gathered]:
    """The files of folders and lists of files, sorted by name; each of them once.

    exclude: patterns in the language of `.gitignore`, from the top of each folder, that no other rule takes back.
    not_these: files left out without a word, such as the one that is being written. A folder that cannot be read is
    listed with the reason. Raises GatherError for a path that does not exist and a pattern that means nothing.
    """
    tops = [Path(os.path.abspath(path)) for path in paths]
    missing = next((top for top in tops if not top.exists()), None)
    if missing is not None:
        raise GatherError(f"{missing}: no such file or folder")
    try:
        excluded = read_patterns(exclude)
    except IgnoreError as error:
        raise GatherError(f"exclude: {error}") from None
    common = Path(os.path.commonpath([top if top.is_dir() else top.parent for top in tops])) if tops else Path()
    found: dict[str, Gathered] = {}
    for top in tops:
        files = _walk(top, Rules(top, excluded)) if top.is_dir() else [(top, _oddity(top.stat()))]
        for path, left_out in files:
            name = path.relative_to(common).as_posix()
            if name not in found or found[name].left_out:
                found[name] = Gathered(name, path, left_out)
    kept = (each for each in found.values() if identity(each.path) not in not_these)
    return sorted(kept, key=lambda each: each.name.split("/"))


def identity(path: str | Path) -> Identity | None:
    """What tells a file from any other, whatever its name; None if there is none."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _walk(top: Path, excluded: Rules) -> Iterator[tuple[Path, str | None]]:
    """Files below a folder, and why they are left out, in any order."""
    pending = [(top, rules_above(top))]
    while pending:
        folder, rules = pending.pop()
        rules = rules_in(folder, rules)
        try:
            with os.scandir(folder) as listing:
                entries = list(listing)
        except OSError as error:
            yield folder, f"cannot be read: {error.strerror}"
            continue
        for entry in entries:
            path, is_folder = Path(entry.path), entry.is_dir(follow_symlinks=False)
            if path.name in REPOSITORY_FOLDERS or excluded.leave_out(path, is_folder):
                continue
            if rules is not None and rules.leave_out(path, is_folder):
                continue
            if is_folder:
                pending.append((path, rules))
            else:
                yield path, _oddity_of(entry)


def _oddity_of(entry: os.DirEntry[str]) -> str | None:
    try:
        return _oddity(entry.stat(follow_symlinks=False))
    except OSError as error:  # it has gone since the folder was listed
        return f"cannot be read: {error.strerror}"


def _oddity(found: os.stat_result) -> str | None:
    """Why something that is no folder has no contents to read."""
    if stat.S_ISLNK(found.st_mode):
        return "link, not followed"
    return None if stat.S_ISREG(found.st_mode) else "not a regular file"
