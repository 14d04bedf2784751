"""The engine against transformers' generate on CPU cores: decoding, and the time to the first token.

usage: python benchmarks/engine_cpu.py [--quick] [--only WORDS] [--machine SLUG] [--threads N] [--out FILE]

Both sides get the small model of `peers_cpu.py` with the same random weights in FP32, in one process, one after the
other. First the gate: the greedy continuation of one prompt must be the same on both sides; when it is not, nothing is
timed. Then:

- *decode, batch N*: N prompts of 1,024 tokens are read, then three times 64 tokens of each are drawn greedily, without
  a pause; tokens per second of the best of the three. In transformers they are tokens of one call of `generate`, whose
  times a stopping criterion notes;
- *decode, batch N, compiled*: the same with `compile_steps`, which must draw the same first tokens as plain steps. How
  long compiling takes stands beside it;
- *first token*: seconds from a prompt of 8,192 tokens to the first token of its answer, the best of three runs; of one
  in transformers, which takes about a minute for it.

*Weights once* is what decoding could reach if a step did nothing but read each weight that it needs one time, as fast
as these cores read a buffer of as many bytes over and over.

The whole takes about three minutes on two cores. `--only` takes the measurements whose name holds the words. The result
is one JSON object per measurement, as `tools/readme.py` wants it, in `benchmarks/results/<machine>/engine_cpu.jsonl`;
with `--quick` everything is small, and then, or with `--only`, the file goes to `runs/`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from machine import machine_slug
from peers_cpu import LeadlineSide, Run, TransformersSide, random_tokens, this_run
from rich.console import Console
from rich.table import Table
from torch import Tensor

from leadline.engine.engine import Engine, Settings
from leadline.engine.prefix import WindowPolicy
from leadline.engine.request import Request, Sampling
from leadline.model.page_table import num_pages
from leadline.recipes.bench import append

ROOT = Path(__file__).resolve().parent.parent
GREEDY = Sampling(temperature=0.0)
GATE_TOKENS = 12


class BenchmarkError(ValueError):
    """The two sides do not do the same work."""


@dataclass(frozen=True)
class Sizes:
    """decode_prompt, first_prompt: tokens of the prompts; new: tokens drawn of each in a run; repeats: runs."""

    decode_prompt: int = 1024
    first_prompt: int = 8192
    new: int = 64
    repeats: int = 3


QUICK = Sizes(decode_prompt=130, first_prompt=300, new=4, repeats=1)


def prompts(count: int, length: int) -> list[tuple[int, ...]]:
    """Different texts, so that no prefix is shared."""
    tokens = random_tokens(count * length).tolist()
    return [tuple(tokens[start : start + length]) for start in range(0, count * length, length)]


# -- leadline ------------------------------------------------------------------------------------------------------


def our_engine(side: LeadlineSide, count: int, tokens: int, compiled: bool = False) -> Engine:
    pages = count * (num_pages(tokens) + 2)
    settings = Settings(slots=count, pages=pages, policy=WindowPolicy("zero"), compile_steps=compiled)
    return Engine(side.model, settings)


def our_answer(side: LeadlineSide, prompt: tuple[int, ...], new: int) -> list[int]:
    engine = our_engine(side, 1, len(prompt) + new)
    engine.submit(Request(prompt, new, GREEDY))
    return [token.id for _ in iter(lambda: engine.busy, False) for event in engine.step() for token in event.tokens]


def reading_engine(side: LeadlineSide, batch: int, sizes: Sizes, compiled: bool) -> Engine:
    """An engine that has read every prompt, with room for the tokens of all repeats."""
    engine = our_engine(side, batch, sizes.decode_prompt + GATE_TOKENS + sizes.repeats * sizes.new + 1, compiled)
    for prompt in prompts(batch, sizes.decode_prompt):
        engine.submit(Request(prompt, 10**6, GREEDY))
    while not engine.running or any(sequence.pending > 1 for sequence in engine.running) or engine.waiting:
        engine.step()
    return engine


def first_tokens(engine: Engine) -> list[list[int]]:
    """What each sequence says first."""
    for _ in range(GATE_TOKENS):
        engine.step()
    return [sequence.output[:GATE_TOKENS] for sequence in engine.running]


def our_decoding(engine: Engine, sizes: Sizes) -> float:
    """Tokens per second of some steps."""
    start, drawn = time.perf_counter(), 0
    for _ in range(sizes.new):
        drawn += sum(len(event.tokens) for event in engine.step())
    return drawn / (time.perf_counter() - start)


def weights_once(side: LeadlineSide, batch: int, sizes: Sizes) -> float:
    """Tokens per second if a step were the reading of its weights: all but the embedding, and of the experts as many
    as so many tokens visit at most."""
    config, num_bytes = side.model.config, 0
    visited = min(1.0, batch * config.num_experts_per_tok / config.n_routed_experts)
    for name, weight in side.model.named_parameters():
        if not name.startswith("embed."):
            num_bytes += int(weight.nbytes * (visited if ".experts." in name else 1.0))
    buffer = torch.ones(num_bytes // 4)

    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(sizes.new):
            buffer.sum()
        return (time.perf_counter() - start) / sizes.new

    return batch / min(seconds() for _ in range(sizes.repeats))


def our_first_token(side: LeadlineSide, sizes: Sizes) -> float:
    (prompt,) = prompts(1, sizes.first_prompt)
    engine = our_engine(side, 1, sizes.first_prompt + 1)
    start = time.perf_counter()
    engine.submit(Request(prompt, 1, GREEDY))
    while not any(event.tokens for event in engine.step()):
        pass
    return time.perf_counter() - start


# -- transformers --------------------------------------------------------------------------------------------------


def their_tokens(
    side: TransformersSide, tokens_NT: Tensor, new: int, note: Callable[..., Tensor] | None = None
) -> Tensor:
    """New tokens of each prompt. note: called after each, as a stopping criterion."""
    with torch.no_grad():
        found = side.model.generate(  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            tokens_NT,
            attention_mask=torch.ones_like(tokens_NT),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[note] if note else [],
        )
    return found[:, tokens_NT.shape[1] :]


def their_seconds(side: TransformersSide, batch: int, length: int, new: int) -> float:
    tokens_NT = torch.tensor(prompts(batch, length))
    start = time.perf_counter()
    their_tokens(side, tokens_NT, new)
    return time.perf_counter() - start


def their_decoding(side: TransformersSide, batch: int, sizes: Sizes) -> float:
    """Tokens per second of all but the first, in the best of the runs."""
    times: list[float] = []

    def note(tokens_NT: Tensor, scores: object, **_: object) -> Tensor:
        times.append(time.perf_counter())
        return torch.zeros(len(tokens_NT), dtype=torch.bool)

    their_tokens(side, torch.tensor(prompts(batch, sizes.decode_prompt)), 1 + sizes.repeats * sizes.new, note)
    ends = times[:: sizes.new]
    return batch * sizes.new / min(after - before for before, after in pairwise(ends))


# -- the run -------------------------------------------------------------------------------------------------------


def gate(ours: LeadlineSide, theirs: TransformersSide) -> None:
    """BenchmarkError when the greedy continuations differ."""
    (prompt,) = prompts(1, 200)
    expected = their_tokens(theirs, torch.tensor([prompt]), GATE_TOKENS)[0].tolist()
    found = our_answer(ours, prompt, GATE_TOKENS)
    if found != expected:
        raise BenchmarkError(f"greedy continuations differ: leadline {found}, transformers {expected}")


Measurement = tuple[str, Callable[[], dict[str, str]]]


def measurements(ours: LeadlineSide, theirs: TransformersSide, sizes: Sizes) -> list[Measurement]:
    """Name and work of each; the work returns the README's columns behind the name."""

    def best(measure: Callable[[], float], choose: Callable[..., float]) -> float:
        return choose(measure() for _ in range(sizes.repeats))

    known: dict[int, float] = {}  # of transformers, which has one figure for both of ours
    said: dict[int, list[list[int]]] = {}  # by plain steps

    def decoding(batch: int, compiled: bool) -> dict[str, str]:
        engine = reading_engine(ours, batch, sizes, compiled)
        found = first_tokens(engine)
        if batch not in said:
            said[batch] = first_tokens(reading_engine(ours, batch, sizes, compiled=False)) if compiled else found
        if found != said[batch]:
            raise BenchmarkError(f"batch {batch}: compiled steps draw other tokens than plain ones")
        mine = best(lambda: our_decoding(engine, sizes), max)
        if batch not in known:
            known[batch] = their_decoding(theirs, batch, sizes)
        compiling, once = engine.compile_seconds, weights_once(ours, batch, sizes)
        row = _row(f"{mine:,.1f}", f"{known[batch]:,.1f}", mine / known[batch])
        return row | {"compiling, s": f"{compiling:.0f}" if compiled else "", "weights once": f"{once:,.0f}"}

    def first_token() -> dict[str, str]:
        mine = best(lambda: our_first_token(ours, sizes), min)
        other = their_seconds(theirs, 1, sizes.first_prompt, 1)
        return _row(f"{mine:.2f}", f"{other:.2f}", other / mine) | {"compiling, s": "", "weights once": ""}

    found: list[Measurement] = []
    for batch in (1, 16):
        for compiled in (False, True):
            what = f"decode after {sizes.decode_prompt:,} tokens, batch {batch}{', compiled' * compiled}, tokens/s"
            found.append((what, partial(decoding, batch, compiled)))
    return [*found, (f"first token of a prompt of {sizes.first_prompt:,}, s", first_token)]


def _row(ours: str, theirs: str, ratio: float) -> dict[str, str]:
    return {"leadline": ours, "transformers": theirs, "times faster": f"{ratio:.2f}"}


def benchmark(sizes: Sizes, threads: int, only: str, out: Path) -> list[dict[str, Any]]:
    """Gate, measure, store; returns the stored lines."""
    torch.set_num_threads(threads)
    console = Console(stderr=True)
    ours, theirs = LeadlineSide(), TransformersSide()
    chosen = [(what, measure) for what, measure in measurements(ours, theirs, sizes) if only in what]
    if not chosen:
        raise BenchmarkError(f"--only '{only}': no measurement has a name with that")
    gate(ours, theirs)
    run: Run = this_run(threads)
    shared = {
        "benchmark": "engine_cpu",
        "title": f"The engine against transformers' generate on {threads} CPU cores, FP32",
        "command": "python benchmarks/engine_cpu.py",
        "machine": run.machine,
        "time": run.time,
        "commit": run.commit,
        "versions": run.versions,
    }
    lines: list[dict[str, Any]] = []
    partial_out = out.with_suffix(".partial")
    console.print(f"finished measurements are kept in {partial_out} until all are done")
    for what, measure in chosen:
        console.print(what, end="", soft_wrap=True)
        row = measure()
        console.print(": " + ", ".join(f"{name} {value}" for name, value in row.items() if value), soft_wrap=True)
        lines.append(shared | {"row": {"what": what, **row}})
        append(partial_out, lines[-1:])
    append(out, lines)
    partial_out.unlink()
    table = Table(*lines[0]["row"])
    for line in lines:
        table.add_row(*line["row"].values())
    console.print(table)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the benchmark out; into runs/")
    parser.add_argument("--only", default="", metavar="WORDS", help="measurements whose name holds these words")
    parser.add_argument("--machine", help="name of the result folder")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = ROOT / "benchmarks" / "results" / (options.machine or machine_slug())
    part = options.quick or options.only
    default = Path("runs/engine_cpu.jsonl") if part else folder / "engine_cpu.jsonl"
    benchmark(QUICK if options.quick else Sizes(), options.threads, options.only, options.out or default)


if __name__ == "__main__":
    main()
