"""Turn a folder, documents or a list of files into one long prompt, and say what it costs to keep.

usage: leadline pack FOLDER|FILE ... [out=FILE] [checkpoint=FOLDER] [tokenizer=FOLDER|FILE] [key=value ...] [--show]

A tree of all names comes first, then every text file under its path, behind a fence that nothing in the file can close.
What git ignores stays out. Binary files, links and files that are too large are named and left out; PDFs are read if
pypdf is there (pip install "leadline[pack]"). The order is that of the paths, so that after a change the prompt stays
the same up to the first file that changed, and a prefix cache answers from there.

The prompt goes to standard output or to out=FILE. Standard error gets its size, the files with the most of it, and the
bytes of a KV cache for a prompt of that length beside those of DeepSeek-V3.2: for V4-Flash, V4-Pro, and the model of
checkpoint=FOLDER, which is also where the tokenizer comes from. Without a tokenizer, four bytes count as a token.

  exclude=PATTERN,...    left out too, in the language of a .gitignore: exclude=*.lock,tests/data/
  file_bytes=N           most of one file, 1M if not given     total_bytes=N     most of all text, 64M if not given

  leadline pack . checkpoint=runs/demo/checkpoint out=prompt.txt
  leadline pack src docs/report.pdf exclude=*.csv | leadline generate runs/demo/checkpoint -
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.bar import Bar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from leadline.cli import UsageError, resolve, show
from leadline.data.bundle import Bundle, Limits, bundle, spelled
from leadline.data.gather import Identity, identity
from leadline.model import accounting, v32
from leadline.model.config import PRESETS, ModelConfig
from leadline.recipes.plan import V32_NAME, size
from leadline.text.tokenizer import Tokenizer
from leadline.train.atomic import write_text

# Of source code and English under V4's tokenizer, roughly; said to be an estimate wherever it is shown.
BYTES_PER_TOKEN = 4
NUM_SHOWN = 8
BAR_WIDTH = 16
ENCODED_AT_ONCE = 64
RELEASED = {"DeepSeek-V4-Flash": PRESETS["flash"], "DeepSeek-V4-Pro": PRESETS["pro"]}


@dataclass(frozen=True)
class Options:
    """What the command line may set."""

    out: Path | None = None
    checkpoint: Path | None = None
    tokenizer: Path | None = None
    exclude: tuple[str, ...] = ()
    file_bytes: int = 2**20
    total_bytes: int = 2**26


def main(arguments: list[str]) -> int:
    paths, assignments = split_paths(arguments, Options)
    options, wants_show = resolve(Options(), assignments)
    if wants_show:
        print(show(options))
        return 0
    if not paths:
        raise UsageError("expected a folder or files to pack, found none")
    console = Console(stderr=True, highlight=False)
    source = options.tokenizer or options.checkpoint
    tokenizer = Tokenizer.load(source) if source else None
    config = ModelConfig.from_file(options.checkpoint) if options.checkpoint else None
    packed = read(paths, options, console)
    tokens = count(packed, tokenizer, console) if tokenizer else estimate(packed)
    if options.out is None:
        sys.stdout.flush()
        sys.stdout.buffer.write(packed.text.encode())
    else:
        write_text(options.out, packed.text)
    render(packed, tokens, is_estimate=tokenizer is None, config=config, console=console)
    if options.out is not None:
        console.print(f"written: {options.out}", soft_wrap=True)
    return 0


def split_paths(arguments: Sequence[str], options: type) -> tuple[list[str], list[str]]:
    """Arguments that name what exists, or have no `=` in them, and the others. A file may be called `a=b`."""
    fields = options.__dataclass_fields__
    paths: list[str] = []
    for word in arguments:
        key, equals, _ = word.partition("=")
        is_path = not equals or (key.split(".")[0] not in fields and os.path.exists(word))
        if is_path and not word.startswith("--"):
            paths.append(word)
    return paths, [word for word in arguments if word not in paths]


def read(paths: Sequence[str], options: Options, console: Console) -> Bundle:
    """The bundle, without the file that it is written to."""
    limits = Limits(options.file_bytes, options.total_bytes)
    with _progress("reading", console) as progress:
        return bundle(paths, exclude=options.exclude, limits=limits, not_these=_targets(options.out), progress=progress)


def _targets(out: Path | None) -> frozenset[Identity]:
    """The files that the prompt is written to: out=FILE, or standard output where the shell has redirected it."""
    target = identity(out) if out else None
    standard = os.fstat(sys.stdout.fileno()) if out is None and _has_descriptor() else None
    found = {target, (standard.st_dev, standard.st_ino) if standard else None}
    return frozenset(each for each in found if each is not None)


def _has_descriptor() -> bool:
    try:
        sys.stdout.fileno()
    except OSError:
        return False
    return True


def count(packed: Bundle, tokenizer: Tokenizer, console: Console) -> list[int]:
    """Tokens of each piece of a bundle."""
    pieces = packed.pieces
    tokens: list[int] = []
    with _progress("counting tokens", console) as progress:
        for start in range(0, len(pieces), ENCODED_AT_ONCE):
            tokens += map(len, tokenizer.encode_batch(pieces[start : start + ENCODED_AT_ONCE]))
            progress(len(tokens), len(pieces))
    return tokens


def estimate(packed: Bundle) -> list[int]:
    """About how many tokens each piece has."""
    return [-(-len(piece.encode()) // BYTES_PER_TOKEN) for piece in packed.pieces]


@contextmanager
def _progress(what: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.completed:,} of {task.total:,}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=1)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# -- the printed page ----------------------------------------------------------------------------------------------


def render(
    packed: Bundle, tokens: Sequence[int], *, is_estimate: bool, config: ModelConfig | None, console: Console
) -> None:
    """Print what was packed and what it costs. tokens: of each piece."""
    total = sum(tokens)
    about = "about " if is_estimate else ""
    console.print(f"{files_of(packed)}, {size(len(packed.text.encode()))}, {about}{total:,} tokens", style="bold")
    if is_estimate:
        console.print(f"Counted as {BYTES_PER_TOKEN} bytes each; checkpoint= or tokenizer= counts them.", style="dim")
    if packed.left_out:
        console.print(f"Left out: {_reasons(packed)}.", style="dim")
    console.print(_shares(packed, tokens))
    console.print(_cost(total, RELEASED | ({"this checkpoint": config} if config else {})))


def files_of(packed: Bundle) -> str:
    """How many files a bundle holds, in words."""
    return "1 file" if len(packed.sections) == 1 else f"{len(packed.sections):,} files"


def _reasons(packed: Bundle) -> str:
    """How many files were left out for which reason; the name where it is one alone."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in packed.left_out:
        by_reason.setdefault(reason, []).append(name)
    counted = sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0]))
    return "; ".join(
        f"{len(names):,} {reason}" if len(names) > 1 else f"{spelled(names[0])} ({reason})" for reason, names in counted
    )


def _shares(packed: Bundle, tokens: Sequence[int]) -> Table:
    """The tokens of the topmost folders, and of the largest files."""
    total = sum(tokens)
    files = {section.name: number for number, section in zip(tokens[1:], packed.sections, strict=True)}
    folders: Counter[str] = Counter()
    for name, number in files.items():
        folders[name.split("/")[0] + "/" * ("/" in name)] += number
    by_folder = folders.most_common(NUM_SHOWN)
    by_file = [] if folders.keys() == files.keys() else Counter(files).most_common(NUM_SHOWN)
    table = _table("where the tokens are", "tokens", "share", "")
    for rows in (by_folder, by_file):
        for name, number in rows:
            bar = Bar(size=rows[0][1], begin=0, end=number, width=BAR_WIDTH, color="cyan")
            table.add_row(Text(spelled(name)), f"{number:,}", f"{number / total:.1%}", bar)
        table.add_section()
    return table


def _cost(tokens: int, models: dict[str, ModelConfig]) -> Table:
    """The KV cache at the prompt's length, in the formats it is served in."""
    theirs = v32.kv_cache_bytes(tokens)
    table = _table("KV cache of the prompt", "bytes", "of V3.2's", "longest context")
    for name, config in models.items():
        ours, longest = accounting.kv_cache_bytes(config, tokens), config.max_position_embeddings
        style = "yellow" if tokens > longest else ""
        table.add_row(name, size(ours), f"{ours / theirs:.1%}", Text(f"{longest:,}", style))
    table.add_row(V32_NAME, size(theirs), "", "", style="dim")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table
