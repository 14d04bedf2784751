"""Train a small DeepSeek-V4 on real text from nothing, and look at it.

usage: leadline demo [minutes=5] [data=DIR|FILE] [out=runs/demo] [key=value ...] [--show]

Gathers text (the Python standard library and its documentation, or any folder with data=), trains a byte-level tokenizer and
a `nano` model with every part of DeepSeek-V4 for about `minutes`, saves a checkpoint in the official layout, loads it
again, continues a few held-out texts through the cached path, and writes out/report.html.

Ctrl-C saves; the same command continues to exactly the result that an uninterrupted run would have reached.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from leadline.cli import resolve, show
from leadline.data.shards import Shards
from leadline.engine.generate import Sampling, generate
from leadline.model.accounting import kv_cache_bytes
from leadline.model.segment import Segment
from leadline.model.transformer import Transformer
from leadline.recipes.nano import nano
from leadline.text.tokenizer import Tokenizer
from leadline.train.gain import measure_gain
from leadline.train.pretrain import Trained, pretrain
from leadline.train.report import Sample, write_report
from leadline.weights.load import load_checkpoint

PROMPTS = 3
PROMPT_TOKENS = 96
CONTINUATION_TOKENS = 96
EOS_AND_BOS_END_A_TEXT = 2


def main(arguments: list[str]) -> int:
    run, wants_show = resolve(nano(Path("runs/demo")), arguments)
    if wants_show:
        print(show(run))
        return 0
    console = Console()
    trained = pretrain(run, console)
    if not trained.finished:
        return 130
    model = load_checkpoint(run.out / "checkpoint")
    samples = continue_heldout(model, trained.tokenizer, trained.heldout)
    for each in samples:
        console.print(Panel(Text.assemble((each.prompt, "dim"), (each.continuation, "bold")), title=each.source))
    report = write_run_report(run.out, model, trained, samples)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)
    return 0
