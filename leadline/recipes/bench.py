"""Speed of the GPU kernels, behind a gate that proves them right first.

usage: leadline bench ops [--only OP,OP] [out=FILE] [commit=HASH]

First the kernels of all cases are compiled, many at the same time. Then every op goes through its gate (outputs and
gradients against the reference in float64, at awkward lengths, in poisoned memory, twice with the same bits) and is
timed, forward and backward, next to two ceilings of the card that are measured in the same run: the bandwidth of a copy
and the speed of a bfloat16 matrix product. An op whose gate is red gets "red" in the place of its time; the others are
still measured, and the exit code is 1.

The rows of a case are appended, as soon as it is measured, to FILE, by default
benchmarks/results/CARD/ops.jsonl below the current folder, from where tools/readme.py makes the tables of the README,
or with --only runs/ops.jsonl. commit: the revision measured, where git cannot tell it.

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
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from leadline import cli
from leadline.ops.dispatch import implementation, triton_installed
from leadline.ops.rehearsal import rehearsal
from leadline.recipes.bench_ops import CASES
from leadline.recipes.bench_ops.case import Case, Cost
from leadline.recipes.bench_ops.clock import Ceilings, measure_ceilings, time_backward, time_forward
from leadline.recipes.bench_ops.gate import gate, results


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
    """One direction of one case. difference: the largest relative one in the gate, NaN if any is, or if it could not be
    found. seconds: None when the gate is red."""

    case: Case
    direction: str
    cost: Cost
    difference: float
    seconds: float | None


def rehearse(case: Case, device: torch.device) -> None:
    """Launch every kernel of a case, as gate and clocks will, in a `rehearsal`."""
    for tokens in case.gate_tokens:
        results(case.run, (case.gate_inputs or case.inputs)(tokens, device), "kernel", ())
    inputs = case.inputs(case.tokens, device)
    with torch.no_grad(), implementation("kernel"):
        case.run(*inputs)
    if case.backward is not None:
        results(case.run, inputs, "kernel", ())


def directions(case: Case) -> list[tuple[str, Cost, Callable[[Case, torch.device], float]]]:
    """(name, cost, clock) of what is timed."""
    found = [("forward", case.forward, time_forward)]
    return found if case.backward is None else [*found, ("backward", case.backward, time_backward)]


def measure(case: Case, device: torch.device) -> Iterator[Result]:
    """Gate, then forward, then backward."""
    found = gate(case, device)
    green = all(map(case.accepts, found))
    relative = [difference.relative for difference in found]
    worst = math.nan if any(map(math.isnan, relative)) else max(relative)
    for direction, cost, clock in directions(case):
        yield Result(case, direction, cost, worst, clock(case, device) if green else None)
    torch.cuda.empty_cache()


def red(case: Case) -> list[Result]:
    """What stands in the place of results when a case cannot be measured."""
    return [Result(case, direction, cost, math.nan, None) for direction, cost, _ in directions(case)]


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
        "difference": result.difference if math.isfinite(result.difference) else None,
        "row": {
            "op": result.case.op,
            "shape": result.case.shape,
            "direction": result.direction,
            "ms": "red" if result.seconds is None else f"{1000 * result.seconds:.3f}",
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


def rehearse_all(cases: Sequence[Case], device: torch.device, progress: Console) -> None:
    """Compile the kernels of all cases; one that fails here fails again, and gets its row, when it is measured."""
    with rehearsal():
        for case in cases:
            try:
                rehearse(case, device)
            except Exception as error:
                progress.print(f"{case.op}: {case.shape}: not compiled ahead: {error}", style="red", markup=False)
            torch.cuda.empty_cache()


def check_alive(device: torch.device, case: Case) -> None:
    """BenchError when a kernel has left the card in a state in which it refuses all work: nothing behind it is red."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise BenchError(f"{case.op}: the card takes no more work ({reason}): leave it out, see --only") from None


def measure_all(cases: Sequence[Case], device: torch.device, run: Run, path: Path, progress: Console) -> list[Any]:
    """The lines of all cases, each stored in the file as soon as it is known."""
    lines: list[dict[str, Any]] = []
    for case in cases:
        started = time.monotonic()
        try:
            found = list(measure(case, device))
        except Exception as error:  # a kernel that does not compile or run is red; the other cases are still measured
            progress.print(f"{type(error).__name__}: {error}", style="bold red", markup=False)
            found = red(case)
        lines += (new := [record(result, run) for result in found])
        append(path, new)
        check_alive(device, case)
        times = ", ".join(f"{line['row']['direction']} {line['row']['ms']}" for line in new)
        progress.print(f"{case.op}: {case.shape}: {times} ({time.monotonic() - started:.1f} s)", markup=False)
    return lines


def main(arguments: list[str]) -> int:
    """Run `leadline bench`; returns the exit code."""
    options = parse(arguments)
    if not torch.cuda.is_available() or not triton_installed():
        raise BenchError("needs a CUDA device and triton: kernels are not timed anywhere else")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(int.from_bytes(os.urandom(4)))  # the gate sees inputs that it has never seen before
    progress, console = Console(stderr=True), Console(highlight=False, width=None if os.isatty(1) else 160)
    run = this_run(options.commit, device)
    # A run of some ops is for trying out: its rows are not for the README.
    folder = Path("runs") if options.only else Path("benchmarks/results") / slug(run.machine)
    path = options.out or folder / "ops.jsonl"
    cases = [case for case in CASES if not options.only or case.op in options.only]
    started = time.monotonic()
    rehearse_all(cases, device, progress)
    progress.print(f"kernels of {len(cases)} cases compiled in {time.monotonic() - started:.1f} s")
    lines = measure_all(cases, device, run, path, progress)
    console.print(_table(lines))
    reds = sorted({line["row"]["op"] for line in lines if line["seconds"] is None})
    console.print(f"results: {path}" + (f"; red gates, not timed: {', '.join(reds)}" if reds else ""))
    return 1 if reds else 0
