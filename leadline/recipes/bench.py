"""Speed of the GPU kernels, behind a gate that proves them right first.

usage: leadline bench ops [--only OP,OP] [out=FILE] [commit=HASH]

Every op goes through its gate (outputs and gradients against the reference in float64, at awkward lengths, in poisoned
memory, twice with the same bits) and is then timed, forward and backward, next to two ceilings of the card that are
measured in the same run: the bandwidth of a copy and the speed of a bfloat16 matrix product. An op whose gate is red
gets no time, and the exit code is 1.

The rows are appended to FILE, by default benchmarks/results/CARD/ops.jsonl below the current folder, from where
tools/readme.py makes the tables of the README, or with --only runs/ops.jsonl. commit: the revision measured, where git
cannot tell it.

  leadline bench ops
  leadline bench ops --only rms_norm,rope out=runs/ops.jsonl
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from leadline import cli
from leadline.ops.dispatch import triton_installed
from leadline.recipes.bench_ops import CASES
from leadline.recipes.bench_ops.case import Case, Cost
from leadline.recipes.bench_ops.clock import Ceilings, measure_ceilings, time_backward, time_forward
from leadline.recipes.bench_ops.gate import gate


class BenchError(ValueError):
    """A benchmark that cannot be run; the message names the reason and the remedy."""


@dataclass(frozen=True)
class Options:
    """only: names of ops, or nothing for all. out: the result file."""

    only: tuple[str, ...] = ()
    out: Path | None = None
    commit: str | None = None


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line; `--only OPS`, `--only=OPS` and `only=OPS` are the same."""
    words, assignments = list(arguments), []
    if not words or words.pop(0) != "ops":
        raise BenchError("expected 'leadline bench ops': ops is the one benchmark there is")
    while words:
        word = words.pop(0)
        if word == "--only":
            if not words:
                raise BenchError("--only: expected names of ops, separated by commas")
            word = f"only={words.pop(0)}"
        assignments.append(word.removeprefix("--"))
    options = cli.override(Options(), assignments)
    for name in options.only:
        cli.find(name, {case.op: case for case in CASES}, "op")
    return options


# -- one run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What all rows of one run share."""

    machine: str
    time: str
    commit: str
    versions: dict[str, str]
    ceilings: Ceilings


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def this_run(commit: str | None, device: torch.device) -> Run:
    """The run that starts now; measures the ceilings."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    return Run(
        torch.cuda.get_device_name(device),
        datetime.now(UTC).isoformat(timespec="seconds"),
        commit or _commit(),
        versions | {"CUDA": str(torch.version.cuda)},
        measure_ceilings(device),
    )


@dataclass(frozen=True)
class Result:
    """One direction of one case. difference: the largest relative one in the gate, NaN if any is. seconds: None when
    the gate is red."""

    case: Case
    direction: str
    cost: Cost
    difference: float
    seconds: float | None


def measure(case: Case, device: torch.device) -> Iterator[Result]:
    """Gate, then forward, then backward."""
    found = gate(case, device)
    green = all(map(case.accepts, found))
    relative = [difference.relative for difference in found]
    worst = math.nan if any(map(math.isnan, relative)) else max(relative)
    for direction, cost, clock in (
        ("forward", case.forward, time_forward),
        ("backward", case.backward, time_backward),
    ):
        if cost is not None:
            yield Result(case, direction, cost, worst, clock(case, device) if green else None)
    torch.cuda.empty_cache()


def speed(result: Result, ceilings: Ceilings) -> tuple[str, str]:
    """(achieved rate, share of the measured ceiling) in words; empty without a time."""
    if result.seconds is None:
        return "", ""
    if result.case.ceiling == "copy":
        rate = result.cost.bytes / result.seconds
        return f"{rate / 1e9:,.0f} GB/s", f"{rate / ceilings.copy:.0%}"
    rate = result.cost.flops / result.seconds
    return f"{rate / 1e12:,.0f} TFLOP/s", f"{rate / ceilings.matmul:.0%}"


def record(result: Result, run: Run) -> dict[str, Any]:
    """One line of the result file, in the schema of tools/readme.py; everything beside `row` is raw."""
    rate, share = speed(result, run.ceilings)
    ceiling = run.ceilings.copy / 1e9 if result.case.ceiling == "copy" else run.ceilings.matmul / 1e12
    unit = "GB/s copy" if result.case.ceiling == "copy" else "TFLOP/s matmul"
    return {
        "benchmark": "ops",
        "title": "GPU kernels at the width of V4-Flash, bfloat16",
        "command": "leadline bench ops",
        "machine": run.machine,
        "time": run.time,
        "commit": run.commit,
        "versions": run.versions,
        "copy_bytes_per_second": run.ceilings.copy,
        "matmul_flops_per_second": run.ceilings.matmul,
        "seconds": result.seconds,
        "bytes": result.cost.bytes,
        "flops": result.cost.flops,
        "difference": result.difference,
        "row": {
            "op": result.case.op,
            "shape": result.case.shape,
            "direction": result.direction,
            "ms": "" if result.seconds is None else f"{1000 * result.seconds:.3f}",
            "reached": rate,
            "ceiling": f"{ceiling:,.0f} {unit}",
            "of ceiling": share,
            "difference": f"{result.difference:.1e}",
        },
    }


def append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Add lines to the result file; what it holds already is never rewritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def slug(card: str) -> str:
    """A folder name for a card: "NVIDIA H100 80GB HBM3" gives "h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower().removeprefix("nvidia ")).strip("-")


def _table(lines: Sequence[dict[str, Any]]) -> Table:
    columns = list(lines[0]["row"])
    table = Table(*columns, box=box.SIMPLE_HEAD, header_style="dim")
    for column in table.columns[3:]:
        column.justify = "right"
    for line in lines:
        red = line["seconds"] is None
        table.add_row(*line["row"].values(), style="bold red" if red else None)
    return table


def main(arguments: list[str]) -> int:
    """Run `leadline bench`; returns the exit code."""
    options = parse(arguments)
    if not torch.cuda.is_available() or not triton_installed():
        raise BenchError("needs a CUDA device and triton: kernels are not timed anywhere else")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(int.from_bytes(os.urandom(4)))  # the gate sees inputs that it has never seen before
    progress, console = Console(stderr=True), Console(highlight=False, width=None if os.isatty(1) else 160)
    run = this_run(options.commit, device)
    # A table of the README shows one run, so a run of some ops must not become the latest.
    folder = Path("runs") if options.only else Path("benchmarks/results") / slug(run.machine)
    path = options.out or folder / "ops.jsonl"
    lines: list[dict[str, Any]] = []
    red: set[str] = set()
    for case in CASES:
        if options.only and case.op not in options.only:
            continue
        progress.print(f"{case.op}: {case.shape}")
        try:
            found = [record(result, run) for result in measure(case, device)]
        except Exception as error:  # a kernel that does not compile or run is red; the other cases are still measured
            progress.print(f"{type(error).__name__}: {error}", style="bold red", markup=False)
            red.add(case.op)
            continue
        append(path, [line for line in found if line["seconds"] is not None])
        lines += found
    console.print(_table(lines))
    red |= {line["row"]["op"] for line in lines if line["seconds"] is None}
    console.print(f"results: {path}" + (f"; red gates, not timed: {', '.join(sorted(red))}" if red else ""))
    return 1 if red else 0
