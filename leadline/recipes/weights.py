"""Folders of weights: what is in them, other formats and names, are two the same.

usage: leadline weights inspect FOLDER [--json]
       leadline weights convert SOURCE TARGET [format=F] [naming=N] [scales=S] [shard_bytes=N]
       leadline weights verify FOLDER REFERENCE [tolerance=T] [worst=N] [--json]
       leadline weights make TARGET [preset=flash] [layers=3] [experts=8] [format=fp4] [values=random] ...

inspect reads the headers only and shows which released model a folder is, a tree of its tensors with parameters, bytes
and dtypes, and what is wrong with it. Layers of one kind are one line: how they attend (window, CSA, HCA) and how their
tokens find experts (hash, score). FP8/E8M0 are codes with the dtype of their scales.

convert writes a new folder. It goes through the weights once, holds pieces of one matrix, and can be interrupted at any
time: the same command again keeps what was complete. The new folder has its name only when it is whole. Formats:

  fp4   experts in FP4, other large matrices in FP8, E8M0 scales: as Flash and Pro were released
  fp8   experts and other large matrices in FP8, F32 scales: as the Base models were released
  bf16  nothing quantised

without one, every tensor keeps its format. fp4 to fp8 to bf16 changes no value, the other way rounds to nearest.
naming: official, transformers or transformers_saved (what its save_pretrained writes); without one, names stay.
Official names are those that vLLM and SGLang read, and transformers too; transformers' own names in fp8 or fp4 are for
its GPU modules only. scales: float32 or e8m0, for engines that want others than the format was released with.

verify compares the values of two folders, over formats and names, and shows the tensors that are furthest apart.
tolerance: the largest |a - b| / |b| of a tensor that passes, in the Euclidean norm; without one, 0.

make writes a folder with all names, dtypes and shapes of a released model and made-up values, for trying things out:
preset (flash, pro, tiny or nano), layers, experts, format, naming and scales as above, values (random, or zero: sparse
files that take no room on disk), draft_stages=true for the DSpark refresh, seed.

The exit status is 0, or 1 where inspect has found something wrong or verify a difference, or 2 where a folder cannot be
used.

  leadline weights inspect DeepSeek-V4-Flash
  leadline weights convert DeepSeek-V4-Flash Flash-bf16 format=bf16 naming=transformers
  leadline weights verify Flash-bf16 DeepSeek-V4-Flash
  leadline weights make small-flash layers=3 experts=4
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from leadline import cli
from leadline.model.config import PRESETS, ConfigError
from leadline.recipes.plan import count, size
from leadline.weights.compare import Difference, compare
from leadline.weights.contents import Contents
from leadline.weights.convert import Conversion, convert, prepare
from leadline.weights.files import MAX_SHARD_BYTES
from leadline.weights.header import CheckpointError
from leadline.weights.summary import Node, Summary, summarise
from leadline.weights.synthetic import few_layers, make_checkpoint

FOUND, UNUSABLE = 1, 2
SCALE_DTYPES = {"float32": torch.float32, "e8m0": torch.float8_e8m0fnu}

Format = Literal["bf16", "fp8", "fp4"]
Naming = Literal["official", "transformers", "transformers_saved"]
Scales = Literal["float32", "e8m0"]
Options = TypeVar("Options")


class WeightsError(ValueError):
    """A command that cannot be understood; the message names the word and the remedy."""


@dataclass(frozen=True)
class ConvertOptions:
    """What `convert` takes; None keeps what the source has."""

    format: Format | None = None
    naming: Naming | None = None
    scales: Scales | None = None
    shard_bytes: int = MAX_SHARD_BYTES

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise WeightsError(f"shard_bytes={self.shard_bytes}: expected a positive number of bytes")


@dataclass(frozen=True)
class VerifyOptions:
    """What `verify` takes. worst: rows of the table."""

    tolerance: float = 0.0
    worst: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < math.inf or self.worst < 0:
            raise WeightsError(
                f"tolerance={self.tolerance}, worst={self.worst}: expected numbers that are not negative"
            )


@dataclass(frozen=True)
class MakeOptions:
    """What `make` takes; experts=0 keeps all of the preset."""

    preset: Literal["flash", "pro", "tiny", "nano"] = "flash"
    layers: int = 3
    experts: int = 8
    format: Format = "fp4"
    naming: Naming = "official"
    scales: Scales | None = None
    values: Literal["random", "zero"] = "random"
    draft_stages: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        whole = PRESETS[self.preset]
        if not 1 <= self.layers <= whole.num_hidden_layers or not 0 <= self.experts <= whole.n_routed_experts:
            raise WeightsError(
                f"layers={self.layers}, experts={self.experts}: {self.preset} has {whole.num_hidden_layers} layers and "
                f"{whole.n_routed_experts} experts"
            )


# -- the four verbs --------------------------------------------------------------------------------------------------


def run_inspect(words: Sequence[str]) -> int:
    """Show a folder."""
    (folder,), _, as_json = parse(words, ("FOLDER",), None)
    summary = summarise(folder)
    if as_json:
        print(json.dumps(dataclasses.asdict(summary), default=str, indent=2))
    else:
        render_summary(summary, Console(highlight=False))
    return FOUND if summary.problems else 0


def run_convert(words: Sequence[str]) -> int:
    """Turn a folder into another."""
    (source, target), options, _ = parse(words, ("SOURCE", "TARGET"), ConvertOptions())
    job = prepare(source, Conversion(options.format, options.naming, _dtype(options.scales), options.shard_bytes))
    try:
        with _progress() as progress:
            task = progress.add_task(target.name, total=job.total_bytes)
            convert(job, target, lambda written: progress.advance(task, written))
    except KeyboardInterrupt:
        print("leadline weights: interrupted; the same command goes on from here", file=sys.stderr)
        raise
    print(f"{target}: {size(job.total_bytes)} in {len(job.outputs)} weights, {job.naming} names")
    return 0


def run_verify(words: Sequence[str]) -> int:
    """Compare two folders."""
    folders, options, as_json = parse(words, ("FOLDER", "REFERENCE"), VerifyOptions())
    first, second = map(Contents, folders)
    with _progress() as progress:
        task = progress.add_task("values", total=sum(map(math.prod, first.shapes.values())))
        rows = list(compare(first, second, lambda seen: progress.advance(task, seen)))
    failed = [row for row in rows if not row.within(options.tolerance)]
    if as_json:
        print(json.dumps({"passed": not failed, "rows": [_plain(row) for row in rows]}, indent=2))
    else:
        render_differences(rows, failed, options, Console(highlight=False))
    return FOUND if failed else 0


def run_make(words: Sequence[str]) -> int:
    """Write a folder of made-up values."""
    (target,), options, _ = parse(words, ("TARGET",), MakeOptions())
    if target.exists():
        raise FileExistsError(f"{target} exists already: remove it, or choose another name")
    config = few_layers(
        PRESETS[options.preset], options.layers, options.experts or None, draft_stages=options.draft_stages
    )
    make_checkpoint(
        target,
        config,
        options.format,
        naming=options.naming,
        values=options.values,
        scales=_dtype(options.scales),
        seed=options.seed,
    )
    render_summary(summarise(target), Console(highlight=False))
    return 0


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "inspect": run_inspect,
    "convert": run_convert,
    "verify": run_verify,
    "make": run_make,
}


# -- the command line ------------------------------------------------------------------------------------------------


def parse(words: Sequence[str], folders: Sequence[str], options: Options) -> tuple[list[Path], Options, bool]:
    """The folders, the options and whether JSON is wanted."""
    assignments = [word for word in words if "=" in word]
    paths = [word for word in words if "=" not in word and word != "--json"]
    for word in paths:
        if word.startswith("-"):
            raise WeightsError(f"unknown option '{word}': the only one is --json, everything else is key=value")
    if len(paths) != len(folders):
        raise WeightsError(f"expected {' and '.join(folders)}, got {' '.join(paths) or 'nothing'}")
    if assignments and options is None:
        raise WeightsError(f"'{assignments[0]}' is not understood: expected {' and '.join(folders)} only")
    return [Path(path) for path in paths], cli.override(options, assignments), "--json" in words


def main(arguments: list[str]) -> int:
    """Run `leadline weights`; returns the exit code."""
    try:
        verb, *words = arguments or [""]
        return cli.find(verb, VERBS, "verb of `leadline weights`")(words)
    except (WeightsError, cli.UsageError, ConfigError, CheckpointError, OSError) as error:
        print(f"leadline weights: {error}", file=sys.stderr)
        return UNUSABLE


def _dtype(scales: str | None) -> torch.dtype | None:
    return None if scales is None else SCALE_DTYPES[scales]


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


# -- what is printed -------------------------------------------------------------------------------------------------


def render_summary(summary: Summary, console: Console) -> None:
    """Print the tree, its sum and the problems."""
    console.print(summary.variant, style="bold", markup=False, soft_wrap=True)
    console.print(f"{summary.folder}, {summary.naming} names", markup=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("tensors", "parameters", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("dtypes")
    for node in summary.total.children:
        _add_row(table, node, node.label)
        for number, part in enumerate(node.children, start=1):
            _add_row(table, part, ("  └ " if number == len(node.children) else "  ├ ") + part.label)
    _add_row(table, dataclasses.replace(summary.total, dtypes=()), "total")
    console.print(table)
    for problem in summary.problems:
        console.print(f"problem: {problem}", style="red", markup=False, soft_wrap=True)
    if not summary.problems:
        console.print("All tensors of config.json are there, in its formats.", style="green")


def _add_row(table: Table, node: Node, label: str) -> None:
    dtypes = "" if node.children else ", ".join(node.dtypes)
    table.add_row(label, f"{node.tensors:,}", count(node.parameters), size(node.num_bytes), dtypes)


def render_differences(
    rows: Sequence[Difference], failed: Sequence[Difference], options: VerifyOptions, console: Console
) -> None:
    """Print the tensors that are furthest apart, and the verdict."""
    apart = [row for row in rows if not row.equal]
    apart.sort(key=lambda row: -math.inf if math.isnan(row.relative) else -row.relative)
    if apart:
        table = Table(box=box.SIMPLE_HEAD, header_style="dim")
        table.add_column("")
        for name in ("largest difference", "relative"):
            table.add_column(name, justify="right")
        table.add_column("")
        for row in apart[: options.worst]:
            verdict = "[green]ok[/]" if row.within(options.tolerance) else "[bold red]differs[/]"
            table.add_row(row.name, f"{row.largest:.2e}", f"{row.relative:.2e}", row.note or verdict)
        console.print(table)
    console.print(f"{len(rows) - len(apart)} of {len(rows)} tensors are equal, value for value.")
    if failed:
        console.print(f"{len(failed)} differ by more than {options.tolerance:g}.", style="bold red")


def _plain(row: Difference) -> dict[str, Any]:
    """A row for JSON, which has no NaN and no infinity."""
    values = dataclasses.asdict(row)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
