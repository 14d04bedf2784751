"""Ignore: what git's rules leave out of a folder.

A `.gitignore` holds for its folder and everything below it. Of all rules that match a path the deepest file's decide,
and in it the last line; a folder that is left out is never looked into. Patterns are translated by `pathspec`. It means
to judge whole paths, and would let a pattern for a folder speak for the files in it; here every part of a path is
judged on its own, as git does.
"""

from __future__ import annotations

import codecs
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pathspec.patterns.gitignore import GitIgnorePatternError
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

IGNORE_FILE = ".gitignore"


class IgnoreError(ValueError):
    """A pattern that means nothing; the message quotes it."""


@dataclass(frozen=True)
class Pattern:
    """One line. leaves_out: False for a line with `!`, which takes back what others leave out. folders_only: it ended
    with a slash. anchored: it has a slash elsewhere, and stands for a path; without one it stands for a name at any
    depth. whole: it stands for everything below a path."""

    regex: re.Pattern[str]
    leaves_out: bool
    folders_only: bool
    anchored: bool
    whole: bool

    def matches(self, path: str, is_folder: bool) -> bool:
        """Whether it stands for a path, below the folder of its file."""
        if self.folders_only and not is_folder:
            return False
        judged = path if self.anchored else path.rsplit("/", 1)[-1]
        found = self.regex.search(judged)
        return found is not None and (self.whole or not self.anchored or found.end() == len(judged))


@dataclass(frozen=True)
class Rules:
    """The patterns of one folder. above: the rules of the folders around it."""

    folder: Path
    patterns: tuple[Pattern, ...]
    above: Rules | None = None

    def leave_out(self, path: Path, is_folder: bool) -> bool:
        """Whether a path below the folder is ignored, provided that the folders on the way to it are not."""
        rules: Rules | None = self
        while rules is not None:
            below = path.relative_to(rules.folder).as_posix()
            for pattern in reversed(rules.patterns):
                if pattern.matches(below, is_folder):
                    return pattern.leaves_out
            rules = rules.above
        return False


def read_pattern(line: str) -> Pattern | None:
    """The pattern of a line; None for a comment and an empty line. Raises IgnoreError."""
    line = line if line.endswith("\\ ") else line.rstrip(" ")
    body = line.rstrip("/")
    try:
        translated = GitIgnoreSpecPattern(body)
    except GitIgnorePatternError:
        raise IgnoreError(f"{line!r} is no pattern; write it as in a .gitignore") from None
    if translated.include is None or translated.regex is None:
        return None
    return Pattern(
        re.compile(translated.regex.pattern, translated.regex.flags),
        leaves_out=translated.include,
        folders_only=body != line,
        anchored="/" in body,
        whole=body.endswith("/**"),
    )


def read_patterns(lines: Iterable[str]) -> tuple[Pattern, ...]:
    """The patterns of some lines. Raises IgnoreError."""
    return tuple(found for line in lines if (found := read_pattern(line)) is not None)


def rules_in(folder: Path, above: Rules | None) -> Rules | None:
    """The rules that hold in a folder; `above` if it has no ignore file. Lines that mean nothing are passed over,
    as in git."""
    found: list[Pattern] = []
    for line in _lines(folder / IGNORE_FILE):
        try:
            found += read_patterns([line])
        except IgnoreError:
            continue
    return Rules(folder, tuple(found), above) if found else above


def rules_above(folder: Path) -> Rules | None:
    """The rules of the repository that a folder lies in, from its root to the folder's parent; none if they leave out
    this very folder, for then it was named on purpose."""
    root = next((each for each in (folder, *folder.parents) if (each / ".git").exists()), folder)
    rules: Rules | None = None
    way = [each for each in (*reversed(folder.parents), folder) if each.is_relative_to(root)]
    for outer, inner in pairwise(way):
        rules = rules_in(outer, rules)
        if rules is not None and rules.leave_out(inner, is_folder=True):
            return None
    return rules


def _lines(path: Path) -> list[str]:
    """The lines of a file; none where it is missing, cannot be read, or is a link, which git does not follow either."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return []
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError:
        return []
    # As in the names of files, bytes that are not UTF-8 match themselves.
    return [line.removesuffix("\r") for line in os.fsdecode(content).split("\n")]
