"""Command line: recipe look-up, `key=value` overrides and `--show`, for frozen dataclasses.

A run is described by a frozen dataclass that a recipe returns. On the command line a run is `VERB [RECIPE] [key=value
...] [--show]`: each `key=value` replaces one field, converted to the field's annotated type, and a dotted key reaches
into a dataclass held by a field (`model.hidden_size=64`). There are no other options to learn, so the command line does
not grow with the project. A name that does not exist stops the run with the nearest one that does.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")
Value = TypeVar("Value")

INTERRUPTED_STATUS = 130  # 128 + SIGINT, as a shell reports it

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_BINARY_SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class UsageError(ValueError):
    """A command line that cannot be understood; the message names the word, the reason and the remedy."""


def find(name: str, table: Mapping[str, Value], what: str) -> Value:
    """`table[name]`, or a `UsageError` with the nearest name; `what` is the noun used in it ("recipe", "preset")."""
    if name in table:
        return table[name]
    raise UsageError(f"unknown {what} '{name}'{_nearest(name, table)}")


def resolve(config: Config, arguments: Sequence[str]) -> tuple[Config, bool]:
    """Apply a verb's `key=value` arguments to its default configuration.

    Returns the new configuration and whether `--show` was among the arguments. The dataclass runs its own checks again.
    """
    assignments = [argument for argument in arguments if argument != "--show"]
    return override(config, assignments), len(assignments) < len(arguments)


def override(config: Config, assignments: Iterable[str]) -> Config:
    """A copy of a frozen dataclass with `key=value` assignments applied from left to right."""
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UsageError(f"'{assignment}' is not understood: expected key=value or --show")
        config = _replaced(config, key.split("."), text, key)
    return config


def show(config: Any, prefix: str = "") -> str:
    """The resolved configuration, one `key = value` per line, with the keys that `override` takes."""
    lines: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            lines.append(show(value, f"{prefix}{field.name}."))
        else:
            lines.append(f"{prefix}{field.name} = {value if isinstance(value, Path) else repr(value)}")
    return "\n".join(lines)


def integer(text: str) -> int:
    """A whole number; K, M and G are binary multiples, as in context lengths: 128K is 131,072 and 1M is 1,048,576."""
    digits, unit = (
        (text[:-1], _BINARY_SUFFIXES[text[-1].upper()]) if text[-1:].upper() in _BINARY_SUFFIXES else (text, 1)
    )
    return int(digits) * unit


def _replaced(config: Any, path: Sequence[str], text: str, key: str) -> Any:
    name, *rest = path
    if name not in (names := [field.name for field in dataclasses.fields(config)]):
        raise UsageError(f"unknown key '{key}'{_nearest(name, names)}")
    value = getattr(config, name)
    if rest and not dataclasses.is_dataclass(value):
        raise UsageError(f"unknown key '{key}': '{name}' holds a {type(value).__name__}, which has no fields")
    if rest:
        return dataclasses.replace(config, **{name: _replaced(value, rest, text, key)})
    kind = typing.get_type_hints(type(config))[name]
    try:
        return dataclasses.replace(config, **{name: _converted(text, kind)})
    except _WrongValue:
        raise UsageError(f"{key}={text}: expected {_described(kind)}") from None


class _WrongValue(Exception):
    """The text does not denote a value of the annotated type."""


def _converted(text: str, kind: Any) -> Any:
    """The value that `text` denotes under a field annotation."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _converted_to_first(text, arguments)
    if origin is typing.Literal:
        return {str(choice): choice for choice in arguments}[_one_of(text, map(str, arguments))]
    if origin is tuple and arguments[1:] == (...,):
        return tuple(_converted(part.strip(), arguments[0]) for part in text.split(",") if part.strip())
    if kind is type(None):
        return {"none": None}[_one_of(text.lower(), ("none",))]
    if kind is bool:
        return _one_of(text.lower(), _TRUE + _FALSE) in _TRUE
    for plain, convert in ((int, integer), (float, float), (str, str), (Path, Path)):
        if kind is plain:
            try:
                return convert(text)
            except ValueError:
                raise _WrongValue from None
    raise _WrongValue


def _converted_to_first(text: str, kinds: Sequence[Any]) -> Any:
    """The value under the first alternative that fits; `none` is tried before text."""
    for kind in sorted(kinds, key=lambda kind: kind is not type(None)):
        try:
            return _converted(text, kind)
        except _WrongValue:
            continue
    raise _WrongValue


def _one_of(text: str, choices: Iterable[str]) -> str:
    if text not in choices:
        raise _WrongValue
    return text


def _described(kind: Any) -> str:
    """An annotation in words, for an error message."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_described(argument) for argument in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"values separated by commas, each {_described(arguments[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return "none" if kind is type(None) else words.get(kind, "a value that only a recipe can set")


def _nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error message: the closest valid name, and all of them when they are few."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f": did you mean '{close[0]}'?"
    return f": expected one of {', '.join(names)}"
