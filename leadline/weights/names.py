"""Our tensor names and the published ones, as one table.

Three namings are in use:

- *official*: the released files. One tensor per expert matrix.
- *transformers*: the parameters of transformers 5.23's `DeepseekV4ForCausalLM`. Experts are stacked, and the gate and
  up matrices of all experts are one tensor `gate_up_proj` [E, 2F, D].
- *transformers_saved*: what its `save_pretrained` writes by default, a mixture of the two that it makes from a model it
  created itself or loaded under official names. (From one loaded under transformers' names it makes another mixture,
  which is not read here: save such a model with `save_original_format=False`.) transformers has no MTP block.

Our model has the official names, except that the experts of a layer are stacked ([E, ...]) and that a hyper-connection
is a module (`hc_attn.fn` for `hc_attn_fn`).

The refresh of June 2026 (DSpark) puts three draft stages in the place of the MTP block, `mtp.0` to `mtp.2`
(`model/dspark.py`).

A quantised tensor has its scales beside it (`stored.py`): the official `X.weight` has `X.scale`, transformers' `NAME`
has `NAME_scale_inv`.

`TABLE` has one row per kind of tensor; `{layer}` and `{expert}` stand for numbers. A file tensor whose pattern occurs
in two rows holds both of our tensors, one after the other along dimension 1, in the order of the rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

NAMINGS = ("official", "transformers", "transformers_saved")

# Tensors of one block: our name, and the name inside a layer of transformers. The official name is ours, except:
_OFFICIAL_DIFFERS = {
    "hc_attn.fn": "hc_attn_fn",
    "hc_attn.base": "hc_attn_base",
    "hc_attn.scale": "hc_attn_scale",
    "hc_ffn.fn": "hc_ffn_fn",
    "hc_ffn.base": "hc_ffn_base",
    "hc_ffn.scale": "hc_ffn_scale",
    "hc_head.fn": "hc_head_fn",
    "hc_head.base": "hc_head_base",
    "hc_head.scale": "hc_head_scale",
    "ffn.experts.w1": "ffn.experts.{expert}.w1.weight",
    "ffn.experts.w2": "ffn.experts.{expert}.w2.weight",
    "ffn.experts.w3": "ffn.experts.{expert}.w3.weight",
}
_BLOCK = (
    ("hc_attn.fn", "attn_hc.fn"),
    ("hc_attn.base", "attn_hc.base"),
    ("hc_attn.scale", "attn_hc.scale"),
    ("attn_norm.weight", "input_layernorm.weight"),
    ("attn.wq_a.weight", "self_attn.q_a_proj.weight"),
    ("attn.q_norm.weight", "self_attn.q_a_norm.weight"),
    ("attn.wq_b.weight", "self_attn.q_b_proj.weight"),
    ("attn.wkv.weight", "self_attn.kv_proj.weight"),
    ("attn.kv_norm.weight", "self_attn.kv_norm.weight"),
    ("attn.attn_sink", "self_attn.sinks"),
    ("attn.wo_a.weight", "self_attn.o_a_proj.weight"),
    ("attn.wo_b.weight", "self_attn.o_b_proj.weight"),
    ("attn.compressor.ape", "self_attn.compressor.position_bias"),
    ("attn.compressor.wkv.weight", "self_attn.compressor.kv_proj.weight"),
    ("attn.compressor.wgate.weight", "self_attn.compressor.gate_proj.weight"),
    ("attn.compressor.norm.weight", "self_attn.compressor.kv_norm.weight"),
    ("attn.indexer.wq_b.weight", "self_attn.compressor.indexer.q_b_proj.weight"),
    ("attn.indexer.weights_proj.weight", "self_attn.compressor.indexer.scorer.weights_proj.weight"),
    ("attn.indexer.compressor.ape", "self_attn.compressor.indexer.position_bias"),
    ("attn.indexer.compressor.wkv.weight", "self_attn.compressor.indexer.kv_proj.weight"),
    ("attn.indexer.compressor.wgate.weight", "self_attn.compressor.indexer.gate_proj.weight"),
    ("attn.indexer.compressor.norm.weight", "self_attn.compressor.indexer.kv_norm.weight"),
    ("hc_ffn.fn", "ffn_hc.fn"),
    ("hc_ffn.base", "ffn_hc.base"),
    ("hc_ffn.scale", "ffn_hc.scale"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("ffn.gate.weight", "mlp.gate.weight"),
    ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    ("ffn.gate.tid2eid", "mlp.gate.tid2eid"),
    ("ffn.experts.w1", "mlp.experts.gate_up_proj"),
    ("ffn.experts.w3", "mlp.experts.gate_up_proj"),
    ("ffn.experts.w2", "mlp.experts.down_proj"),
    ("ffn.shared_experts.w1.weight", "mlp.shared_experts.gate_proj.weight"),
    ("ffn.shared_experts.w3.weight", "mlp.shared_experts.up_proj.weight"),
    ("ffn.shared_experts.w2.weight", "mlp.shared_experts.down_proj.weight"),
)
# In a block, `save_pretrained` writes the official names, except:
_SAVED_DIFFERS = {"attn.kv_norm.weight": "attn.norm.weight"}

# Tensors outside the layers: ours, transformers, transformers_saved.
_ENDS = (
    ("embed.weight", "model.embed_tokens.weight", "model.embed_tokens.weight"),
    ("norm.weight", "model.norm.weight", "model.norm.weight"),
    ("hc_head.fn", "model.hc_head.hc_fn", "model.hc_head.hc_fn"),
    ("hc_head.base", "model.hc_head.hc_base", "model.hc_head.hc_base"),
    ("hc_head.scale", "model.hc_head.hc_scale", "model.hc_head.hc_scale"),
    ("head.weight", "lm_head.weight", "head.weight"),
)

# What an MTP block has beside the tensors of any block. transformers knows no MTP block and ignores `mtp.*` in a file:
# the official names are kept there, so that nothing is lost on the way through.
MTP_ONLY = (
    "e_proj.weight", "h_proj.weight", "enorm.weight", "hnorm.weight", "norm.weight", "hc_head.fn", "hc_head.base",
    "hc_head.scale",
)  # fmt: skip

# What the DSpark stages have beside the tensors of any block: the first stage, then the last. The last has `norm` and
# `hc_head` too.
_DSPARK_ONLY = (
    "main_proj.weight", "main_norm.weight", "markov_head.markov_w1.weight", "markov_head.markov_w2.weight",
    "confidence_head.proj.weight",
)  # fmt: skip

# The matrices that the released files quantise: FP8 for all of these, FP8 or FP4 for the experts (report 5.2.1).
_FP8 = re.compile(
    r"(layers|mtp)\.\d+\."
    r"(attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|ffn\.shared_experts\.w[123]|e_proj|h_proj|main_proj)\.weight"
)
_EXPERTS = re.compile(r"(layers|mtp)\.\d+\.ffn\.experts\.w[123]")

# The released files hold these in float32 whatever the precision of the rest.
_FLOAT32 = re.compile(r".*(\.|^)(hc_(attn|ffn|head)\.(fn|base|scale)|attn_sink|ape|gate\.bias)")


@dataclass(frozen=True)
class Row:
    """One kind of tensor under its four names."""

    ours: str
    official: str
    transformers: str
    transformers_saved: str


@dataclass(frozen=True)
class Part:
    """A tensor of our model, or the slice of a stacked one that belongs to one expert."""

    ours: str
    expert: int | None = None


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file: its name, its shape, and the parts of our model that lie in it along dimension 1."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def _official(ours: str) -> str:
    return _OFFICIAL_DIFFERS.get(ours, ours)


def _trunk_row(ours: str, transformers: str) -> Row:
    return Row(
        ours="layers.{layer}." + ours,
        official="layers.{layer}." + _official(ours),
        transformers="model.layers.{layer}." + transformers,
        transformers_saved="model.layers.{layer}." + _SAVED_DIFFERS.get(ours, _official(ours)),
    )


def _mtp_row(ours: str) -> Row:
    official = "mtp.{layer}." + _official(ours)
    return Row("mtp.{layer}." + ours, official, official, official)


TABLE: tuple[Row, ...] = (
    *(Row(ours, _official(ours), transformers, saved) for ours, transformers, saved in _ENDS),
    *(_trunk_row(ours, transformers) for ours, transformers in _BLOCK),
    *(_mtp_row(ours) for ours, _ in _BLOCK),
    *(_mtp_row(ours) for ours in (*MTP_ONLY, *_DSPARK_ONLY)),
)


def to_file(part: Part, naming: str) -> str:
    """The name of the file tensor that holds a part of our model; ValueError for a tensor that the table lacks.

    A stacked tensor needs its `expert` where the naming stores experts apart; elsewhere the number is not used.
    """
    row, numbers = _row_of(part.ours)
    return _pattern(row, naming).format(**numbers, expert=part.expert)


def to_ours(name: str, naming: str) -> tuple[Part, ...]:
    """The parts of our model in a file tensor, in their order along dimension 1; empty if the naming lacks the name."""
    numbers = _NUMBER.findall(name)
    parts = []
    for row, has_expert in _rows_by_skeleton(naming).get(_NUMBER.sub("#", name), ()):
        ours = row.ours.format(layer=numbers[0]) if numbers else row.ours
        parts.append(Part(ours, int(numbers[1]) if has_expert else None))
    return tuple(parts)


def file_tensors(our_shapes: Mapping[str, tuple[int, ...]], naming: str) -> dict[str, FileTensor]:
    """All file tensors of a model whose tensors have these names and shapes, by name, in the order of the model."""
    result: dict[str, FileTensor] = {}
    for ours, our_shape in our_shapes.items():
        for part, shape in _parts(ours, our_shape, naming):
            name = to_file(part, naming)
            if name not in result:
                result[name] = FileTensor(name, shape, (part,))
            else:
                before = result[name]
                joined = (shape[0], before.shape[1] + shape[1], *shape[2:])
                result[name] = FileTensor(name, joined, (*before.parts, part))
    return result


def keeps_float32(ours: str) -> bool:
    """Whether the released files hold this tensor of our model in float32 at any precision of the rest."""
    return _FLOAT32.fullmatch(ours) is not None


def is_linear(ours: str) -> bool:
    """Whether the released files hold this matrix of our model in FP8, whatever the format of the experts."""
    return _FP8.fullmatch(ours) is not None


def is_experts(ours: str) -> bool:
    """Whether this is a stack of routed experts, which the released files hold in FP8 or FP4."""
    return _EXPERTS.fullmatch(ours) is not None


def scale_name(name: str, naming: str) -> str:
    """The name of the tensor that holds the scales of a quantised file tensor."""
    if naming == "transformers" and not is_mtp(name):
        return name + "_scale_inv"
    return name.removesuffix(".weight") + ".scale"


def model_order(ours: str) -> tuple[int, int, int]:
    """A sort key: the embedding, the layers by number, the ends of the trunk, the MTP blocks; within, as in `TABLE`."""
    row, numbers = _row_of(ours)
    section = 3 if is_mtp(ours) else 1 if numbers else 0 if ours == "embed.weight" else 2
    return section, int(numbers.get("layer", 0)), TABLE.index(row)


def is_mtp(name: str) -> bool:
    """Whether a tensor, under any naming, belongs to an MTP block."""
    return name.startswith("mtp.")


def _parts(ours: str, shape: tuple[int, ...], naming: str) -> list[tuple[Part, tuple[int, ...]]]:
    """A tensor of ours cut the way the naming stores it."""
    row, _ = _row_of(ours)
    if "{expert}" in _pattern(row, naming):
        return [(Part(ours, expert), shape[1:]) for expert in range(shape[0])]
    return [(Part(ours), shape)]


@cache
def _row_of(ours: str) -> tuple[Row, dict[str, str]]:
    """The row of a tensor of ours, and the numbers in its name."""
    for row in TABLE:
        found = _compiled(row.ours).fullmatch(ours)
        if found:
            return row, found.groupdict()
    raise ValueError(f"model tensor {ours} has no published name: weights/names.py has no row for it")


def _pattern(row: Row, naming: str) -> str:
    if naming not in NAMINGS:
        raise ValueError(f"naming {naming!r} is not one of {', '.join(NAMINGS)}")
    return getattr(row, naming)


# Numbers have no leading zeros, so that every name has one spelling.
_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]*)(?=\.)")


@cache
def _rows_by_skeleton(naming: str) -> dict[str, tuple[tuple[Row, bool], ...]]:
    """The rows whose file names look alike when `#` stands for every number, and whether the last number is an expert.

    A folder may hold a hundred thousand names: each is looked up once, not compared with every row.
    """
    result: dict[str, tuple[tuple[Row, bool], ...]] = {}
    for row in TABLE:
        pattern = _pattern(row, naming)
        skeleton = pattern.replace("{layer}", "#").replace("{expert}", "#")
        result[skeleton] = (*result.get(skeleton, ()), (row, "{expert}" in pattern))
    return result


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    expression = re.escape(pattern)
    for number in ("layer", "expert"):
        expression = expression.replace(re.escape("{" + number + "}"), f"(?P<{number}>{_NUMBER.pattern})")
    return re.compile(expression)
