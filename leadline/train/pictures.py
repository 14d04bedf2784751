"""The pictures of a run's report, as inline SVG that follows the page's colours.

Every function draws one chart and returns SVG for the middle of an HTML page. Matplotlib knows no CSS, so charts are
drawn in placeholder colours, one for each role, and the placeholders become `var(--role)` in the SVG: light and dark
are then a matter of the page's style sheet. Text stays text, in the page's typeface.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from io import StringIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from leadline.train.gain import ResidualGain

Row = Mapping[str, Any]  # one line of metrics.jsonl

ROLES = ("ink", "muted", "grid", "blue", "orange", "green", "purple", "red")
COLOUR = {role: f"#0{number:x}0f0{number:x}" for number, role in enumerate(ROLES, start=1)}
LINES = ("blue", "orange", "green", "purple", "red", "muted")

WIDTH, HEIGHT, TALL = 5.6, 3.1, 3.5  # inches of 72 SVG units; the page scales them
FEW_POINTS = 12  # up to so many points are marked one by one
BINARY_UNITS = ((1 << 20, "M"), (1 << 10, "K"))
DECIMAL_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


# -- numbers of the metrics file ---------------------------------------------------------------------------------


def column(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one number, without the steps that do not have it."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over `window` values around each one, and over those there are near the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    start, stop = np.maximum(0, places - window // 2), np.minimum(len(values), places + window // 2 + 1)
    return (sums[stop] - sums[start]) / (stop - start)


def smoothing_window(num_steps: int) -> int:
    """Steps that a smoothed line averages: a fortieth of the run."""
    return max(1, num_steps // 40)


def first_sparse_step(rows: Sequence[Row]) -> int | None:
    """The step in which CSA first attends to the indexer's picks alone."""
    return next((row["step"] for row in rows if not row["dense"]), None)


def context_label(context: int) -> str:
    """4096 -> 4K, 1048576 -> 1M."""
    for unit, name in BINARY_UNITS:
        if context >= unit and context % unit == 0:
            return f"{context // unit}{name}"
    return f"{context:,}"


def bytes_label(amount: float) -> str:
    """Three digits and a decimal unit: 3.69 GB, 24.5 MB, 100 kB."""
    for unit, name in DECIMAL_UNITS:
        if amount >= 0.9995 * unit:  # else the rounded number would need four digits
            return f"{amount / unit:#.3g}".rstrip(".") + f" {name}"
    return f"{amount:.0f} B"


def _round_bytes_label(amount: float) -> str:
    """A power of ten: 1 GB."""
    unit, name = next(pair for pair in (*DECIMAL_UNITS, (1.0, "B")) if amount >= pair[0])
    return f"{amount / unit:g} {name}"


# -- the charts --------------------------------------------------------------------------------------------------


def loss_curves(rows: Sequence[Row]) -> str:
    """Training losses: next token, and the MTP block's token after it."""
    with _style("loss"):
        figure, axes = _axes("step", "nats per token")
        for name, label, colour in (("loss", "next token", "blue"), ("mtp_loss", "token after next", "orange")):
            steps, values = column(rows, name)
            if name == "mtp_loss" and not values.any():
                continue  # no MTP block, no loss
            _line(axes, steps, values, colour, label, smooth=True)
        _legend(axes)
        return _svg(figure)


def heldout_curve(rows: Sequence[Row], final: float | None) -> str:
    """Bits per byte of held-out text during the run, and of all of it at the end."""
    with _style("heldout"):
        figure, axes = _axes("step", "bits per byte")
        steps, values = column(rows, "heldout_bpb")
        if len(values):
            axes.plot(
                steps, values, color=COLOUR["blue"], marker="o", markersize=3, label="during the run, a part of it"
            )
        if final is not None:
            label = f"at the end, all of it: {final:.3f}"
            axes.plot(rows[-1]["step"], final, "D", color=COLOUR["orange"], markersize=6, label=label)
            axes.axhline(final, color=COLOUR["orange"], linewidth=0.8, linestyle=(0, (2, 3)))
        axes.set_xlim(0, rows[-1]["step"] * 1.03)
        if final is None and not len(values):
            _not_measured(axes)
        _legend(axes)
        return _svg(figure)


def indexer_recall(rows: Sequence[Row]) -> str:
    """Share of the attention mass on entries that the indexer's picks keep."""
    with _style("recall"):
        figure, axes = _axes("step", "recall")
        _dense_part(axes, rows)
        _line(axes, *column(rows, "recall"), "blue", "", smooth=True)
        axes.set_ylim(0, 1.02)
        _legend(axes)
        return _svg(figure)


def indexer_kl(rows: Sequence[Row]) -> str:
    """KL divergence from the attention that the indexer imitates to its own."""
    with _style("kl"):
        figure, axes = _axes("step", "nats")
        _dense_part(axes, rows)
        _line(axes, *column(rows, "index_kl"), "orange", "", smooth=True)
        _from_zero(axes)
        _legend(axes)
        return _svg(figure)


def expert_load(load_LE: np.ndarray, labels: Sequence[str]) -> str:
    """A tile for every expert of every block; the stronger its colour, the more tokens it got."""
    num_blocks, num_experts = load_LE.shape
    strongest = max(2.0, float(load_LE.max()))
    with _style("experts"):
        figure, axes = _axes("expert", "", height=max(1.4, min(6.0, 0.62 + 0.44 * num_blocks)))
        for block, load_E in enumerate(load_LE):
            for expert, load in enumerate(load_E):
                tile = Rectangle((expert + 0.03, block + 0.04), 0.94, 0.92, linewidth=0)
                tile.set(facecolor=COLOUR["blue"], alpha=0.04 + 0.7 * float(load) / strongest)
                axes.add_patch(tile)
                if num_experts <= 16:
                    axes.text(expert + 0.5, block + 0.52, f"{load:.2f}", ha="center", va="center", fontsize=9)
        axes.set(xlim=(0, num_experts), ylim=(num_blocks, 0))
        axes.set_yticks(np.arange(num_blocks) + 0.5, labels)
        shown = np.unique(np.linspace(0, num_experts - 1, min(num_experts, 16)).round())
        axes.set_xticks(shown + 0.5, [f"{expert:.0f}" for expert in shown])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.grid(False)
        return _svg(figure)


def busiest_expert(rows: Sequence[Row], labels: Sequence[str]) -> str:
    """Load of the busiest expert of every block over the steps."""
    with _style("busiest"):
        figure, axes = _axes("step", "times a fair share")
        steps = np.array([row["step"] for row in rows], dtype=float)
        busiest_NL = np.array([[max(load_E) for load_E in row["expert_load"]] for row in rows])
        if len(labels) <= len(LINES):
            for block, label in enumerate(labels):
                values = smoothed(busiest_NL[:, block], smoothing_window(len(rows)))
                _line(axes, steps, values, LINES[block], label, smooth=False)
        else:
            lowest, highest = busiest_NL.min(1), busiest_NL.max(1)
            axes.fill_between(steps, lowest, highest, color=COLOUR["blue"], alpha=0.2, linewidth=0, label="all blocks")
            _line(axes, steps, np.median(busiest_NL, axis=1), "blue", "median block", smooth=True)
        axes.axhline(1.0, color=COLOUR["muted"], linewidth=0.8, linestyle=(0, (2, 3)))
        _from_zero(axes)
        _legend(axes)
        return _svg(figure)


def optimisation(rows: Sequence[Row]) -> str:
    """Learning rate above, gradient norm before clipping below."""
    with _style("optimisation"):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        _line(above, *column(rows, "lr"), "blue", "", smooth=False)
        above.set_ylabel("learning rate")
        _from_zero(above)
        above.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        _line(below, *column(rows, "grad_norm"), "orange", "", smooth=True)
        below.set(xlabel="step", ylabel="gradient norm")
        norms = column(rows, "grad_norm")[1]
        if norms.max() > 10 * norms.min() > 0:
            below.set_yscale("log")
            below.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
            below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            below.yaxis.set_minor_locator(NullLocator())
        else:
            _from_zero(below)
        below.xaxis.set_major_locator(_steps())
        return _svg(figure)


def speed(rows: Sequence[Row]) -> str:
    """Training tokens per second."""
    with _style("speed"):
        figure, axes = _axes("step", "tokens per second")
        _dense_part(axes, rows)
        _line(axes, *column(rows, "tokens_per_second"), "green", "", smooth=True)
        _from_zero(axes)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        _legend(axes)
        return _svg(figure)


def cache_bytes(amounts: Mapping[str, Mapping[int, int]], dashed: Set[str]) -> str:
    """Bytes by context for every name, on two logarithmic axes."""
    with _style("cache"):
        figure, axes = _axes("tokens in the context", "bytes of one sequence", height=TALL)
        for (name, points), colour in zip(amounts.items(), LINES, strict=False):
            style = "--" if name in dashed else "-"
            axes.plot([*points], [*points.values()], color=COLOUR[colour], label=name, linestyle=style)
        axes.set_yscale("log")
        _context_axis(axes, amounts)
        axes.yaxis.set_major_locator(LogLocator(numticks=8))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _round_bytes_label(value)))
        axes.yaxis.set_minor_locator(NullLocator())
        _legend(axes, columns=2)
        return _svg(figure)


def cache_shares(shares: Mapping[str, Mapping[int, float]]) -> str:
    """Share of another layout's bytes by context for every name."""
    with _style("shares"):
        figure, axes = _axes("tokens in the context", "share of V3.2's layout", height=TALL)
        for (name, points), colour in zip(shares.items(), LINES[1:], strict=False):
            axes.plot([*points], [*points.values()], color=COLOUR[colour], label=name, marker="o", markersize=3)
        _context_axis(axes, shares)
        _from_zero(axes)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _legend(axes, columns=2)
        return _svg(figure)


def composite_gain(gain: ResidualGain, name: str) -> str:
    """Both gains of the residual mixing after every sublayer, with and without the projection. name: of the chart."""
    with _style(f"gain-{name}"):
        figure, axes = _axes("sublayer, from the bottom", "composite gain", height=TALL)
        depth = np.arange(1, len(gain.constrained.forward) + 1)
        size = 3.5 if len(depth) <= 2 * FEW_POINTS else 0
        for curve, kind, colour in ((gain.constrained, "mHC", "blue"), (gain.unconstrained, "unconstrained", "orange")):
            line = {"color": COLOUR[colour], "marker": "o", "markersize": size}
            axes.plot(depth, curve.forward, label=f"{kind}, forward", **line)
            axes.plot(depth, curve.backward, label=f"{kind}, backward", linestyle=(0, (4, 2)), **line)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
        largest = max(gain.constrained.largest, gain.unconstrained.largest)
        if largest > 10:
            axes.set_yscale("log")
            axes.set_ylim(bottom=min(0.5, *gain.unconstrained.forward, *gain.unconstrained.backward))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(0, max(2.0, 1.1 * largest))
        _legend(axes, columns=2)
        return _svg(figure)


# -- drawing -----------------------------------------------------------------------------------------------------


def _style(name: str) -> Any:
    """Matplotlib's settings for one chart. The name goes into the identifiers of the SVG, which share a page."""
    ink, muted, grid = COLOUR["ink"], COLOUR["muted"], COLOUR["grid"]
    return mpl.rc_context(
        {
            "svg.fonttype": "none", "svg.hashsalt": name,
            "font.family": "DejaVu Sans", "font.size": 10, "text.color": ink,
            "axes.edgecolor": muted, "axes.labelcolor": muted, "axes.linewidth": 0.8,
            "axes.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False,
            "axes.grid": True, "axes.axisbelow": True, "grid.color": grid, "grid.linewidth": 0.8,
            "xtick.color": muted, "ytick.color": muted, "xtick.labelcolor": muted, "ytick.labelcolor": muted,
            "xtick.labelsize": 9, "ytick.labelsize": 9, "axes.labelsize": 9.5, "legend.fontsize": 9,
            "axes.xmargin": 0.02, "lines.linewidth": 1.7, "lines.solid_capstyle": "round", "figure.facecolor": "none",
        }
    )  # fmt: skip


def _axes(x_label: str, y_label: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.xaxis.set_major_locator(_steps())
    return figure, axes


def _steps() -> MaxNLocator:
    return MaxNLocator(6, integer=True, steps=[1, 2, 5, 10])


def _from_zero(axes: Axes) -> None:
    """Let the axis begin at zero, with room above the highest value."""
    axes.set_ylim(0, 1.04 * axes.get_ylim()[1])


def _context_axis(axes: Axes, lines: Mapping[str, Mapping[int, float]]) -> None:
    """Contexts on a logarithmic axis, every other one with its name."""
    contexts = sorted({context for points in lines.values() for context in points})[::2]
    axes.set_xscale("log")
    axes.set_xticks(contexts, [context_label(context) for context in contexts])
    axes.xaxis.set_minor_locator(NullLocator())


def _line(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str, *, smooth: bool) -> None:
    """One curve; with `smooth`, every step faintly and the running mean on top."""
    if not len(steps):
        _not_measured(axes)
        return
    marker = {"marker": "o", "markersize": 3.5} if len(steps) <= FEW_POINTS else {}
    window = smoothing_window(len(values))
    if smooth and window > 1:
        axes.plot(steps, values, color=COLOUR[colour], linewidth=0.7, alpha=0.35)
        values = smoothed(values, window)
    axes.plot(steps, values, color=COLOUR[colour], label=label or "_unnamed", **marker)


def _not_measured(axes: Axes) -> None:
    """Say why a chart is empty."""
    axes.text(0.5, 0.5, "not measured in this run", ha="center", va="center", transform=axes.transAxes)
    axes.tick_params(labelleft=False)


def _dense_part(axes: Axes, rows: Sequence[Row]) -> None:
    """Shade the steps in which CSA attends to every visible entry; a line where the picks take over."""
    axes.set_xlim(0, rows[-1]["step"] * 1.03)
    border = first_sparse_step(rows)
    first, last = rows[0]["step"], rows[-1]["step"]
    if border is None or border > first:
        end = last if border is None else border
        axes.axvspan(first, end, color=COLOUR["purple"], alpha=0.10, linewidth=0, label="dense warm-up")
    if border is not None and border > first:
        axes.axvline(
            border, color=COLOUR["purple"], linewidth=1, linestyle=(0, (4, 2)), label=f"sparse from step {border}"
        )


def _legend(axes: Axes, columns: int = 3) -> None:
    """Names above the chart, where they cover nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, frameon=False, borderaxespad=0.2,
            handlelength=1.6, columnspacing=1.4, borderpad=0.2,
        )  # fmt: skip


def _svg(figure: Figure) -> str:
    """The figure as SVG for the middle of an HTML page: no prologue, no metadata, roles instead of colours."""
    text = StringIO()
    figure.savefig(text, format="svg", transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)  # its style would apply to the whole page
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    used = set(re.findall(r"#([\w.-]+)", svg))
    # Names of groups repeat in every chart; only what a clip path or a marker refers to needs one.
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"', '<svg aria-hidden="true"', svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", svg)
    for role, colour in COLOUR.items():
        svg = svg.replace(colour, f"var(--{role})")
    return svg
