"""Ignore rules: what git itself says about the same patterns."""

from __future__ import annotations

from pathlib import Path

import pytest

from leadline.data.ignore import IgnoreError, Rules, read_pattern, read_patterns

# (lines, path, whether git leaves it out); a path that ends with a slash is a folder. From `git check-ignore`.
CASES = [
    ("a", "a", True),
    ("a", "x/a", True),
    ("a", "ab", False),
    ("/a", "x/a", False),
    ("a/", "a", False),
    ("a/", "a/", True),
    ("a/", "x/a/", True),
    ("a/b", "a/b", True),
    ("a/b", "x/a/b", False),
    ("**/a/b", "x/a/b", True),
    ("a/**", "a/", False),
    ("a/**", "a/x", True),
    ("a/**/b", "a/b", True),
    ("a/**/b", "a/x/y/b", True),
    ("a/*", "a/x/", True),
    ("*.o", ".o", True),
    ("*.[oa]", "x/y.a", True),
    ("[!a]", "a", False),
    ("a?", "a/", False),
    ("\\#a", "#a", True),
    ("\\!a", "!a", True),
    ("#a", "#a", False),
    ("a ", "a", True),
    ("a\\ ", "a ", True),
    ("*|!b", "b", False),
    ("*|!*/", "x/", False),
    ("*|!*/", "x/y", True),
    ("*.py|!b/", "b/c.py", True),
    ("*.py|!a/b", "a/b/c.py", True),
    ("!a|a", "a", True),
    ("*|!/a/b", "a/b", False),
    ("é", "é", True),
]


@pytest.mark.parametrize(("lines", "path", "expected"), CASES)
def test_patterns_mean_what_they_mean_to_git(lines: str, path: str, expected: bool) -> None:
    rules = Rules(Path("/r"), read_patterns(lines.split("|")))
    assert rules.leave_out(Path("/r") / path, is_folder=path.endswith("/")) == expected


def test_the_deeper_rules_decide_and_the_others_hold_where_they_are_silent() -> None:
    outer = Rules(Path("/r"), read_patterns(["*.log", "/a/x"]))
    inner = Rules(Path("/r/a"), read_patterns(["!kept.log", "/b"]), above=outer)
    left_out = [name for name in ("kept.log", "y.log", "x", "b", "c") if inner.leave_out(Path("/r/a") / name, False)]
    assert left_out == ["y.log", "x", "b"]


def test_lines_without_meaning() -> None:
    for line in ("", "  ", "# a", "/"):
        assert read_pattern(line) is None
    for line in ("!", "\\"):
        with pytest.raises(IgnoreError, match="is no pattern; write it as in a"):
            read_pattern(line)
