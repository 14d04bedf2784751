"""Leadline against transformers on CPU cores: memory and speed of prefill and of a training step.

usage: python benchmarks/peers_cpu.py [--quick] [--machine SLUG] [--threads N] [--out FILE]

Both implementations get the same small model, `PEER`, with the same random weights in FP32. First the gate: on one
prompt their logits, in one shot and in chunks, and their training losses must agree to 1e-4; when they do not, nothing
is timed. Then every measurement runs in a child process of its own, one after another, so that none sees the memory of
another:

- *one-shot prefill*: the whole prompt in one call, which fills a cache and returns the logits of the last token;
- *chunked prefill*: the same in calls of 512 tokens;
- *training step*: forward and backward of one sequence. Leadline's includes the indexer's KL loss; transformers' is
  the loss it returns for `labels`. *With recompute*, both keep only what passes between blocks (in transformers:
  activation checkpointing).

A child runs 256 tokens to warm up, then the measurement up to three times within a minute. *Tokens/s* is the best run.
*Memory* is the peak of the resident set above what was resident before the run, as the kernel counts it: activations,
cache, gradients and what the allocator wastes; it is that of the run that took most. A child may map 21 GB; a side
that needs more is recorded with the allocator's error. Linux only.

The result is one JSON object per measurement, as `tools/readme.py` wants it, in
`benchmarks/results/<machine>/peers_cpu.jsonl`. With `--quick` everything is small and the file goes to `runs/`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from machine import commit, machine_slug, processor
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from leadline.model.config import ModelConfig
from leadline.model.segment import Segment
from leadline.model.signals import Training
from leadline.model.state import State
from leadline.model.transformer import Transformer
from leadline.ops.cross_entropy import cross_entropy
from leadline.weights.names import file_tensors

ROOT = Path(__file__).resolve().parent.parent
MB, GB = 10**6, 10**9

# One layer of each kind and a second CSA layer; 8.8 M parameters.
PEER = ModelConfig(
    vocab_size=256,
    hidden_size=256,
    num_hidden_layers=4,
    compress_ratios=(0, 4, 128, 4),
    num_nextn_predict_layers=0,  # transformers has no MTP block
    num_attention_heads=8,
    head_dim=64,
    qk_rope_head_dim=32,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=128,
    index_topk=64,
    index_n_heads=8,
    index_head_dim=64,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=256,
    num_hash_layers=1,
    torch_dtype="float32",
)

SEED = 0
GATE_TOKENS, GATE_CHUNK, GATE_TOLERANCE = 384, 100, 1e-4
WARM_UP_TOKENS = 256
MOST_RUNS, SECONDS_PER_MEASUREMENT = 3, 60.0
ADDRESS_SPACE = 21 * GB
CHILD_TIMEOUT = 1800.0  # seconds

ONE_SHOT, CHUNKED = "one-shot prefill", "chunked prefill"
TRAINING, RECOMPUTE = "training step", "training step with recompute"


class BenchmarkError(ValueError):
    """The benchmark cannot go on; the message says what was found."""


# -- the two sides -------------------------------------------------------------------------------------------------


class Side(Protocol):
    """One implementation, with the peer model loaded."""

    @property
    def model(self) -> nn.Module: ...

    def logits(self, tokens_T: Tensor) -> Tensor:
        """FP32 logits of all tokens, [T, V]."""
        ...

    def prefill(self, tokens_T: Tensor, chunk: int) -> Tensor:
        """Fill a fresh cache, `chunk` tokens a call; returns the last token's logits [V]."""
        ...

    def training_step(self, tokens_T: Tensor, recompute: bool) -> float:
        """Forward and backward of one sequence; returns the language-model loss, in nats per token."""
        ...


def peer_model() -> Transformer:
    """The peer model with random weights that depend on `SEED` alone, at scales that keep every signal near 1."""
    generator = torch.Generator().manual_seed(SEED)
    model = Transformer(PEER)
    for name, tensor in model.state_dict().items():
        if tensor.dtype == torch.int64:
            tensor.copy_(_hash_table(generator))
        elif tensor.ndim >= 2:
            tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)
        else:
            tensor.normal_(1.0 if "norm" in name or "scale" in name else 0.0, 0.1, generator=generator)
    return model


def _hash_table(generator: torch.Generator) -> Tensor:
    order_VE = torch.rand(PEER.vocab_size, PEER.n_routed_experts, generator=generator).argsort(dim=1)
    return order_VE[:, : PEER.num_experts_per_tok]


def in_transformers_names(model: Transformer) -> dict[str, Tensor]:
    """The model's tensors under the names and in the layout of transformers."""
    ours = model.state_dict()
    files = file_tensors({name: tuple(tensor.shape) for name, tensor in ours.items()}, "transformers")
    parts = {name: [ours[part.ours] for part in file.parts] for name, file in files.items()}
    return {name: tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1) for name, tensors in parts.items()}


class LeadlineSide:
    def __init__(self) -> None:
        self.model = peer_model()

    def logits(self, tokens_T: Tensor) -> Tensor:
        return self.model.logits(self.model.hidden(self.model(Segment.of(tokens_T)).streams_TSD))

    def prefill(self, tokens_T: Tensor, chunk: int) -> Tensor:
        state = State(PEER, slots=1, capacity_tokens=len(tokens_T))
        logits_V = torch.empty(0)
        for start in range(0, len(tokens_T), chunk):
            output = self.model(Segment.of(tokens_T[start : start + chunk], past=[start]), state)
            logits_V = self.model.logits(self.model.hidden(output.streams_TSD[-1:]))[0]
        return logits_V

    def training_step(self, tokens_T: Tensor, recompute: bool) -> float:
        self.model.zero_grad(set_to_none=True)
        output = self.model(Segment.of(tokens_T), training=Training(recompute=recompute))
        hidden_TD = self.model.hidden(output.streams_TSD)
        loss = cross_entropy(hidden_TD[:-1], self.model.head.weight, tokens_T[1:]).mean()
        kl = torch.stack([signals.indexer.kl for signals in output.signals if signals.indexer is not None]).sum()
        (loss + kl).backward()
        return float(loss.detach())


class TransformersSide:
    def __init__(self) -> None:
        # Imported here: a leadline measurement must not carry the memory of the other side's code.
        from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

        self.model = DeepseekV4ForCausalLM(DeepseekV4Config(**PEER.to_dict("transformers")))
        self.model.load_state_dict(in_transformers_names(peer_model()))

    def logits(self, tokens_T: Tensor) -> Tensor:
        return self.model(input_ids=tokens_T[None], use_cache=False).logits[0]

    def prefill(self, tokens_T: Tensor, chunk: int) -> Tensor:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        logits_V = torch.empty(0)
        for start in range(0, len(tokens_T), chunk):
            tokens_1T = tokens_T[None, start : start + chunk]
            output = self.model(input_ids=tokens_1T, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits_V = output.logits[0, -1]
        return logits_V

    def training_step(self, tokens_T: Tensor, recompute: bool) -> float:
        self.model.train()
        if recompute:
            self.model.activation_checkpointing_enable()
        self.model.zero_grad(set_to_none=True)
        loss = self.model(input_ids=tokens_T[None], labels=tokens_T[None], use_cache=False).loss
        loss.backward()
        return float(loss.detach())


SIDES: dict[str, Callable[[], Side]] = {"leadline": LeadlineSide, "transformers": TransformersSide}


def random_tokens(num_tokens: int) -> Tensor:
    """Token ids that depend on `SEED` alone, int64 [T]."""
    return torch.randint(0, PEER.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(SEED + 1))


def indexer_gradients(model: nn.Module) -> tuple[int, int]:
    """(indexer tensors that received a gradient other than zero, indexer tensors)."""
    tensors = [tensor for name, tensor in model.named_parameters() if ".indexer." in name]
    return sum(tensor.grad is not None and bool(tensor.grad.any()) for tensor in tensors), len(tensors)


def gate() -> float:
    """Largest absolute difference between the two sides: logits in one shot and in chunks, and the training loss."""
    ours, theirs = (side() for side in SIDES.values())
    tokens_T = random_tokens(GATE_TOKENS)
    with torch.no_grad():
        differences = [
            ours.logits(tokens_T) - theirs.logits(tokens_T),
            ours.prefill(tokens_T, GATE_CHUNK) - theirs.prefill(tokens_T, GATE_CHUNK),
        ]
    losses = [
        side.training_step(tokens_T, recompute=recompute) for side in (ours, theirs) for recompute in (False, True)
    ]
    return max(*(float(d.abs().max()) for d in differences), max(losses) - min(losses))


# -- one measurement, in the child ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One measurement of one side. chunk: tokens of one call; for a training step all of them."""

    name: str
    side: str
    tokens: int
    chunk: int


@dataclass(frozen=True)
class Result:
    """What a case measured; only `error` is set when the side could not allocate the memory it asked for."""

    tokens_per_second: float | None = None
    extra_bytes: int | None = None
    runs: int = 0
    indexer_tensors_with_gradient: int | None = None
    indexer_tensors: int | None = None
    error: str | None = None


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise BenchmarkError(f"/proc/self/status has no {key}: peak memory can be measured on Linux only")


def measured(work: Callable[[], object]) -> tuple[float, int]:
    """(seconds, peak resident bytes above those resident before)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that earlier work freed, but the allocator kept, would hide new demand
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the kernel's peak starts at the present size
    before = _status_bytes("VmRSS")
    start = time.perf_counter()
    work()
    return time.perf_counter() - start, _status_bytes("VmHWM") - before


def run_case(case: Case) -> Result:
    """Warm up, then measure; the peak is the largest and the time the best of the runs."""
    side = SIDES[case.side]()
    tokens_T = random_tokens(case.tokens)

    def work(tokens_T: Tensor) -> None:
        if case.name in (TRAINING, RECOMPUTE):
            side.training_step(tokens_T, recompute=case.name == RECOMPUTE)
        else:
            with torch.no_grad():
                side.prefill(tokens_T, case.chunk)

    work(tokens_T[:WARM_UP_TOKENS])
    runs: list[tuple[float, int]] = []
    deadline = time.perf_counter() + SECONDS_PER_MEASUREMENT
    while not runs or (len(runs) < MOST_RUNS and time.perf_counter() + runs[-1][0] < deadline):
        side.model.zero_grad(set_to_none=True)
        runs.append(measured(lambda: work(tokens_T)))
    seconds, extra_bytes = min(r[0] for r in runs), max(r[1] for r in runs)
    with_gradient, tensors = indexer_gradients(side.model) if case.name in (TRAINING, RECOMPUTE) else (None, None)
    return Result(case.tokens / seconds, extra_bytes, len(runs), with_gradient, tensors)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory could not be allocated."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error) or "bad_alloc" in str(error)


def child(case: Case, threads: int) -> Result:
    """`run_case` under the address-space limit; an allocation that fails is a result."""
    torch.set_num_threads(threads)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    try:
        return run_case(case)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Result(error=str(error).splitlines()[0] if str(error) else type(error).__name__)


# -- all measurements, in the parent -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """What is measured on one or both sides."""

    name: str
    tokens: int
    chunk: int
    sides: tuple[str, ...]

    def case(self, side: str) -> Case:
        return Case(self.name, side, self.tokens, self.chunk)


def measurements(quick: bool) -> list[Measurement]:
    """Everything that is measured, in order."""
    both, ours = tuple(SIDES), ("leadline",)
    if quick:
        return [
            Measurement(ONE_SHOT, 512, 512, both),
            Measurement(CHUNKED, 512, 128, both),
            Measurement(TRAINING, 256, 256, both),
            Measurement(RECOMPUTE, 256, 256, both),
        ]
    k = 1024
    one_shot = [(n * k, both if n <= 16 else ours) for n in (1, 2, 4, 8, 16, 32)]
    chunked = [(8 * k, both), (32 * k, both), (128 * k, ours)]
    return [
        *(Measurement(ONE_SHOT, tokens, tokens, sides) for tokens, sides in one_shot),
        *(Measurement(CHUNKED, tokens, 512, sides) for tokens, sides in chunked),
        *(Measurement(name, tokens, tokens, both) for name in (TRAINING, RECOMPUTE) for tokens in (512, 2 * k)),
    ]


def _expected_seconds(case: Case) -> float:
    """A rough guess, for the progress bar."""
    if case.side == "leadline":
        return 6 + case.tokens / 1500
    return 12 + case.tokens / 300 * (1.0 if case.name == CHUNKED else max(1.0, case.tokens / 4000))


def run_child(arguments: list[str]) -> Any:
    """Run this file with arguments; returns the JSON value of the last line it prints."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"{' '.join(arguments)}: no result after {CHILD_TIMEOUT:.0f} s") from None
    if done.returncode:
        raise BenchmarkError(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Run:
    """What all measurements of one run of this benchmark share."""

    machine: str
    threads: int
    time: str
    commit: str
    versions: dict[str, str]


def this_run(threads: int) -> Run:
    """The run that starts now on this machine."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return Run(
        machine=f"{processor()}, {threads} core{'s' if threads > 1 else ''}",
        threads=threads,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(short=True),
        versions=versions,
    )


def record(measurement: Measurement, results: dict[str, Result], run: Run) -> dict[str, Any]:
    """One line of the result file."""
    return {
        "benchmark": "peers_cpu",
        "title": "Memory and speed on CPU cores against transformers, model of 8.8 M parameters in FP32",
        "command": "python benchmarks/peers_cpu.py",
        **asdict(run),
        "name": measurement.name,
        "tokens": measurement.tokens,
        "chunk": measurement.chunk,
        **{side: asdict(results[side]) if side in results else None for side in SIDES},
        "row": _row(measurement, results),
    }


def _row(measurement: Measurement, results: dict[str, Result]) -> dict[str, str]:
    """The line as it is printed; a ratio above 1 is in favour of leadline. Trained indexer tensors: ours, theirs."""
    ours, theirs = (results.get(side) for side in SIDES)
    return {
        "measurement": measurement.name,
        "tokens": f"{measurement.tokens:,}",
        "leadline tokens/s": _speed(ours),
        "transformers tokens/s": _speed(theirs),
        "faster": _ratio(_value(ours, "tokens_per_second"), _value(theirs, "tokens_per_second")),
        "leadline memory": _memory(ours),
        "transformers memory": _memory(theirs),
        "less memory": _ratio(_value(theirs, "extra_bytes"), _value(ours, "extra_bytes")),
        "indexer tensors trained": _gradients(ours, theirs),
    }


def _value(result: Result | None, key: str) -> float | None:
    return None if result is None else getattr(result, key)


def _speed(result: Result | None) -> str:
    if result is None or result.tokens_per_second is None:
        return ""
    return f"{result.tokens_per_second:,.0f}"


def _memory(result: Result | None) -> str:
    if result is None:
        return ""
    if result.extra_bytes is None:
        return f"more than {ADDRESS_SPACE / GB:.0f} GB"
    return f"{result.extra_bytes / GB:.2f} GB" if result.extra_bytes >= GB else f"{result.extra_bytes / MB:.0f} MB"


def _ratio(better_if_large: float | None, other: float | None) -> str:
    return "" if better_if_large is None or not other else f"{better_if_large / other:.1f}x"


def _gradients(ours: Result | None, theirs: Result | None) -> str:
    counts = [
        f"{result.indexer_tensors_with_gradient} of {result.indexer_tensors}"
        for result in (ours, theirs)
        if result is not None and result.indexer_tensors is not None
    ]
    return ", ".join(counts)


@dataclass(frozen=True)
class Target:
    """A claim about a full run, the figure that decides it, and whether it holds."""

    claim: str
    figure: str
    met: bool


def targets(records: list[dict[str, Any]]) -> list[Target]:
    """What leadline sets out to reach; a side that was not measured raises KeyError, so only full runs are judged."""
    found = {(r["name"], r["tokens"], side): r[side] for r in records for side in SIDES}

    def memory(name: str, tokens: int, side: str = "leadline") -> float:
        return found[name, tokens, side]["extra_bytes"] or float("inf")

    def speed(name: str, tokens: int, side: str = "leadline") -> float:
        return found[name, tokens, side]["tokens_per_second"] or 0.0

    def gain(name: str, tokens: int) -> float:
        theirs = speed(name, tokens, "transformers")
        return speed(name, tokens) / theirs if theirs else float("inf")

    def below(claim: str, used: float, limit: float) -> Target:
        return Target(f"{claim} under {limit / MB:,.0f} MB", f"{used / MB:,.0f} MB", used < limit)

    chunked_gain, training_gain = gain(CHUNKED, 32768), gain(TRAINING, 2048)
    memory_share = memory(TRAINING, 2048) / memory(TRAINING, 2048, "transformers")
    trained = found[TRAINING, 2048, "leadline"]
    with_gradient, tensors = trained["indexer_tensors_with_gradient"], trained["indexer_tensors"]
    return [
        below("one-shot prefill of 8K tokens", memory(ONE_SHOT, 8192), 300 * MB),
        below("one-shot prefill of 32K tokens", memory(ONE_SHOT, 32768), 1 * GB),
        below("chunked prefill of 128K tokens", memory(CHUNKED, 131072), 500 * MB),
        Target("chunked prefill of 32K tokens at least 2x faster", f"{chunked_gain:.2f}x", chunked_gain >= 2),
        Target("training on 2K tokens in a third of the memory", f"{memory_share:.2f} of it", memory_share <= 1 / 3),
        Target("training on 2K tokens at least as fast", f"{training_gain:.2f}x", training_gain >= 1),
        Target("every indexer tensor is trained", f"{with_gradient} of {tensors}", with_gradient == tensors),
    ]


def measure_all(plan: list[Measurement], run: Run, partial: Path, console: Console) -> list[dict[str, Any]]:
    """Run every measurement in its own child, with progress; each finished one is appended to `partial` at once."""
    records: list[dict[str, Any]] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress, partial.open("w", encoding="utf8") as lines:
        task = progress.add_task("", total=sum(_expected_seconds(m.case(side)) for m in plan for side in m.sides))
        for measurement in plan:
            results: dict[str, Result] = {}
            for side in measurement.sides:
                case = measurement.case(side)
                progress.update(task, description=f"{case.name}, {case.tokens:,} tokens, {side}")
                results[side] = Result(**run_child(["--case", json.dumps(asdict(case)), "--threads", str(run.threads)]))
                progress.advance(task, _expected_seconds(case))
            records.append(record(measurement, results, run))
            lines.write(json.dumps(records[-1]) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
    return records


def result_table(records: list[dict[str, Any]]) -> Table:
    """The printed lines of the records."""
    columns = list(records[0]["row"])
    table = Table(*columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for line in records:
        table.add_row(*(line["row"][column] for column in columns))
    return table


def _console(stream: TextIO) -> Console:
    return Console(file=stream, width=None if stream.isatty() else 140)


def benchmark(quick: bool, threads: int, out: Path) -> int:
    """Gate, measurements, result file, table, targets; returns the exit code."""
    progress_console, console = _console(sys.stderr), _console(sys.stdout)
    difference = run_child(["--gate", "--threads", str(threads)])
    if not difference <= GATE_TOLERANCE:
        raise BenchmarkError(
            f"the two sides differ by {difference:.1e}, more than {GATE_TOLERANCE:.0e}: nothing is timed"
        )
    progress_console.print(f"both sides give the same logits and loss: largest difference {difference:.1e}")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    progress_console.print(f"finished measurements are kept in {partial} until all are done")
    records = measure_all(measurements(quick), this_run(threads), partial, progress_console)
    os.replace(partial, out)
    console.print(result_table(records))
    for target in [] if quick else targets(records):
        console.print(f"{'met   ' if target.met else 'missed'}  {target.claim}: {target.figure}")
    console.print(f"results: {out}")
    return 0


def main(arguments: list[str]) -> int:
    """The benchmark; with --case or --gate, what a child does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the benchmark out; writes to runs/")
    parser.add_argument("--machine", default=machine_slug(), help="name of the result folder (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="result file, if not in the result folder")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--gate", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case:
        print(json.dumps(asdict(child(Case(**json.loads(options.case)), options.threads))))
        return 0
    if options.gate:
        torch.set_num_threads(options.threads)
        print(json.dumps(gate()))
        return 0
    folder = ROOT / "runs" if options.quick else ROOT / "benchmarks" / "results"
    try:
        return benchmark(options.quick, options.threads, options.out or folder / options.machine / "peers_cpu.jsonl")
    except BenchmarkError as error:
        print(f"peers_cpu: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("peers_cpu: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
