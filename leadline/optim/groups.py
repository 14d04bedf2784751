"""Which tensor goes to which optimiser, and which stored tensors are several matrices to Muon.

`RULES` is the whole answer. Every parameter matches exactly one row; a name that matches none, or two, is an error, so
a new tensor cannot slip into an optimiser unnoticed. The reasons for the `rows` column are in
`docs/decisions/0004-muon-splits.md`.

Weight decay: the report gives decay 0.1 for AdamW without exceptions, so norm weights, sinks and biases decay as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from leadline.model.config import ModelConfig
from leadline.optim.adamw import adamw
from leadline.optim.muon import Muon


@dataclass(frozen=True)
class Rule:
    """One row: the parameters whose name matches `tensors` (`*` stands for any text) go to `optimizer`."""

    tensors: str
    optimizer: Literal["muon", "adamw"]
    why: str
    rows: Callable[[ModelConfig], int | list[int]] | None = None  # heights of the matrices inside one tensor


def _streams_parts(config: ModelConfig) -> list[int]:
    return [config.hc_mult, config.hc_mult, config.hc_mult**2]


RULES = (
    # AdamW: what is no linear map of activations.
    Rule("embed.weight", "adamw", "a table of vectors, few rows touched a step (report 2.4)"),
    Rule("head.weight", "adamw", "one vector per token (report 2.4)"),
    Rule("*norm.weight", "adamw", "vectors: every RMSNorm, MTP's enorm and hnorm too (report 2.4)"),
    Rule("*hc_*.base", "adamw", "static biases of the hyper-connections (report 2.4)"),
    Rule("*hc_*.scale", "adamw", "gating factors of the hyper-connections (report 2.4)"),
    Rule("*.attn_sink", "adamw", "one logit per head: a vector; the report does not name it"),
    Rule("*.ape", "adamw", "a bias per position in the window, a matrix only in storage; the report does not name it"),
    # Muon: all other modules (report 2.4).
    Rule("*.hc_attn.fn", "muon", "the maps of pre, post and comb (report 2.2)", _streams_parts),
    Rule("*.hc_ffn.fn", "muon", "the maps of pre, post and comb (report 2.2)", _streams_parts),
    Rule("*hc_head.fn", "muon", "one map: only pre"),
    Rule("*.attn.wq_a.weight", "muon", "one map"),
    Rule("*.attn.wq_b.weight", "muon", "each head is a map of its own", lambda c: c.head_dim),
    Rule("*.attn.wkv.weight", "muon", "one map: the shared key and value head"),
    Rule("*.attn.wo_a.weight", "muon", "one map per output group (report 2.3.3)", lambda c: c.o_lora_rank),
    Rule("*.attn.wo_b.weight", "muon", "one map: it mixes all groups"),
    Rule("*.attn.compressor.wkv.weight", "muon", "CSA: the series C^a and C^b of report 2.3.1", lambda c: c.head_dim),
    Rule("*.attn.compressor.wgate.weight", "muon", "CSA: the series C^a and C^b of report 2.3.1", lambda c: c.head_dim),
    Rule("*.attn.indexer.wq_b.weight", "muon", "each indexer head is a map of its own", lambda c: c.index_head_dim),
    Rule("*.attn.indexer.weights_proj.weight", "muon", "one map: a weight per indexer head"),
    Rule("*.attn.indexer.compressor.wkv.weight", "muon", "the two halves of CSA", lambda c: c.index_head_dim),
    Rule("*.attn.indexer.compressor.wgate.weight", "muon", "the two halves of CSA", lambda c: c.index_head_dim),
    Rule("*.ffn.gate.weight", "muon", "one map: a logit per expert"),
    Rule("*.ffn.experts.w[123]", "muon", "a stack, one matrix per expert (report 3.4.1)"),
    Rule("*.ffn.shared_experts.w[123].weight", "muon", "one map"),
    Rule("mtp.*.e_proj.weight", "muon", "one map"),
    Rule("mtp.*.h_proj.weight", "muon", "one map"),
)


class UnassignedParameterError(ValueError):
    """A parameter matches no row of RULES, or several."""


def rule_of(name: str) -> Rule:
    """The one row of RULES that `name` matches; UnassignedParameterError names the parameter otherwise."""
    found = [rule for rule in RULES if fnmatchcase(name, rule.tensors)]
    if len(found) != 1:
        patterns = ", ".join(rule.tensors for rule in found) or "no row"
        raise UnassignedParameterError(
            f"parameter {name} matches {patterns} of the optimiser table, must match exactly one: edit optim/groups.py"
        )
    return found[0]


def build_optimizers(
    named_parameters: Iterable[tuple[str, Tensor]], config: ModelConfig, lr: float
) -> tuple[Muon, torch.optim.AdamW]:
    """Both optimisers over all parameters of a model, at one learning rate (report 2.4, 4.2.2).

    Their parameter groups hold the names; Muon has one group for each way of cutting, in the order of first appearance.
    Raises UnassignedParameterError, or ValueError where a tensor does not have the shape that RULES presumes.
    """
    vectors: list[tuple[str, Tensor]] = []
    matrices: dict[str, tuple[int | list[int] | None, list[tuple[str, Tensor]]]] = {}
    for name, parameter in named_parameters:
        rule = rule_of(name)
        if rule.optimizer == "adamw":
            vectors.append((name, parameter))
            continue
        rows = rule.rows(config) if rule.rows else None
        matrices.setdefault(repr(rows), (rows, []))[1].append((name, parameter))
    groups = [{"params": members, "rows": rows} for rows, members in matrices.values()]
    return Muon(groups, lr), adamw(vectors, lr)
