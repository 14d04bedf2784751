"""The report of a training run: one self-contained HTML page.

    write_report(folder, ...)    metrics.jsonl + the end of the run -> folder/report.html

The page loads nothing: pictures are inline SVG (`train/pictures.py`), the style sheet is inside, and there is no script.
Every number of the summary stands in a `<data value="...">`, exact for a program and rounded for the eye.
"""

from __future__ import annotations

import html
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leadline import __version__
from leadline.cli import show
from leadline.model import accounting, v32
from leadline.model.config import FLASH, PRO, ModelConfig
from leadline.train import pictures
from leadline.train.gain import ResidualGain
from leadline.train.metrics import read_metrics
from leadline.train.pictures import Row, bytes_label, column, context_label, first_sparse_step

CONTEXTS = tuple(4096 << power for power in range(9))  # 4K to 1M, in steps of two
TABLE_CONTEXTS = CONTEXTS[::2]
LAST_SHARE = 10  # "at the end" is the last tenth of the steps
CONTROL_CHARACTERS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


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

    title: heading of the page. command: the command line that makes this run again. settings: the frozen dataclass of the
    run, whose fields become a table. config: shape of the trained model. summary: content of summary.json; a held-out
    number that it lacks is shown as not measured. Raises ReportError if the run has no steps.
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
    body = _header(title, summary, list(sections)) + "<main>\n" + _tiles(config, summary, rows)
    body += "".join(_section(heading, *parts) for heading, parts in sections.items()) + "</main>"
    page = folder / "report.html"
    _write_atomically(page, _page(title, body))
    return page


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _page(title: str, body: str) -> str:
    style = resources.files("leadline.train").joinpath("report.css").read_text(encoding="utf8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>
{style}</style>
</head>
<body>
{body}
<footer>leadline {__version__}. This page is one file and loads nothing.</footer>
</body>
</html>
"""


# -- sections ----------------------------------------------------------------------------------------------------


def _header(title: str, summary: Mapping[str, Any], headings: Sequence[str]) -> str:
    sentence = f"A DeepSeek-V4 of <strong>{_count(summary['parameters'])} parameters</strong>"
    sentence += f", trained from nothing in <strong>{_duration(summary['seconds'])}</strong>"
    sentence += f" on {_count(summary['tokens'])} tokens."
    if summary.get("heldout_bpb") is not None:
        sentence += (
            f" It predicts text it has never seen at <strong>{summary['heldout_bpb']:.3f} bits per byte</strong>."
        )
    links = "".join(f'<a href="#{_anchor(heading)}">{heading}</a>' for heading in headings)
    return f"""<header>
<h1>{_text(title)}</h1>
<p class="lede">{sentence}</p>
<nav aria-label="Sections">{links}</nav>
</header>
"""


def _tiles(config: ModelConfig, summary: Mapping[str, Any], rows: Sequence[Row]) -> str:
    longest = min(config.max_position_embeddings, CONTEXTS[-1])
    cache, plain = accounting.kv_cache_bytes(config, longest), uncompressed_cache_bytes(config, longest)
    measured = column(rows, "recall")[1]
    recall = float(measured[-_last(len(measured)) :].mean()) if len(measured) else None
    losses = column(rows, "loss")[1]
    heldout_note = (
        f"bits per byte, over {_count(summary['heldout_tokens'])} tokens" if "heldout_tokens" in summary else ""
    )
    tiles = [
        _tile("Held-out text", summary.get("heldout_bpb"), "{:.3f}".format, heldout_note),
        _tile(
            "Training loss", float(losses[-_last(len(losses)) :].mean()), "{:.3f}".format, "nats per token, at the end"
        ),
        _tile("Tokens seen", summary["tokens"], _count, f"in {summary['steps']:,} steps"),
        _tile("Time", summary["seconds"], _duration, f"{summary.get('threads', '?')} CPU threads"),
        _tile("Parameters", summary["parameters"], _count, "MTP block included"),
        _tile("Speed", _median(rows, "tokens_per_second"), "{:,.0f}".format, "training tokens per second, median"),
        _tile("Indexer recall", recall, "{:.3f}".format, "of the attention mass, at the end"),
        _tile(f"Cache at {context_label(longest)}", cache / plain, "{:.1%}".format, "of one entry per token and layer"),
    ]
    tiles[0] = tiles[0].replace("<div>", '<div class="first">', 1)
    return f'<section id="numbers" aria-label="Headline numbers"><dl class="tiles">{"".join(tiles)}</dl></section>'


def _learning(config: ModelConfig, summary: Mapping[str, Any], rows: Sequence[Row]) -> tuple[str, str]:
    final = summary.get("heldout_bpb")
    losses = column(rows, "loss")[1]
    heldout = column(rows, "heldout_bpb")[1]
    loss_alt = f"Loss over {len(rows)} steps: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last."
    heldout_alt = f"{len(heldout)} evaluations during the run"
    if len(heldout):
        heldout_alt += f", from {heldout[0]:.3f} to {heldout[-1]:.3f} bits per byte"
    if final is not None:
        heldout_alt += f"; {final:.3f} over all held-out text at the end"
    return "How well the model predicts the next token, on the text it learns from and on text it never sees.", _pair(
        _picture(
            "Training loss",
            pictures.loss_curves(rows),
            loss_alt,
            "Lower is better; the faint line is every step, the strong one a running mean, and a guess among all "
            f"{config.vocab_size:,} ids would cost {np.log(config.vocab_size):.2f} nats.",
        ),
        _picture(
            "Held-out bits per byte",
            pictures.heldout_curve(rows, final),
            heldout_alt + ".",
            "Bits that the model needs for a byte of text it was not trained on: 8 is no compression at all, and the "
            "number does not depend on the tokenizer.",
        ),
    )


def _attention(rows: Sequence[Row]) -> tuple[str, str]:
    border = first_sparse_step(rows)
    recall, kl = column(rows, "recall")[1], column(rows, "index_kl")[1]
    mode = "dense to the end" if border is None else f"sparse from step {border}"
    recall_alt = f"from {recall[0]:.3f} to {recall[-1]:.3f}" if len(recall) else "not measured in this run"
    kl_alt = f"from {kl[0]:.4f} to {kl[-1]:.4f} nats" if len(kl) else "not measured in this run"
    return (
        "In CSA layers an indexer picks the entries that a query attends to. During the dense warm-up, queries attend to "
        "every visible entry while the indexer learns to imitate them; after it, they see its picks alone.",
        _pair(
            _picture(
                "Indexer recall",
                pictures.indexer_recall(rows),
                f"Recall of the indexer, {recall_alt}; attention is {mode}.",
                "The share of the attention on entries that falls on the indexer's picks: 1 means that sparse attention "
                "loses nothing.",
            ),
            _picture(
                "Indexer loss",
                pictures.indexer_kl(rows),
                f"KL loss of the indexer, {kl_alt}; attention is {mode}.",
                "KL divergence from the attention of the queries to the indexer's scores: 0 is a perfect imitation, and the "
                "two parts are not comparable, because the indexer answers for different entries.",
            ),
        ),
    )


def _experts(config: ModelConfig, rows: Sequence[Row]) -> tuple[str, str]:
    load_LE = np.mean([row["expert_load"] for row in rows[-_last(len(rows)) :]], axis=0)
    labels = block_labels(config, len(load_LE))
    block, expert = np.unravel_index(load_LE.argmax(), load_LE.shape)
    busiest = np.array([np.max(row["expert_load"]) for row in rows])
    return (
        f"Each token visits {config.num_experts_per_tok} of {config.n_routed_experts} experts in every block. 1.00 is a fair "
        "share; hash-routed blocks choose by token id, the others by score with a bias that is moved against the load.",
        _pair(
            _picture(
                "Load of every expert, at the end",
                pictures.expert_load(load_LE, labels),
                f"Load by block and expert over the last {_last(len(rows))} steps; the largest is {load_LE.max():.2f} times a "
                f"fair share, at expert {expert} of {labels[block]}, the smallest {load_LE.min():.2f}.",
                f"Mean of the last {_last(len(rows))} steps; a row of equal tiles is a perfectly balanced block.",
            ),
            _picture(
                "Busiest expert",
                pictures.busiest_expert(rows, labels),
                f"Load of the busiest expert of all blocks: {busiest[0]:.2f} at the first step, {busiest[-1]:.2f} at the last, "
                f"{busiest.max():.2f} at most.",
                "The load of each block's busiest expert: 1 is balance, and an expert at 2 does twice its share of the work.",
            ),
        ),
    )


def _optimisation(rows: Sequence[Row]) -> tuple[str, str]:
    lr, norm = column(rows, "lr")[1], column(rows, "grad_norm")[1]
    rate = _median(rows, "tokens_per_second")
    return "", _pair(
        _picture(
            "Learning rate and gradient norm",
            pictures.optimisation(rows),
            f"The learning rate peaks at {lr.max():.4g} and ends at {lr[-1]:.4g}; the gradient norm has a median of "
            f"{np.median(norm):.3g} and a maximum of {norm.max():.3g}.",
            "Above the schedule; below the global gradient norm before clipping, where a spike is a batch that pulled hard.",
        ),
        _picture(
            "Speed",
            pictures.speed(rows),
            f"Training tokens per second: median {rate:,.0f}.",
            "Tokens per second of each update, forward and backward; evaluations are not in it.",
        ),
    )


def uncompressed_cache_bytes(config: ModelConfig, context: int) -> int:
    """The cache this model would have in V3.2's layout: an entry and an index key for every token in every layer, at this
    model's widths and in its formats."""
    return config.num_hidden_layers * context * (accounting.entry_bytes(config) + accounting.index_key_bytes(config))


def _cache(config: ModelConfig) -> tuple[str, str]:
    own = [context for context in CONTEXTS if context <= config.max_position_embeddings] or [CONTEXTS[0]]
    lines = {
        "DeepSeek-V3.2": [(n, v32.kv_cache_bytes(n)) for n in CONTEXTS],
        "V4 Pro": [(n, accounting.kv_cache_bytes(PRO, n)) for n in CONTEXTS],
        "V4 Flash": [(n, accounting.kv_cache_bytes(FLASH, n)) for n in CONTEXTS],
        "this model": [(n, accounting.kv_cache_bytes(config, n)) for n in own],
        "this model in V3.2's layout": [(n, uncompressed_cache_bytes(config, n)) for n in own],
    }
    longest = own[-1]
    share = accounting.kv_cache_bytes(config, longest) / uncompressed_cache_bytes(config, longest)
    last = {name: points[-1][1] for name, points in lines.items()}
    chart = _picture(
        "Cache of one sequence",
        pictures.cache_bytes(lines),
        f"At {context_label(CONTEXTS[-1])} tokens V3.2 needs {bytes_label(last['DeepSeek-V3.2'])}, Pro "
        f"{bytes_label(last['V4 Pro'])} and Flash {bytes_label(last['V4 Flash'])}. This model needs "
        f"{bytes_label(last['this model'])} at {context_label(longest)}, {share:.1%} of V3.2's layout.",
        "Both axes are logarithmic, so a line that lies lower by a constant distance needs a constant share of the memory.",
    )
    text = (
        "Closed forms, in the served formats (FP8 entries, FP4 index keys). V3.2's layout keeps one entry and one index key "
        "for every token in every layer; the dashed line applies it to this model's own widths, so that the distance to it "
        f"is what compression alone saves. This model is made for at most {config.max_position_embeddings:,} tokens."
    )
    return text, f'<div class="pictures single">{chart}</div>{_cache_table(lines)}'


def _cache_table(lines: Mapping[str, Sequence[tuple[int, int]]]) -> str:
    *names, layout = lines
    compared = {name: "DeepSeek-V3.2" for name in ("V4 Pro", "V4 Flash")} | {"this model": layout}
    amounts = {name: dict(points) for name, points in lines.items()}

    def cell(name: str, context: int) -> str:
        if context not in amounts[name]:
            return '<td><span aria-label="longer than the model is made for">–</span></td>'
        amount = amounts[name][context]
        share = ""
        if name in compared:
            share = f'<span class="share">{amount / amounts[compared[name]][context]:.1%}</span>'
        return f"<td>{_data(amount, bytes_label)}{share}</td>"

    heads = "".join(f'<th scope="col">{name}</th>' for name in (*names, layout))
    body = "".join(
        f'<tr><th scope="row">{context_label(n)}</th>{"".join(cell(name, n) for name in (*names, layout))}</tr>'
        for n in TABLE_CONTEXTS
    )
    return (
        '<div class="wide" role="region" aria-label="Cache bytes" tabindex="0"><table><caption>Bytes by context; below, the '
        "share of V3.2, and for this model of V3.2's layout</caption>"
        f'<thead><tr><th scope="col">tokens</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _gain(gain: ResidualGain) -> tuple[str, str]:
    ours, free = gain.constrained, gain.unconstrained
    depth = len(ours.forward)
    text = (
        "The streams are multiplied by a mixing matrix before every sublayer. mHC keeps that matrix doubly stochastic, so "
        "that the product over depth can neither amplify nor damp; the mHC paper reports at most about 1.6, and about 3000 "
        "without the constraint in a deep model. The unconstrained line uses the same learned logits without the projection."
    )
    chart = _picture(
        "Composite gain over depth",
        pictures.composite_gain(gain),
        f"After {depth} sublayers the gain is {ours.forward[-1]:.4f} forward and {ours.backward[-1]:.4f} backward with mHC; "
        f"{free.forward[-1]:.4g} and {free.backward[-1]:.4g} without the constraint.",
        "The most that the mixing of all sublayers up to this one can enlarge a stream (forward) or a gradient (backward), "
        "mean over tokens: 1 is a plain residual connection.",
    )
    table = (
        '<div class="wide"><table><caption>Composite gain after the last sublayer</caption><thead><tr><th scope="col"></th>'
        '<th scope="col">forward</th><th scope="col">backward</th><th scope="col">largest at any depth</th></tr></thead>'
        f"<tbody>{''.join(_gain_row(name, curve) for name, curve in (('mHC', ours), ('unconstrained', free)))}</tbody>"
        "</table></div>"
    )
    return text, f'<div class="pictures single">{chart}</div>{table}'


def _gain_row(name: str, curve: Any) -> str:
    values = (curve.forward[-1], curve.backward[-1], curve.largest)
    cells = "".join(f"<td>{_data(value, '{:.4g}'.format)}</td>" for value in values)
    return f'<tr><th scope="row">{name}</th>{cells}</tr>'


def _samples(samples: Sequence[Sample]) -> tuple[str, str]:
    if not samples:
        return "This run continued no texts.", ""
    blocks = (
        f'<article class="sample"><h3>{_text(sample.source)}</h3><pre><span class="prompt">{_text(sample.prompt)}</span>'
        f'<span class="continuation">{_text(sample.continuation)}</span></pre></article>'
        for sample in samples
    )
    key = (
        'Held-out texts, read from the saved checkpoint through the cached path: <span class="prompt">the prompt is grey</span>, '
        '<span class="continuation">what the model wrote is coloured</span>.'
    )
    return key, "".join(blocks)


def _settings(settings: Any, config: ModelConfig) -> tuple[str, str]:
    run = [line.partition(" = ")[::2] for line in show(settings).splitlines() if not line.startswith("model.")]
    model = [line.partition(" = ")[::2] for line in show(config).splitlines()]
    return "", "".join(
        f"<details{opened}><summary>{label}</summary>{_settings_table(pairs)}</details>"
        for label, pairs, opened in (("The run", run, " open"), ("The model (config.json)", model, ""))
    )


def _settings_table(pairs: Sequence[tuple[str, ...]]) -> str:
    body = "".join(f'<tr><th scope="row">{_text(key)}</th><td>{_text(value)}</td></tr>' for key, value in pairs)
    return f'<table class="settings"><tbody>{body}</tbody></table>'


def _reproduction(command: str, summary: Mapping[str, Any]) -> tuple[str, str]:
    versions = {
        "leadline": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "threads": str(summary.get("threads", "not recorded")),
    }
    return (
        "In a folder where a run was stopped this goes on from there; in an empty one it begins. How many updates fit into "
        f"the minutes depends on the machine: <code>steps={summary['steps']}</code> asks for exactly as many as here.",
        f'<pre class="command"><code>{_text(command)}</code></pre>'
        f'<div class="wide">{_settings_table(tuple(versions.items()))}</div>',
    )


# -- pieces ------------------------------------------------------------------------------------------------------


def block_labels(config: ModelConfig, num_blocks: int) -> list[str]:
    """Names of the rows of expert_load: the trunk's layers, then the MTP blocks."""
    layers = [f"layer {n} (hash)" if config.is_hash_layer(n) else f"layer {n}" for n in range(config.num_hidden_layers)]
    extra = num_blocks - len(layers)
    return [*layers, *(["MTP"] if extra == 1 else [f"MTP {n}" for n in range(extra)])]


def _section(heading: str, text: str, body: str) -> str:
    paragraph = f"<p>{text}</p>" if text else ""
    return f'<section id="{_anchor(heading)}"><h2>{heading}</h2>{paragraph}{body}</section>\n'


def _anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def _pair(*figures: str) -> str:
    return f'<div class="pictures">{"".join(figures)}</div>'


def _picture(heading: str, svg: str, alt: str, caption: str) -> str:
    """A chart with its heading, what it shows in words for those who do not see it, and how to read it."""
    return (
        f'<figure><h3>{_text(heading)}</h3><div role="img" aria-label="{_text(alt)}">{svg}</div>'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _tile(label: str, value: float | None, write: Any, note: str) -> str:
    number = "not measured" if value is None else _data(value, write)
    return f'<div><dt>{_text(label)}</dt><dd class="number">{number}</dd><dd class="note">{_text(note)}</dd></div>'


def _data(value: float, write: Any) -> str:
    return f'<data value="{value!r}">{_text(write(value))}</data>'


def _text(value: str) -> str:
    """Any text for HTML: markup escaped, control characters made visible, what UTF-8 cannot hold replaced."""
    visible = value.translate(CONTROL_CHARACTERS).encode("utf8", "replace").decode("utf8")
    return html.escape(visible)


def _last(count: int) -> int:
    return max(1, count // LAST_SHARE)


def _median(rows: Sequence[Row], name: str) -> float:
    return float(np.median(column(rows, name)[1]))


def _count(amount: float) -> str:
    """1234 -> 1,234; 5120000 -> 5.12M."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if amount >= unit:
            return f"{amount / unit:.2f}{name}"
    return f"{amount:,.0f}"


def _duration(seconds: float) -> str:
    """Hours and minutes, minutes and seconds, or seconds."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60} s"
    return f"{seconds:.1f} s"
