"""The report of a training run: metrics.jsonl and the end of the run become one HTML page, report.html.

`write_report` is the outline of the page. Each section is one function that returns its introduction and its body;
charts are drawn in `train/pictures.py`, HTML is made in `train/page.py`.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leadline import __version__
from leadline.model import accounting, v32
from leadline.model.config import FLASH, PRO, ModelConfig
from leadline.train import page, pictures
from leadline.train.atomic import write_text
from leadline.train.gain import Curve, ResidualGain, gain_under_drift
from leadline.train.metrics import read_metrics
from leadline.train.pictures import Row, bytes_label, column, context_label, first_sparse_step

Parts = tuple[str, str]  # introduction and body of a section

CONTEXTS = tuple(4096 << power for power in range(9))  # 4K to 1M
CONTEXTS_IN_TABLE = CONTEXTS[::2]
DRIFT = 0.3  # standard deviation of the logits' drift in the synthetic gain
V32, THIS_MODEL, V32_LAYOUT = "DeepSeek-V3.2", "this model", "this model in V3.2's layout"


class ReportError(ValueError):
    """A run folder that no report can be made from; one line that names the file."""


@dataclass(frozen=True)
class Sample:
    """A text that the model continued. source: where the prompt is from."""

    prompt: str
    continuation: str
    source: str


def write_report(
    folder: Path,
    *,
    title: str,
    command: str,
    settings: Any,
    config: ModelConfig,
    summary: Mapping[str, Any],
    samples: Sequence[Sample],
    gain: ResidualGain,
) -> Path:
    """Write folder/report.html from folder/metrics.jsonl; an older page stays until the new one is complete.

    title: heading of the page. command: the command line of this run. settings: the frozen dataclass of the run, whose
    fields become a table. config: shape of the trained model. summary: content of summary.json; a held-out number that
    it lacks is shown as not measured. Raises ReportError if the run has no steps.
    """
    metrics = folder / "metrics.jsonl"
    rows = list(read_metrics(metrics)) if metrics.exists() else []
    if not rows:
        raise ReportError(f"{metrics}: holds no steps; a report needs a run of at least one step")
    sections = {
        "Learning": _learning(config, summary, rows),
        "Sparse attention": _attention(rows),
        "Experts": _experts(config, rows),
        "Optimisation and speed": _optimisation(rows),
        "KV cache": _cache(config),
        "Residual mixing": _gain(gain),
        "Samples": _samples(samples),
        "Settings": _settings(settings, config),
        "Run it again": _reproduction(command, summary),
    }
    body = _header(title, summary, list(sections)) + "<main>\n" + _headline(config, summary, rows)
    body += "".join(page.section(heading, *parts) for heading, parts in sections.items()) + "</main>"
    footer = f"leadline {__version__}. This page is one file and loads nothing."
    path = folder / "report.html"
    write_text(path, page.document(title, body, footer))
    return path


# -- sections, in their order on the page ------------------------------------------------------------------------


def _header(title: str, summary: Mapping[str, Any], headings: Sequence[str]) -> str:
    sentence = (
        f"A DeepSeek-V4 of <strong>{_count(summary['parameters'])} parameters</strong>, trained from nothing in "
        f"<strong>{_duration(summary['seconds'])}</strong> on {_count(summary['tokens'])} tokens."
    )
    heldout = summary.get("heldout_bpb")
    if heldout is not None:
        sentence += f" It predicts text it has never seen at <strong>{heldout:.3f} bits per byte</strong>."
    return page.header(title, sentence, headings)


def _headline(config: ModelConfig, summary: Mapping[str, Any], rows: Sequence[Row]) -> str:
    heldout, scored = summary.get("heldout_bpb"), summary.get("heldout_tokens")
    recall = column(rows, "recall")[1]
    longest = _own_contexts(config)[-1]
    share = accounting.kv_cache_bytes(config, longest) / uncompressed_cache_bytes(config, longest)
    speed = _median(rows, "tokens_per_second")

    def tile(label: str, value: float | None, write: Any, note: str) -> str:
        return page.tile(label, "not measured" if value is None else page.number(value, write), note)

    return page.tiles(
        [
            tile(
                "Held-out text",
                heldout,
                "{:.3f}".format,
                f"bits per byte of {_count(scored)} tokens" if scored else "bits per byte",
            ),
            tile("Training loss", _end(column(rows, "loss")[1]), "{:.3f}".format, "nats per token, at the end"),
            tile("Tokens seen", summary["tokens"], _count, f"in {summary['steps']:,} steps"),
            tile("Time", summary["seconds"], _duration, f"CPU threads: {summary.get('threads', 'not recorded')}"),
            tile("Parameters", summary["parameters"], _count, "MTP block included"),
            tile("Speed", speed, "{:,.0f}".format, "tokens per second, median"),
            tile("Indexer recall", _end(recall), "{:.3f}".format, "of the attention, at the end"),
            tile(f"Cache at {context_label(longest)}", share, "{:.1%}".format, "of V3.2's layout"),
        ]
    )


def _learning(config: ModelConfig, summary: Mapping[str, Any], rows: Sequence[Row]) -> Parts:
    final = summary.get("heldout_bpb")
    losses, heldout = column(rows, "loss")[1], column(rows, "heldout_bpb")[1]
    guess = log(config.vocab_size)
    heldout_alt = f"{len(heldout)} evaluations of held-out text during the run"
    if len(heldout):
        heldout_alt += f", from {heldout[0]:.3f} to {heldout[-1]:.3f} bits per byte"
    if final is not None:
        heldout_alt += f"; {final:.3f} over all of it at the end"
    return "How well the model predicts the next token: of the text it learns from, and of text it never sees.", (
        page.side_by_side(
            page.picture(
                "Training loss",
                pictures.loss_curves(rows),
                f"Loss over {len(rows)} steps: {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last.",
                "Lower is better; the faint line is every step, the strong one a running mean, and a blind guess among "
                f"the {config.vocab_size:,} ids would cost {guess:.2f} nats.",
            ),
            page.picture(
                "Held-out bits per byte",
                pictures.heldout_curve(rows, final),
                f"{heldout_alt}.",
                "The bits that the model needs for one byte of text it was not trained on: 8 is no compression at all, "
                "and the number does not depend on the tokenizer.",
            ),
        )
    )


def _attention(rows: Sequence[Row]) -> Parts:
    border = first_sparse_step(rows)
    recall, kl = column(rows, "recall")[1], column(rows, "index_kl")[1]
    mode = "attention is dense to the end" if border is None else f"attention is sparse from step {border}"
    recall_alt = f"from {recall[0]:.3f} to {recall[-1]:.3f}" if len(recall) else "not measured in this run"
    kl_alt = f"from {kl[0]:.4f} to {kl[-1]:.4f} nats" if len(kl) else "not measured in this run"
    introduction = (
        "In CSA layers an indexer picks the entries that a query attends to. During the dense warm-up queries attend "
        "to every visible entry while the indexer learns to imitate them; after it they see its picks alone."
    )
    return introduction, page.side_by_side(
        page.picture(
            "Indexer recall",
            pictures.indexer_recall(rows),
            f"Recall of the indexer, {recall_alt}; {mode}.",
            "Of the attention that a query would give to all entries, the share that falls on the indexer's picks: at "
            "1 sparse attention loses nothing (measured where a query sees more entries than it may pick).",
        ),
        page.picture(
            "Indexer loss",
            pictures.indexer_kl(rows),
            f"KL divergence of the indexer, {kl_alt}; {mode}.",
            "Divergence of the indexer's scores from the attention they imitate, where 0 is perfect; it is taken over "
            "all visible entries while dense and over the picks afterwards, so the two parts do not compare.",
        ),
    )


def _experts(config: ModelConfig, rows: Sequence[Row]) -> Parts:
    last = _last_steps(len(rows))
    load_LE = np.mean([row["expert_load"] for row in rows[-last:]], axis=0)
    labels = block_labels(config, len(load_LE))
    when = "in the last step" if last == 1 else f"in the last {last} steps"
    block, expert = np.unravel_index(load_LE.argmax(), load_LE.shape)
    busiest = np.array([np.max(row["expert_load"]) for row in rows])
    introduction = (
        f"A token visits {config.num_experts_per_tok} of {config.n_routed_experts} experts in every block. Hash-routed "
        "blocks choose them by token id, the others by score with a bias that is moved against the load. 1 is a fair "
        "share."
    )
    return introduction, page.side_by_side(
        page.picture(
            "Load of every expert",
            pictures.expert_load(load_LE, labels),
            f"Load by block and expert, mean {when}. The largest is {load_LE.max():.2f} times a fair share, "
            f"at expert {expert} of {labels[block]}; the smallest is {load_LE.min():.2f}.",
            f"Mean {when}, in fair shares; a row of equal tiles is a balanced block.",
        ),
        page.picture(
            "Busiest expert",
            pictures.busiest_expert(rows, labels),
            f"Load of the busiest expert: {busiest[0]:.2f} fair shares in the first step, {busiest[-1]:.2f} in the "
            f"last, {busiest.max():.2f} at most.",
            "The busiest expert of each block; 1 is balance, and at 2 it does twice its share of the work.",
        ),
    )


def _optimisation(rows: Sequence[Row]) -> Parts:
    lr, norm = column(rows, "lr")[1], column(rows, "grad_norm")[1]
    return "What the updates did, and what they cost in time.", page.side_by_side(
        page.picture(
            "Learning rate and gradient norm",
            pictures.optimisation(rows),
            f"The learning rate is {lr.max():.4g} at its peak and {lr[-1]:.4g} at the end. The gradient norm has a "
            f"median of {np.median(norm):.3g} and a maximum of {norm.max():.3g}.",
            "Above the schedule; below the norm of all gradients before clipping, where a spike is a batch that pulled "
            "hard.",
        ),
        page.picture(
            "Speed",
            pictures.speed(rows),
            f"Training tokens per second: median {_median(rows, 'tokens_per_second'):,.0f}.",
            "Tokens per second of each update, forward and backward; evaluations are not in it.",
        ),
    )


def _cache(config: ModelConfig) -> Parts:
    own = _own_contexts(config)
    amounts = {
        V32: {n: v32.kv_cache_bytes(n) for n in CONTEXTS},
        "V4 Pro": {n: accounting.kv_cache_bytes(PRO, n) for n in CONTEXTS},
        "V4 Flash": {n: accounting.kv_cache_bytes(FLASH, n) for n in CONTEXTS},
        THIS_MODEL: {n: accounting.kv_cache_bytes(config, n) for n in own},
        V32_LAYOUT: {n: uncompressed_cache_bytes(config, n) for n in own},
    }
    compared = {"V4 Pro": V32, "V4 Flash": V32, THIS_MODEL: V32_LAYOUT}
    shares = {name: {n: amounts[name][n] / amounts[of][n] for n in amounts[name]} for name, of in compared.items()}
    introduction = (
        "Closed forms, in the served formats (FP8 entries, FP4 index keys). V3.2's layout keeps one entry and one "
        "index key for every token in every layer; the dashed line applies it to this model's own widths, so that what "
        f"lies between the two is compression alone. This model is made for at most {config.max_position_embeddings:,} "
        "tokens."
    )
    first, last, longest = context_label(CONTEXTS[0]), context_label(CONTEXTS[-1]), own[-1]
    charts = page.side_by_side(
        page.picture(
            "Cache of one sequence",
            pictures.cache_bytes(amounts, dashed={V32_LAYOUT}),
            f"Bytes by context from {first} to {last} tokens. At {last}: "
            + ", ".join(f"{name} {bytes_label(amounts[name][CONTEXTS[-1]])}" for name in (V32, "V4 Pro", "V4 Flash"))
            + f". This model: {bytes_label(amounts[THIS_MODEL][longest])} at {context_label(longest)}.",
            "Both axes are logarithmic: a line that lies lower by a constant distance needs a constant share of the "
            "memory.",
        ),
        page.picture(
            "Share of V3.2's layout",
            pictures.cache_shares(shares),
            "; ".join(f"{name} {list(points.values())[-1]:.1%}" for name, points in shares.items())
            + " at the right end.",
            "Cache in percent of V3.2's, and for this model of its own widths in V3.2's layout; the window, which has "
            "a fixed size, is what weighs at the left.",
        ),
    )
    return introduction, charts + _cache_table(amounts, shares)


def _cache_table(amounts: Mapping[str, Mapping[int, int]], shares: Mapping[str, Mapping[int, float]]) -> str:
    def cell(name: str, context: int) -> str:
        if context not in amounts[name]:
            return '<span class="share">beyond its length</span>'
        share = f'<span class="share">{shares[name][context]:.1%}</span>' if name in shares else ""
        return page.number(amounts[name][context], bytes_label) + share

    return page.table(
        "Cache of one sequence by context, with its share of V3.2's layout",
        ["tokens", *amounts],
        [(context_label(n), [cell(name, n) for name in amounts]) for n in CONTEXTS_IN_TABLE],
    )


def _gain(gain: ResidualGain) -> Parts:
    drift = gain_under_drift(DRIFT)
    introduction = (
        "Before every sublayer the streams are multiplied by a mixing matrix. mHC keeps it doubly stochastic, so that "
        "the product over depth can hardly amplify anything: at most about 1.6 times in the mHC paper's 27B model, "
        "against about 3000 times without the constraint. The unconstrained lines are the same logits without the "
        "projection: what it removes from this model. Training without it keeps the sums smaller (decision 0003)."
    )

    def alt(measured: ResidualGain) -> str:
        ours, free = measured.constrained, measured.unconstrained
        return (
            f"After {len(ours.forward)} sublayers the gain is {ours.forward[-1]:.3f} forward and "
            f"{ours.backward[-1]:.3f} backward with mHC, {free.forward[-1]:.4g} and {free.backward[-1]:.4g} "
            "unconstrained."
        )

    charts = page.side_by_side(
        page.picture(
            "Composite gain, this model",
            pictures.composite_gain(gain, "this-model"),
            alt(gain),
            "The most that the mixing of all sublayers so far can enlarge a stream (forward) or a gradient (backward), "
            "mean over the tokens of held-out text; 1 is a plain residual connection.",
        ),
        page.picture(
            "Composite gain, 64 random sublayers",
            pictures.composite_gain(drift, "drift"),
            alt(drift),
            "Synthetic, to show what depth does: the same measurement on logits that left their start by random "
            f"numbers of standard deviation {DRIFT}.",
        ),
    )
    named = {"this model, mHC": gain.constrained, "this model, unconstrained": gain.unconstrained}
    named |= {"64 random, mHC": drift.constrained, "64 random, unconstrained": drift.unconstrained}
    return introduction, charts + page.table(
        "Composite gain", ["", "sublayers", "forward", "backward", "largest at any depth"],
        [(name, _gain_cells(curve)) for name, curve in named.items()],
    )  # fmt: skip


def _gain_cells(curve: Curve) -> list[str]:
    values = (curve.forward[-1], curve.backward[-1], curve.largest)
    return [str(len(curve.forward)), *(page.number(value, _gain_label) for value in values)]


def _samples(samples: Sequence[Sample]) -> Parts:
    if not samples:
        return "This run continued no texts.", ""
    blocks = "".join(page.continued(sample.source, sample.prompt, sample.continuation) for sample in samples)
    return "Held-out texts, continued by the saved checkpoint through the cached path.", page.CONTINUED_KEY + blocks


def _settings(settings: Any, config: ModelConfig) -> Parts:
    run = [(name, value) for name, value in _pairs(settings) if not name.startswith("model.")]
    return "", page.settings("The run", run, folded=False) + page.settings("The model", _pairs(config), folded=True)


def _reproduction(command: str, summary: Mapping[str, Any]) -> Parts:
    introduction = (
        "In a folder where a run was stopped this command goes on from there, in an empty one it begins. How many "
        f"updates fit into the minutes depends on the machine; steps={summary['steps']} asks for exactly as many as "
        "here."
    )
    versions = [
        ("leadline", __version__),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"),
        ("threads", str(summary.get("threads", "not recorded"))),
    ]
    return introduction, page.command(command) + page.settings("Made with", versions, folded=False)


# -- numbers -----------------------------------------------------------------------------------------------------


def uncompressed_cache_bytes(config: ModelConfig, context: int) -> int:
    """The cache this model would have in V3.2's layout, at its own widths and in its own formats: layers n (entry +
    index key)."""
    return config.num_hidden_layers * context * (accounting.entry_bytes(config) + accounting.index_key_bytes(config))


def block_labels(config: ModelConfig, num_blocks: int) -> list[str]:
    """Names of the rows of expert_load: the trunk's layers, then the MTP blocks."""
    layers = [f"layer {n} (hash)" if config.is_hash_layer(n) else f"layer {n}" for n in range(config.num_hidden_layers)]
    extra = num_blocks - len(layers)
    return [*layers, *(["MTP"] if extra == 1 else [f"MTP {n}" for n in range(extra)])]


def _own_contexts(config: ModelConfig) -> list[int]:
    """The contexts that the model is made for, or its longest one if that is shorter than all of them."""
    longest = config.max_position_embeddings
    return [context for context in CONTEXTS if context <= longest] or [longest]


def _pairs(config: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Fields of a configuration under the keys of the command line, and their values."""
    pairs = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            pairs += _pairs(value, f"{prefix}{field.name}.")
        else:
            pairs.append((f"{prefix}{field.name}", str(value)))
    return pairs


def _last_steps(count: int) -> int:
    """How many steps are "at the end": a tenth."""
    return max(1, count // 10)


def _end(values: np.ndarray) -> float | None:
    return float(values[-_last_steps(len(values)) :].mean()) if len(values) else None


def _median(rows: Sequence[Row], name: str) -> float:
    return float(np.median(column(rows, name)[1]))


def _count(amount: float) -> str:
    """1,234 or 5.12M."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if amount >= unit:
            return f"{amount / unit:.2f}{name}"
    return f"{amount:,.0f}"


def _duration(seconds: float) -> str:
    """Hours and minutes, minutes and seconds, or seconds."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{seconds:.1f} s"


def _gain_label(value: float) -> str:
    """Three decimals, or a power of ten from a million."""
    return f"{value:,.3f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"
