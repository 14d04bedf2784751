"""A folder at a glance: which of the released models it is, what lies in it, what is wrong with it.

Only headers and config.json are read.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from leadline.model.config import CSA_RATIO, FLASH, HCA_RATIO, PRO, ConfigError, ModelConfig
from leadline.weights.contents import Contents
from leadline.weights.expected import expected_shapes
from leadline.weights.header import dtype_name
from leadline.weights.names import is_experts, is_linear, is_mtp
from leadline.weights.stored import FP4, FP8, PLAIN, Stored

ATTENTION = {0: "window", CSA_RATIO: "CSA", HCA_RATIO: "HCA"}
RELEASED = {"Flash": FLASH, "Pro": PRO}
# Fields that a cut-down folder may change and still have the shapes of a released model.
_FREE = {
    "num_hidden_layers", "compress_ratios", "n_routed_experts", "num_experts_per_tok", "num_nextn_predict_layers",
    "torch_dtype", "expert_dtype", "quantization_config", "extra",
}  # fmt: skip
MAX_PROBLEMS = 20
_PRECISION = {
    frozenset({FP4}): "FP4 experts, FP8 linear maps",
    frozenset({FP8}): "FP8 experts and linear maps",
    frozenset({PLAIN}): "not quantised",
}

# Parts of a block, the first pattern that matches names the part.
_PARTS = (
    ("indexer", r"attn\.indexer\."),
    ("compressor", r"attn\.compressor\."),
    ("attention", r"attn\."),
    ("routed experts", r"ffn\.experts\."),
    ("shared expert", r"ffn\.shared_experts\."),
    ("router", r"ffn\.gate\."),
    ("hyper-connections", r"hc_"),
    ("norms", r"(attn|ffn)_norm\."),
    ("entrance and exit", r""),
)


@dataclass(frozen=True)
class Node:
    """A line of the tree. tensors: in the files, scales counted with their codes; parameters: values, four-bit ones
    unpacked; dtypes: of the tensors, with their scales."""

    label: str
    tensors: int
    parameters: int
    num_bytes: int
    dtypes: tuple[str, ...]
    children: tuple[Node, ...] = field(default=())


@dataclass(frozen=True)
class Summary:
    """What `leadline weights inspect` shows. total: the tree; variant: one line; problems: one line each."""

    folder: Path
    variant: str
    naming: str
    total: Node
    problems: tuple[str, ...]


def summarise(folder: str | Path) -> Summary:
    """Read the headers of a folder; errors as those of `Contents` and `ModelConfig.from_file`."""
    contents, config = Contents(folder), ModelConfig.from_file(folder)
    return Summary(
        contents.folder, variant(config, contents), contents.naming, tree(contents), tuple(problems(config, contents))
    )


def variant(config: ModelConfig, contents: Contents) -> str:
    """Which of the released models a folder has the widths and formats of."""
    experts = {stored.format for ours in contents.shapes if is_experts(ours) for stored in contents.stored(ours)}
    scales = {dtype_name(stored.scale_dtype) for stored in _all_stored(contents) if stored.scale_dtype is not None}
    precision = _PRECISION.get(frozenset(experts), "experts in several formats")
    if scales:
        precision += f", {' and '.join(sorted(scales))} scales"
    size = next((name for name, released in RELEASED.items() if _has_widths(config, released)), None)
    if size is None:
        return f"DeepSeek-V4 of widths never released: {precision}"
    name = (
        f"DeepSeek-V4-{size}" + ("-Base" if experts == {FP8} else "") + ("-DSpark" if config.has_draft_stages else "")
    )
    whole = RELEASED[size]
    layers, experts_found = config.num_hidden_layers, config.n_routed_experts
    if (layers, experts_found) == (whole.num_hidden_layers, whole.n_routed_experts):
        return f"{name}: {precision}"
    return (
        f"{name}: {precision}; {layers} of its {whole.num_hidden_layers} layers, "
        f"{experts_found} of its {whole.n_routed_experts} experts"
    )


def _has_widths(config: ModelConfig, released: ModelConfig) -> bool:
    fields = (f.name for f in dataclasses.fields(config) if f.name not in _FREE)
    return all(getattr(config, name) == getattr(released, name) for name in fields)


def tree(contents: Contents) -> Node:
    """The tensors of a folder as a tree; layers of one kind are one line."""
    names = list(contents.shapes)
    layers = sorted({int(name.split(".")[1]) for name in names if name.startswith("layers.")})
    kinds = {layer: _kind(layer, contents) for layer in layers}
    groups = [
        _group("embedding", [n for n in names if n == "embed.weight"], contents),
        *(
            _block(f"{_numbers(members)}: {kind}", [f"layers.{layer}." for layer in members], contents)
            for kind, members in _grouped(layers, kinds.__getitem__)
        ),
        _group("head", [n for n in names if n.split(".")[0] in ("hc_head", "norm", "head")], contents),
        *(
            _block(f"mtp {stage}", [f"mtp.{stage}."], contents)
            for stage in sorted({int(name.split(".")[1]) for name in names if is_mtp(name)})
        ),
    ]
    return _sum("total", [group for group in groups if group.tensors])


def problems(config: ModelConfig, contents: Contents) -> list[str]:
    """Where tensors and config.json disagree, and where the formats are not those of one release."""
    found: list[str] = []
    try:
        expected = expected_shapes(config)
    except ConfigError as error:
        return [str(error)]
    for name in expected.keys() | contents.shapes.keys():
        wanted, there = expected.get(name), contents.shapes.get(name)
        if there is None:
            found.append(f"{name} {list(wanted or ())} is missing")
        elif wanted is None:
            found.append(f"{name} {list(there)} is not in a model of this config.json")
        elif wanted != there:
            found.append(f"{name} is {list(there)}, config.json asks for {list(wanted)}")
    found.sort()
    found += _format_problems(config, contents)
    if len(found) > MAX_PROBLEMS:
        found[MAX_PROBLEMS:] = [f"and {len(found) - MAX_PROBLEMS} more"]
    return found


def _format_problems(config: ModelConfig, contents: Contents) -> Iterator[str]:
    quantised = config.quantization_config is not None
    for what, chosen, announced in (
        ("experts", is_experts, config.expert_dtype if quantised else PLAIN),
        ("linear maps", is_linear, FP8 if quantised else PLAIN),
    ):
        names: dict[str, str] = {}  # one tensor of each format
        for ours in filter(chosen, contents.shapes):
            for stored in contents.stored(ours):
                names.setdefault(stored.format, stored.name)
        if len(names) > 1:
            yield f"{what} have several formats: " + ", ".join(f"{names[form]} is {form}" for form in sorted(names))
        elif announced is not None and names and announced not in names:
            form, name = next(iter(names.items()))
            yield f"config.json announces {announced} {what}, {name} is {form}"


def _all_stored(contents: Contents) -> Iterable[Stored]:
    return itertools.chain.from_iterable(map(contents.stored, contents.shapes))


def _kind(layer: int, contents: Contents) -> str:
    has = {
        name: f"layers.{layer}.{name}" in contents.shapes
        for name in ("attn.indexer.wq_b.weight", "attn.compressor.ape")
    }
    ratio = CSA_RATIO if has["attn.indexer.wq_b.weight"] else HCA_RATIO if has["attn.compressor.ape"] else 0
    hashed = f"layers.{layer}.ffn.gate.tid2eid" in contents.shapes
    return f"{ATTENTION[ratio]}, {'hash' if hashed else 'score'}"


def _grouped(layers: Sequence[int], kind: Callable[[int], str]) -> list[tuple[str, list[int]]]:
    groups: dict[str, list[int]] = {}
    for layer in layers:
        groups.setdefault(kind(layer), []).append(layer)
    return list(groups.items())


def _numbers(layers: Sequence[int]) -> str:
    """Layer numbers in few words: `layers 3, 5 .. 41`."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if len(layers) < 4:
        return f"layers {', '.join(map(str, layers))}"
    return f"layers {layers[0]}, {layers[1]} .. {layers[-1]}"


def _block(label: str, prefixes: Sequence[str], contents: Contents) -> Node:
    members: dict[str, list[str]] = {part: [] for part, _ in _PARTS}
    for name in contents.shapes:
        for prefix in prefixes:
            if name.startswith(prefix):
                inside = name.removeprefix(prefix)
                members[next(part for part, pattern in _PARTS if re.match(pattern, inside))].append(name)
    parts = (_group(part, names, contents) for part, names in members.items())
    return _sum(label, [part for part in parts if part.tensors])


def _group(label: str, names: Sequence[str], contents: Contents) -> Node:
    # A file tensor that fuses two of ours counts once.
    stored = {entry.name: entry for ours in names for entry in contents.stored(ours)}.values()
    return Node(
        label,
        sum(1 if entry.scale is None else 2 for entry in stored),
        sum(math.prod(contents.shapes[ours]) for ours in names),
        sum(entry.num_bytes for entry in stored),
        tuple(sorted({_dtypes(entry) for entry in stored})),
    )


def _dtypes(stored: Stored) -> str:
    if stored.scale_dtype is None:
        return dtype_name(stored.dtype)
    return f"{stored.format.upper()}/{dtype_name(stored.scale_dtype).removeprefix('F8_')}"


def _sum(label: str, children: Sequence[Node]) -> Node:
    return Node(
        label,
        sum(child.tensors for child in children),
        sum(child.parameters for child in children),
        sum(child.num_bytes for child in children),
        tuple(sorted({dtype for child in children for dtype in child.dtypes})),
        tuple(children),
    )
