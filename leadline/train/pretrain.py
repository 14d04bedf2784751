"""Pretraining, from the top: text -> tokenizer -> shards -> model -> updates -> checkpoint.

`pretrain(run)` does the whole of it and can be stopped anywhere: Ctrl-C finishes the step in progress, saves, and the
same call continues to bitwise the same result; a crash loses the steps since the last save. Everything the run makes
lies in its folder:

    tokenizer/  shards/  heldout/      made from the text, kept between runs of the same settings
    metrics.jsonl                      one line per step
    resume.pt                          the training checkpoint
    checkpoint/                        the trained model in the official layout
    summary.json                       the numbers of the end
"""

from __future__ import annotations

import dataclasses
import json
import signal
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from leadline.data.corpus import Corpus, Document, is_held_out, standard_library_documents
from leadline.data.loader import Loader
from leadline.data.shards import Shards, build_shards
from leadline.model.config import NANO, ModelConfig
from leadline.model.init import initialize
from leadline.model.signals import Training
from leadline.model.transformer import Transformer
from leadline.optim.groups import build_optimizers
from leadline.optim.schedule import lr_at, mtp_weight_at
from leadline.text.tokenizer import Tokenizer
from leadline.train.atomic import write_text
from leadline.train.checkpoint import load_training, save_training
from leadline.train.evaluate import bits_per_byte
from leadline.train.losses import LossWeights
from leadline.train.metrics import MetricsFile, RunDisplay
from leadline.train.step import StepResult, train_step
from leadline.weights.save import save_checkpoint


class RunError(ValueError):
    """A run's settings contradict each other; one line that names the setting and the rule."""


@dataclass(frozen=True)
class Run:
    """Everything that decides a pretraining run.

    out: folder of the run. data: file or folder of text; None = the Python standard library of this machine.
    steps: number of updates; None = as many as fit into `minutes`, measured on the first updates and then fixed.
    tokens_per_step: tokens of one update, packed into segments of tokens_per_segment.
    peak_lr .. warmup_steps, decay_share: linear warm-up, constant, cosine over the last share of the steps.
    dense_share: share of the steps at the start in which CSA attends to every visible entry.
    heldout_percent: of the documents, by hash. heldout_tokens: scored at each evaluation (all of them at the end).
    """

    out: Path = Path("runs/nano")
    data: Path | None = None
    model: ModelConfig = field(default_factory=lambda: NANO)
    steps: int | None = None
    minutes: float = 5.0
    tokens_per_step: int = 4096
    tokens_per_segment: int = 2048
    peak_lr: float = 1e-2
    final_lr_share: float = 0.1
    warmup_steps: int = 20
    decay_share: float = 0.5
    dense_share: float = 0.3
    weights: LossWeights = field(default_factory=LossWeights)
    bias_speed: float = 1e-3
    clip_norm: float = 1.0
    heldout_percent: float = 4.0
    heldout_tokens: int = 16384
    evaluate_every: int = 50
    save_every_seconds: float = 60.0
    tokenizer_bytes: int = 8_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens_per_step", "tokens_per_segment", "evaluate_every", "heldout_tokens", "tokenizer_bytes"):
            if getattr(self, name) < 1:
                raise RunError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.tokens_per_step % self.tokens_per_segment:
            raise RunError(f"tokens_per_step = {self.tokens_per_step}: must be a multiple of tokens_per_segment")
        if self.steps is not None and self.steps < 1:
            raise RunError(f"steps = {self.steps}: must be at least 1, or none to go by minutes")
        if not self.minutes > 0:
            raise RunError(f"minutes = {self.minutes}: must be positive")
        for name in ("decay_share", "dense_share", "final_lr_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise RunError(f"{name} = {getattr(self, name)}: must lie between 0 and 1")
        if not 0 < self.heldout_percent < 100:
            raise RunError(f"heldout_percent = {self.heldout_percent}: must lie between 0 and 100")

    def fingerprint(self) -> dict[str, Any]:
        """The settings that a resumed run must share, as plain values."""
        free = {"out", "steps", "minutes", "save_every_seconds"}
        values = dataclasses.asdict(self)
        return {name: _plain(value) for name, value in values.items() if name not in free}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str, sort_keys=True))


@dataclass(frozen=True)
class Trained:
    """What a finished run leaves in memory. finished: False when Ctrl-C stopped it."""

    model: Transformer
    tokenizer: Tokenizer
    heldout: Shards
    finished: bool
    steps_done: int
    total_steps: int


def pretrain(run: Run, console: Console) -> Trained:
    """Run, or continue, a pretraining run."""
    run.out.mkdir(parents=True, exist_ok=True)
    with RunDisplay(console) as display, _stop_on_interrupt() as stop:
        tokenizer, train_shards, heldout_shards = prepare_text(run, display)
        config = run.model.replace(vocab_size=tokenizer.vocab_size)

        model = Transformer(config)
        optimizers = build_optimizers(model.named_parameters(), config, run.peak_lr)
        loader = Loader(train_shards, tokenizer, run.tokens_per_segment, seed=run.seed)

        clock = Clock(total_steps=run.steps)
        resume = run.out / "resume.pt"
        if resume.exists():
            progress = load_training(resume, model, optimizers, run=run.fingerprint())
            loader.load_state_dict(progress["loader"])
            clock = Clock(**progress["clock"])
            display.say(f"continuing {run.out} after step {clock.step}")
        else:
            initialize(model, run.seed, token_frequencies(train_shards, config.vocab_size))
        metrics = MetricsFile(run.out / "metrics.jsonl", keep_to_step=clock.step)

        def save() -> None:
            progress = {"loader": loader.state_dict(), "clock": dataclasses.asdict(clock)}
            save_training(resume, model, optimizers, run=run.fingerprint(), progress=progress)

        task = display.task("training", clock.total_steps)
        last_save = time.monotonic()
        while not clock.finished and not stop.requested:
            started = time.monotonic()
            settings = schedule(run, clock)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr
            batches = [next(loader) for _ in range(run.tokens_per_step // run.tokens_per_segment)]
            result = train_step(
                model,
                optimizers,
                [(batch.segment, batch.targets_T) for batch in batches],
                weights=settings.weights,
                training=settings.training,
                clip_norm=run.clip_norm,
                bias_speed=run.bias_speed,
            )
            tokens = sum(batch.segment.num_tokens for batch in batches)
            clock.advance(time.monotonic() - started, tokens, run)
            row = step_row(result, settings, clock, tokens, time.monotonic() - started)
            if clock.step % run.evaluate_every == 0 or clock.finished:
                started = time.monotonic()
                row["heldout_bpb"] = bits_per_byte(
                    model, heldout_shards, tokenizer, run.tokens_per_segment, limit=run.heldout_tokens
                )
                clock.evaluated(time.monotonic() - started, row["heldout_bpb"])
            metrics.write(row)
            display.update(task, clock.step, clock.total_steps, numbers_line(row, clock))
            if time.monotonic() - last_save > run.save_every_seconds:
                save()
                last_save = time.monotonic()
        save()
        metrics.close()
        if clock.finished:
            export(run, model, tokenizer, heldout_shards, clock, display)
        else:
            display.say(f"stopped after step {clock.step}; everything is saved: the same command continues")
    return Trained(model, tokenizer, heldout_shards, clock.finished, clock.step, clock.total_steps or 0)


# -- the named steps, in the order of their use ------------------------------------------------------------------


def documents_of(run: Run) -> Iterable[Document]:
    return standard_library_documents() if run.data is None else Corpus(run.data)


def prepare_text(run: Run, display: RunDisplay) -> tuple[Tokenizer, Shards, Shards]:
    """Documents -> tokenizer, training shards and held-out shards; each step is skipped where its result exists."""
    source = "Python standard library" if run.data is None else str(run.data)
    task = display.task("reading text", None)
    training: list[Document] = []
    heldout: list[Document] = []
    for number, document in enumerate(documents_of(run), start=1):
        (heldout if is_held_out(document, run.heldout_percent) else training).append(document)
        display.update(task, number)
    if not training or not heldout:
        raise RunError(
            f"{source}: {len(training)} training and {len(heldout)} held-out documents; both are needed, so give more "
            f"documents or change heldout_percent ({run.heldout_percent})"
        )
    display.update(task, len(training) + len(heldout), len(training) + len(heldout))
    size = sum(len(document.text.encode("utf8")) for document in training)
    display.say(f"text: {source}, {len(training):,} documents, {size / 1e6:.1f} MB; {len(heldout):,} held out")

    folder = run.out / "tokenizer"
    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(folder)
    else:
        sample = list(sample_texts(training, run.tokenizer_bytes))
        task = display.task("tokenizer", len(sample))
        tokenizer = Tokenizer.train(sample, run.model.vocab_size, lambda done, total: display.update(task, done, total))
        tokenizer.save(folder)
    task = display.task("tokenising", len(training))
    train_shards = build_shards(
        training, run.out / "shards", tokenizer, source=source, progress=lambda n, total: display.update(task, n, total)
    )
    heldout_shards = build_shards(heldout, run.out / "heldout", tokenizer, source=f"{source}, held out")
    display.say(
        f"tokens: {train_shards.num_tokens:,} of a vocabulary of {tokenizer.vocab_size:,}, "
        f"{train_shards.num_bytes / train_shards.num_tokens:.2f} bytes each; {heldout_shards.num_tokens:,} held out"
    )
    return tokenizer, train_shards, heldout_shards


def sample_texts(documents: list[Document], limit_bytes: int) -> Iterator[str]:
    """Texts spread evenly over the documents, about `limit_bytes` in all."""
    total = sum(len(document.text) for document in documents)
    step = max(1, round(total / limit_bytes))
    for document in documents[::step]:
        yield document.text


def token_frequencies(shards: Shards, vocab_size: int) -> torch.Tensor:
    """Occurrences of every id in the training text, for the hash tables."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for document in range(shards.num_documents):
        counts += np.bincount(shards.tokens(document), minlength=vocab_size)
    return torch.from_numpy(counts)


@dataclass
class Clock:
    """Where a run stands. When the length is given in minutes, it is turned into steps once, after a few updates."""

    total_steps: int | None
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    heldout_bpb: float | None = None

    MEASURED_STEPS = 12

    @property
    def finished(self) -> bool:
        return self.total_steps is not None and self.step >= self.total_steps

    def advance(self, seconds: float, tokens: int, run: Run) -> None:
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        if self.total_steps is None:
            self.step_seconds.append(seconds)
            if len(self.step_seconds) >= self.MEASURED_STEPS or self.seconds >= 60 * run.minutes:
                left = 60 * run.minutes - self.seconds
                usual = statistics.median(self.step_seconds[len(self.step_seconds) // 2 :])
                # an evaluation costs about a third of a training pass over its tokens
                usual *= 1 + run.heldout_tokens / (3 * run.tokens_per_step * run.evaluate_every)
                self.total_steps = max(self.step + 1, self.step + int(left / usual))

    def evaluated(self, seconds: float, heldout_bpb: float) -> None:
        self.seconds += seconds
        self.heldout_bpb = heldout_bpb


@dataclass(frozen=True)
class StepSettings:
    lr: float
    weights: LossWeights
    training: Training


def schedule(run: Run, clock: Clock) -> StepSettings:
    """Learning rate, loss weights and attention mode of the next step. Until the length is known the run is in its
    warm-up, which does not depend on it."""
    total = clock.total_steps if clock.total_steps is not None else 10**9
    warmup = min(run.warmup_steps, total)
    decay_start = max(warmup, total - round(run.decay_share * total))
    lr = lr_at(
        clock.step,
        peak=run.peak_lr,
        final=run.peak_lr * run.final_lr_share,
        warmup_steps=warmup,
        decay_start=decay_start,
        total_steps=total,
    )
    mtp = run.weights.mtp * mtp_weight_at(clock.step, decay_start=decay_start) / 0.3
    dense = clock.step < run.dense_share * total
    return StepSettings(lr, dataclasses.replace(run.weights, mtp=mtp), Training(dense=dense, recall_queries=32))


def step_row(result: StepResult, settings: StepSettings, clock: Clock, tokens: int, seconds: float) -> dict[str, Any]:
    """One line of the metrics file."""
    load_LE = result.counts_LE.double() / result.counts_LE.double().mean(-1, keepdim=True)
    return {
        "step": clock.step,
        "tokens": clock.tokens,
        "seconds": round(clock.seconds, 3),
        "loss": result.next_token,
        "mtp_loss": result.extra_token,
        "index_kl": result.indexer,
        "balance_loss": result.balance,
        "recall": result.recall,
        "grad_norm": result.grad_norm,
        "clip_scale": result.clip_scale,
        "selection_bias": result.bias_largest,
        "lr": settings.lr,
        "dense": settings.training.dense,
        "tokens_per_second": tokens / seconds,
        "expert_load": [[round(value, 3) for value in row] for row in load_LE.tolist()],
    }


def numbers_line(row: dict[str, Any], clock: Clock) -> str:
    """The numbers worth watching, in one short line."""
    parts = [f"loss {row['loss']:.3f}"]
    if clock.heldout_bpb is not None:
        parts.append(f"held-out {clock.heldout_bpb:.3f} bits/byte")
    parts.append(f"lr {row['lr']:.1e}")
    parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
    parts.append(f"load {max(max(layer) for layer in row['expert_load']):.1f}x")
    if row["recall"] is not None:
        parts.append(f"recall {row['recall']:.2f}")
    return "  ".join(parts)


def export(
    run: Run,
    model: Transformer,
    tokenizer: Tokenizer,
    heldout: Shards,
    clock: Clock,
    display: RunDisplay,
) -> None:
    """Write the trained model in the official layout, and the numbers of the end."""
    files = sorted((run.out / "tokenizer").iterdir())
    save_checkpoint(model, model.config, run.out / "checkpoint", tokenizer_files=files)
    summary = {
        "steps": clock.step,
        "tokens": clock.tokens,
        "seconds": round(clock.seconds, 1),
        "heldout_bpb": bits_per_byte(model, heldout, tokenizer, run.tokens_per_segment, limit=None),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "heldout_tokens": heldout.num_tokens,
        "threads": torch.get_num_threads(),
    }
    write_text(run.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    display.say(
        f"trained: {clock.step} steps, {clock.tokens:,} tokens, {summary['heldout_bpb']:.3f} bits per byte held out"
    )


@dataclass
class _Stop:
    requested: bool = False


@contextmanager
def _stop_on_interrupt() -> Iterator[_Stop]:
    """The first Ctrl-C asks for a stop after the step; the second one interrupts at once."""
    stop = _Stop()

    def ask(_number: int, _frame: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread: leave the signals alone
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
