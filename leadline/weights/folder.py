"""A folder that appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from glob import escape as glob_escape
from pathlib import Path

TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json")
# What a folder of model weights may hold.
CHECKPOINT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
)


@contextmanager
def new_folder(target: str | Path, *, replaceable: Sequence[str] = CHECKPOINT_FILES) -> Iterator[Path]:
    """Give a temporary folder to fill; on leaving the block it becomes `target`, or vanishes if the block raised.

    Every file is on disk (fsync) before the name appears. An existing target is replaced if all its entries are plain
    files that match one of the patterns `replaceable`; otherwise FileExistsError names the first that does not, before
    anything is written: what is not known to be a checkpoint is never deleted. Missing parents are created.

    A process that is killed outright leaves its `.NAME.new-*` behind, which nobody reads and anybody may delete.
    Two renames swap old and new. Should the machine stop between them, the target is missing and both folders lie
    complete beside it, as `.NAME.new-*` and `.NAME.old-*`.
    """
    target = Path(os.path.realpath(target))
    _check_replaceable(target, replaceable)
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    temporary = target.parent / f".{target.name}.new-{mark}"
    old = target.parent / f".{target.name}.old-{mark}"
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.iterdir()):
            _sync(file)
        _sync(temporary)
        _check_replaceable(target, replaceable)
        _swap(temporary, target, old)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def resumable_folder(target: str | Path, work: str, *, replaceable: Sequence[str] = CHECKPOINT_FILES) -> Iterator[Path]:
    """Like `new_folder`, for work of many minutes: what an interrupted run has finished is there for the next one.

    work: names what is being made, in a few letters or digits; a run goes on with the folder of an earlier run of the
    same target and work, `.NAME.partial-WORK`, and removes those of the target's other works. The folder given may
    therefore hold files already: the caller must let each file have its name only when it is complete.

    A ValueError (input that cannot be used) removes the folder; whatever else ends the block or the process leaves it.
    BlockingIOError if another process is making the same target.
    """
    target = Path(os.path.realpath(target))
    _check_replaceable(target, replaceable)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial-{work}"
    for other in target.parent.glob(f".{glob_escape(target.name)}.partial-*"):
        if other != partial:
            other_lock = _lock(other, target)
            shutil.rmtree(other, ignore_errors=True)
            os.close(other_lock)
    partial.mkdir(exist_ok=True)
    lock = _lock(partial, target)
    try:
        yield partial
        for file in sorted(partial.iterdir()):
            _sync(file)
        _sync(partial)
        _check_replaceable(target, replaceable)
        old = target.parent / f".{target.name}.old-{secrets.token_hex(4)}"
        _swap(partial, target, old)
    except ValueError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _lock(folder: Path, target: Path) -> int:
    """A descriptor of the folder: until it is closed, or the process ends in whatever way, nobody else gets one."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise BlockingIOError(error.errno, f"{target} is being written by another process: wait for it") from None
    return descriptor


def _swap(temporary: Path, target: Path, old: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise


def _check_replaceable(target: Path, patterns: Sequence[str]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file: choose another folder")
    for entry in sorted(target.iterdir()):
        if not entry.is_file() or not any(fnmatchcase(entry.name, pattern) for pattern in patterns):
            raise FileExistsError(
                f"{target} holds {entry.name}, which is no part of a checkpoint, and would be replaced with it: "
                f"choose another folder"
            )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
