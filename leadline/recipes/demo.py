"""Train a small DeepSeek-V4 on real text from nothing, and look at it.

usage: leadline demo [minutes=5] [data=FOLDER|FILE] [out=runs/demo] [key=value ...] [--show]

Gathers text (the Python standard library and its documentation, or any text given with data=), trains a byte-level
tokenizer on it and then a `nano` model with every part of DeepSeek-V4 for about `minutes`, saves a checkpoint in the
official layout, loads it again, lets it continue a few held-out texts, and writes out/report.html.

Ctrl-C saves. The same command then continues to exactly the result of a run that was never stopped. A finished run is
not trained again: the command repeats its end. --show prints every setting with its value and trains nothing.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from leadline.cli import INTERRUPTED_STATUS, resolve, show
from leadline.data.loader import single_pass
from leadline.data.shards import Shards
from leadline.engine.generate import generate
from leadline.engine.request import Sampling
from leadline.model.transformer import Transformer
from leadline.recipes.nano import nano
from leadline.text.tokenizer import Tokenizer
from leadline.train.gain import measure_gain
from leadline.train.pretrain import Run, Trained, pretrain
from leadline.train.report import Sample, write_report
from leadline.weights.load import load_checkpoint

NUM_SAMPLES = 4
PROMPT_TOKENS = 128
CONTINUATION_TOKENS = 128


def main(arguments: list[str]) -> int:
    run, wants_show = resolve(nano(Path("runs/demo")), arguments)
    if wants_show:
        print(show(run))
        return 0
    console = Console()
    trained = pretrain(run, console)
    if not trained.finished:
        return INTERRUPTED_STATUS
    model = load_checkpoint(run.out / "checkpoint")
    samples = list(continue_heldout(model, trained.tokenizer, trained.heldout))
    for each in samples:
        body = Text.assemble((each.prompt, "dim"), (each.continuation, "bold"))
        console.print(Panel(body, title=f"continued by the model: {each.source}", title_align="left"))
    command = shlex.join(["leadline", "demo", *arguments])
    report = write_run_report(run, model, trained, samples, command)
    console.print(f"checkpoint: {run.out / 'checkpoint'}\nreport:     {report}", highlight=False, soft_wrap=True)
    return 0


def continue_heldout(model: Transformer, tokenizer: Tokenizer, heldout: Shards) -> Iterator[Sample]:
    """Held-out texts cut after some tokens, continued through the cached path."""
    step = max(1, heldout.num_documents // NUM_SAMPLES)
    for number, document in enumerate(range(0, heldout.num_documents, step)):
        if number == NUM_SAMPLES:
            return
        prompt = heldout.tokens(document)[:PROMPT_TOKENS].tolist()[:-1]
        sampling = Sampling(temperature=0.7, top_p=0.95, seed=number)
        stop = frozenset({tokenizer.eos_id})
        new = list(generate(model, prompt, max_tokens=CONTINUATION_TOKENS, sampling=sampling, stop_ids=stop))
        texts = (tokenizer.decode(ids, skip_special=True) for ids in (prompt, new))
        yield Sample(*texts, source=f"held-out text {document + 1} of {heldout.num_documents}")


def write_run_report(run: Run, model: Transformer, trained: Trained, samples: list[Sample], command: str) -> Path:
    """report.html of a finished run."""
    segment = next(single_pass(trained.heldout, trained.tokenizer, run.tokens_per_segment)).segment
    return write_report(
        run.out,
        title="A small DeepSeek-V4, from nothing",
        command=command,
        settings=run,
        config=model.config,
        summary=json.loads((run.out / "summary.json").read_text(encoding="utf8")),
        samples=samples,
        gain=measure_gain(model, segment),
    )
