"""Check a checkpoint against stored numbers, over every way of feeding it.

usage: leadline verify DIR [tolerance=T] [--json]

DIR holds config.json, model.safetensors under the official names, and io.safetensors with what the model must compute:

  tokens [1, P+D]                 the prompt and what follows it; the metadata key `prefill` is P
  logits_prefill [1, P, V]        logits of the prompt
  logits_decode [1, D, V]         logits of the tokens behind it
  mtp_logits [1, P-1, V]          logits of the MTP block at all positions of the prompt but the last
  streams_after_layer_N [n, S, D] residual streams at n evenly spaced positions of the prompt, for every layer N

The metadata key `mode` says how the numbers were computed.

exact (or no mode): in float32, without cache rounding. The prompt runs in one piece, in chunks of several sizes, token
by token behind the prompt, and through the MTP block. Each row shows the largest absolute difference from the stored
numbers and the token where it is; tolerance is 5e-5.

served: with the weights as they are stored, bfloat16 activations that are rounded to FP8 before FP8 and FP4 weights,
and the cache in FP8 and FP4. Differences of one rounding grow with depth, so every layer is checked by itself: it gets
the stored streams after the layer before. Each row shows the largest |difference| / |stored| of a token when the worst
1 % of the tokens are left out, because two router scores that are nearly equal may send a token to other experts;
tolerance is 2e-2.

The exit status is 0 when every row is within the tolerance, 1 when one is not, 2 when DIR cannot be used.

  leadline verify tests/golden/exact
  leadline verify tests/golden/served --json
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

from leadline import cli
from leadline.model.cache_format import EXACT, SERVED
from leadline.model.config import ConfigError, ModelConfig
from leadline.model.segment import Segment
from leadline.model.state import State
from leadline.model.transformer import Transformer
from leadline.weights.header import CheckpointError, read_header
from leadline.weights.load import load_checkpoint

CHUNK_SIZES = (1, 3, 4, 5, 64, 127, 128, 129)
MTP_CHUNK = 64
GOLDEN_FILE = "io.safetensors"
EXACT_MODE, SERVED_MODE = "exact", "served"
TOLERANCE = {EXACT_MODE: 5e-5, SERVED_MODE: 2e-2}
EXCUSED_SHARE = 0.01  # of the tokens of a served row
FAILED, UNUSABLE = 1, 2

Advance = Callable[[int], None]  # told how many more tokens have been fed


class VerifyError(ValueError):
    """A folder or request that cannot be verified; the message names the thing and the remedy."""


@dataclass(frozen=True)
class Options:
    """What the command line may set; without a tolerance, that of the mode."""

    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.tolerance is not None and not 0 <= self.tolerance < math.inf:
            raise VerifyError(f"tolerance={self.tolerance}: expected a number that is not negative")


@dataclass(frozen=True)
class Golden:
    """The stored numbers, without their batch axis. mode: exact or served; prefill: P; stride: positions between two
    stored streams."""

    mode: str
    tokens_T: Tensor
    prefill: int
    logits_prefill_TV: Tensor
    logits_decode_TV: Tensor
    mtp_logits_TV: Tensor | None
    streams_TSD: tuple[Tensor, ...]
    stride: int

    @property
    def prompt_T(self) -> Tensor:
        return self.tokens_T[: self.prefill]


@dataclass(frozen=True)
class Row:
    """One comparison. difference: the largest that counts, absolute or relative, NaN if any number is; position: the
    token where it is; excused: tokens further apart that do not count."""

    name: str
    difference: float
    position: int
    excused: int = 0

    def within(self, tolerance: float) -> bool:
        return self.difference <= tolerance


# -- reading -------------------------------------------------------------------------------------------------------


def read_golden(folder: Path, config: ModelConfig) -> Golden:
    """Read io.safetensors and check that it fits the model; VerifyError and CheckpointError name what does not."""
    path = folder / GOLDEN_FILE
    header = read_header(path)
    mode = header.metadata.get("mode", EXACT_MODE)
    if mode not in TOLERANCE:
        raise VerifyError(f"{path}: metadata key 'mode' is {mode!r}, expected {' or '.join(TOLERANCE)}")
    prefill = _prefill(path, header.metadata)
    shapes = {name: info.shape for name, info in header.tensors.items()}
    _check_shapes(path, shapes, config, prefill)
    tensors = load_file(path)
    tokens_T = tensors["tokens"][0].long()
    if int(tokens_T.min()) < 0 or int(tokens_T.max()) >= config.vocab_size:
        raise VerifyError(
            f"{path}: tokens run from {int(tokens_T.min())} to {int(tokens_T.max())}, "
            f"the vocabulary has {config.vocab_size}"
        )
    streams = tuple(tensors[f"streams_after_layer_{layer}"] for layer in range(config.num_hidden_layers))
    return Golden(
        mode,
        tokens_T,
        prefill,
        tensors["logits_prefill"][0],
        tensors["logits_decode"][0],
        tensors["mtp_logits"][0] if config.num_nextn_predict_layers else None,
        streams,
        math.ceil(prefill / len(streams[0])),
    )


def _prefill(path: Path, metadata: Any) -> int:
    text = metadata.get("prefill", "")
    if not text.isdecimal() or int(text) < 2:
        raise VerifyError(f"{path}: metadata key 'prefill' is {text!r}, expected the length of the prompt, 2 or more")
    return int(text)


def _check_shapes(path: Path, shapes: dict[str, tuple[int, ...]], config: ModelConfig, prefill: int) -> None:
    total = shapes.get("tokens", (1, 0))[-1]
    if total <= prefill:
        raise VerifyError(f"{path}: tokens {list(shapes.get('tokens', ()))} must go beyond the prompt of {prefill}")
    vocabulary = config.vocab_size
    expected: dict[str, tuple[int, ...]] = {
        "tokens": (1, total),
        "logits_prefill": (1, prefill, vocabulary),
        "logits_decode": (1, total - prefill, vocabulary),
    }
    if config.num_nextn_predict_layers:
        expected["mtp_logits"] = (1, prefill - 1, vocabulary)
    stored = (shapes.get("streams_after_layer_0") or (prefill,))[0]
    stride = math.ceil(prefill / max(stored, 1))
    if len(range(0, prefill, stride)) != stored:
        raise VerifyError(f"{path}: {stored} stored positions are not evenly spaced in a prompt of {prefill}")
    for layer in range(config.num_hidden_layers):
        expected[f"streams_after_layer_{layer}"] = (stored, config.hc_mult, config.hidden_size)
    for name, shape in expected.items():
        if name not in shapes:
            raise VerifyError(f"{path}: lacks tensor {name}")
        if shapes[name] != shape:
            raise VerifyError(f"{path}: tensor {name} is {list(shapes[name])}, the model needs {list(shape)}")


# -- comparing -----------------------------------------------------------------------------------------------------


def compare(name: str, found: Tensor, stored: Tensor, first: int = 0, stride: int = 1) -> Row:
    """The largest difference of two tensors whose first axis is positions first, first + stride, ..."""
    difference_T = (found.double() - stored.double()).abs().flatten(1).amax(1)
    worst = int(difference_T.nan_to_num(nan=math.inf).argmax())
    return Row(name, float(difference_T[worst]), first + stride * worst)


def compare_tokens(name: str, found: Tensor, stored: Tensor) -> Row:
    """The largest |found - stored| / |stored| of a token, first axis, but for the `EXCUSED_SHARE` that is worst."""
    found, stored = found.double().flatten(1), stored.double().flatten(1)
    relative_T = torch.linalg.vector_norm(found - stored, dim=1) / torch.linalg.vector_norm(stored, dim=1)
    order_T = relative_T.nan_to_num(nan=math.inf).argsort(descending=True)
    # A NaN is excused nowhere.
    excused = int(EXCUSED_SHARE * len(order_T)) if relative_T.isfinite().all() else 0
    worst = int(order_T[excused])
    return Row(name, float(relative_T[worst]), worst, int((relative_T > relative_T[worst]).sum()))


@dataclass(frozen=True)
class Check:
    """A comparison to be made: what it is called, how many tokens it feeds, and how to run it."""

    name: str
    num_tokens: int
    run: Callable[[Advance], list[Row]]


def checks(model: Transformer, golden: Golden) -> list[Check]:
    """Everything that `verify` compares, in the order of the table."""
    return exact_checks(model, golden) if golden.mode == EXACT_MODE else served_checks(model, golden)


def served_checks(model: Transformer, golden: Golden) -> list[Check]:
    """Every layer, the head and the MTP block, each by itself."""
    length, stored = golden.prefill, golden.streams_TSD

    @torch.no_grad()
    def layers(advance: Advance) -> list[Row]:
        with _streams_of(model) as found, _fed_with(model, stored):
            model(Segment.of(golden.prompt_T))
        advance(length)
        logits = model.logits(model.hidden(stored[-1]))
        rows = [compare_tokens(f"layer {number}", *pair) for number, pair in enumerate(zip(found, stored, strict=True))]
        return [*rows, compare_tokens("logits of the last streams", logits, golden.logits_prefill_TV)]

    @torch.no_grad()
    def mtp(advance: Advance) -> list[Row]:
        with _fed_with(model, tuple(streams[:-1] for streams in stored)):
            output = model(Segment.of(golden.prompt_T[:-1]))
        output = dataclasses.replace(output, streams_TSD=stored[-1][:-1])
        hidden_TD, _ = model.predict_second(output, golden.prompt_T[1:])
        advance(length - 1)
        assert golden.mtp_logits_TV is not None
        return [compare_tokens("MTP block", model.logits(hidden_TD), golden.mtp_logits_TV)]

    result = [Check("layers", length, layers)]
    return result if golden.mtp_logits_TV is None else [*result, Check("MTP", length - 1, mtp)]


def exact_checks(model: Transformer, golden: Golden) -> list[Check]:
    """The whole model, over every way of feeding it."""
    length, decoded = golden.prefill, len(golden.logits_decode_TV)

    def one_piece(advance: Advance) -> list[Row]:
        with _streams_of(model) as streams:
            logits = _feed(model, golden.prompt_T, [0, length], None, advance)
        rows = [compare("prefill, one piece", logits, golden.logits_prefill_TV)]
        for layer, stored in enumerate(golden.streams_TSD):
            found = streams[layer][:: golden.stride]
            rows.append(compare(f"streams after layer {layer}", found, stored, stride=golden.stride))
        return rows

    def chunked(size: int, advance: Advance) -> list[Row]:
        logits = _feed(model, golden.prompt_T, _borders(length, size), State(model.config, 1), advance)
        return [compare(f"prefill, chunks of {size}", logits, golden.logits_prefill_TV)]

    def decoding(advance: Advance) -> list[Row]:
        borders = [0, *range(length, length + decoded + 1)]
        logits = _feed(model, golden.tokens_T, borders, State(model.config, 1), advance)
        return [compare("decode, token by token", logits[length:], golden.logits_decode_TV, first=length)]

    def mtp(name: str, borders: list[int], stored: Tensor, advance: Advance) -> list[Row]:
        state = State(model.config, 1) if len(borders) > 2 else None
        return [compare(name, _feed(model, golden.prompt_T, borders, state, advance, mtp=True), stored)]

    result = [Check("prefill", length, one_piece)]
    for size in CHUNK_SIZES:
        if size < length:
            result.append(Check(f"chunks of {size}", length, lambda advance, size=size: chunked(size, advance)))
    result.append(Check("decode", length + decoded, decoding))
    stored = golden.mtp_logits_TV
    if stored is not None:
        for name, size in (("MTP, one piece", length), (f"MTP, chunks of {MTP_CHUNK}", MTP_CHUNK)):
            borders = _borders(length - 1, size)
            result.append(Check(name, length - 1, lambda advance, name=name, b=borders: mtp(name, b, stored, advance)))
    return result


def _borders(length: int, size: int) -> list[int]:
    return [*range(0, length, size), length]


@torch.no_grad()
def _feed(
    model: Transformer,
    tokens_T: Tensor,
    borders: Sequence[int],
    state: State | None,
    advance: Advance,
    mtp: bool = False,
) -> Tensor:
    """Logits of the trunk, or of the MTP block, when the tokens are fed in pieces; the piece count decides nothing."""
    parts = []
    for start, stop in itertools.pairwise(borders):
        output = model(Segment.of(tokens_T[start:stop], past=[start]), state)
        if mtp:
            hidden_TD, _ = model.predict_second(output, tokens_T[start + 1 : stop + 1], state)
        else:
            hidden_TD = model.hidden(output.streams_TSD)
        parts.append(model.logits(hidden_TD))
        advance(stop - start)
    return torch.cat(parts)


@contextmanager
def _streams_of(model: Transformer) -> Iterator[list[Tensor]]:
    """Collects what each block returns while inside."""
    streams: list[Tensor] = []

    def keep(_block: nn.Module, _inputs: Any, output: Any) -> None:
        streams.append(output[0])

    hooks = [block.register_forward_hook(keep) for block in model.layers]
    try:
        yield streams
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _fed_with(model: Transformer, streams: Sequence[Tensor]) -> Iterator[None]:
    """While inside, every block but the first gets stored streams instead of what the block before returns."""

    def replaced(number: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda _block, inputs: (streams[number - 1], *inputs[1:])

    hooks = [model.layers[number].register_forward_pre_hook(replaced(number)) for number in range(1, len(streams))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_finite(folder: Path, model: Transformer) -> None:
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor.float()).all():
            raise VerifyError(f"{folder}: weight {name} holds a value that is not finite: the file is damaged")


def verify(folder: Path, progress: Progress) -> tuple[str, list[Row]]:
    """Load the folder and make every comparison; returns the mode and the rows."""
    config = ModelConfig.from_file(folder)
    golden = read_golden(folder, config)
    loading = progress.add_task("loading", total=None)
    model = load_checkpoint(folder, dtype=torch.float32 if golden.mode == EXACT_MODE else None)
    model.cache_format = EXACT if golden.mode == EXACT_MODE else SERVED
    _check_finite(folder, model)
    progress.remove_task(loading)
    planned = checks(model, golden)
    task = progress.add_task("", total=sum(check.num_tokens for check in planned))
    rows = []
    for check in planned:
        progress.update(task, description=check.name)
        rows += check.run(lambda fed: progress.advance(task, fed))
    return golden.mode, rows


# -- the verb ------------------------------------------------------------------------------------------------------


def render(folder: Path, mode: str, rows: Sequence[Row], tolerance: float, console: Console) -> None:
    """Print the table and the verdict."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim")
    table.add_column("")
    exact = mode == EXACT_MODE
    for name in (
        "largest difference" if exact else "relative difference",
        "at token",
        *([] if exact else ["excused"]),
        "",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        verdict = "[green]ok[/]" if row.within(tolerance) else "[bold red]differs[/]"
        excused = [] if exact else [str(row.excused)]
        table.add_row(row.name, f"{row.difference:.2e}", str(row.position), *excused, verdict)
    console.print(table)
    failed = [row.name for row in rows if not row.within(tolerance)]
    if failed:
        verdict = f"{folder}: {len(failed)} of {len(rows)} rows exceed {tolerance:g}: {', '.join(failed)}"
    else:
        verdict = f"{folder}: all {len(rows)} rows are within {tolerance:g}"
    console.print(verdict, soft_wrap=True, markup=False)


def as_json(folder: Path, mode: str, rows: Sequence[Row], tolerance: float) -> str:
    """The same as one JSON object; a difference that is not a number is null."""
    content = {
        "folder": str(folder),
        "mode": mode,
        "tolerance": tolerance,
        "passed": all(row.within(tolerance) for row in rows),
        "rows": [
            {
                "name": row.name,
                "difference": row.difference if math.isfinite(row.difference) else None,
                "position": row.position,
                "excused": row.excused,
                "passed": row.within(tolerance),
            }
            for row in rows
        ],
    }
    return json.dumps(content, indent=2)


def parse(arguments: Sequence[str]) -> tuple[Path, Options, bool]:
    """Folder, options and whether JSON is wanted."""
    words = [word for word in arguments if word != "--json"]
    folders = [word for word in words if "=" not in word]
    for word in folders:
        if word.startswith("-"):
            raise VerifyError(f"unknown option '{word}': the only one is --json")
    options = cli.override(Options(), [word for word in words if "=" in word])
    if len(folders) != 1:
        raise VerifyError(f"expected one folder, got {' '.join(folders) or 'none'}")
    if not Path(folders[0]).is_dir():
        raise VerifyError(f"{folders[0]}: no such folder")
    return Path(folders[0]), options, len(words) < len(arguments)


def main(arguments: list[str]) -> int:
    """Run `leadline verify`; returns the exit code."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    try:
        folder, options, json_wanted = parse(arguments)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            mode, rows = verify(folder, progress)
    except (VerifyError, cli.UsageError, ConfigError, CheckpointError) as error:
        print(f"leadline verify: {error}", file=sys.stderr)
        return UNUSABLE
    tolerance = TOLERANCE[mode] if options.tolerance is None else options.tolerance
    if json_wanted:
        print(as_json(folder, mode, rows, tolerance))
    else:
        render(folder, mode, rows, tolerance, Console(highlight=False))
    return 0 if all(row.within(tolerance) for row in rows) else FAILED
