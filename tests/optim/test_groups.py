"""The optimiser table against the real model: every parameter in exactly one row, every cut where it belongs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leadline.model.config import PRESETS
from leadline.model.transformer import Transformer
from leadline.optim import groups
from leadline.optim.groups import RULES, Rule, UnassignedParameterError, build_optimizers, rule_of
from leadline.optim.muon import logical_matrices


def parameters_of(preset: str) -> dict[str, nn.Parameter]:
    with torch.device("meta"):
        return dict(Transformer(PRESETS[preset]).named_parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_has_one_row_and_every_row_a_parameter(preset: str) -> None:
    used = {rule_of(name) for name in parameters_of(preset)}
    assert used == set(RULES)


@pytest.mark.parametrize("preset", PRESETS)
def test_muon_takes_matrices_and_adamw_what_the_report_lists(preset: str) -> None:
    for name, parameter in parameters_of(preset).items():
        by_muon = rule_of(name).optimizer == "muon"
        listed = name in ("embed.weight", "head.weight") or name.endswith(".ape")
        assert by_muon == (parameter.ndim >= 2 and not listed), name


@pytest.mark.parametrize("preset", ["flash", "pro"])
def test_matrices_that_muon_sees(preset: str) -> None:
    """Number and shape of the logical matrices, from the worked shapes of the released models."""
    config = PRESETS[preset]
    d, q, f = config.hidden_size, config.q_lora_rank, config.moe_intermediate_size
    experts, heads, outputs = config.n_routed_experts, config.num_attention_heads, config.o_groups
    expected = {
        "layers.2.hc_attn.fn": [(1, 4, 4 * d), (1, 4, 4 * d), (1, 16, 4 * d)],
        "hc_head.fn": [(1, 4, 4 * d)],
        "layers.2.attn.wq_a.weight": [(1, q, d)],
        "layers.2.attn.wq_b.weight": [(heads, 512, q)],
        "layers.2.attn.wkv.weight": [(1, 512, d)],
        "layers.2.attn.wo_a.weight": [(outputs, 1024, 4096)],
        "layers.2.attn.wo_b.weight": [(1, d, outputs * 1024)],
        "layers.2.attn.compressor.wkv.weight": [(2, 512, d)],
        "layers.3.attn.compressor.wgate.weight": [(1, 512, d)],
        "layers.2.attn.indexer.wq_b.weight": [(64, 128, q)],
        "layers.2.attn.indexer.weights_proj.weight": [(1, 64, d)],
        "layers.2.attn.indexer.compressor.wgate.weight": [(2, 128, d)],
        "layers.2.ffn.gate.weight": [(1, experts, d)],
        "layers.2.ffn.experts.w1": [(experts, f, d)],
        "layers.2.ffn.experts.w2": [(experts, d, f)],
        "layers.2.ffn.shared_experts.w2.weight": [(1, d, f)],
        "mtp.0.e_proj.weight": [(1, d, d)],
    }
    parameters = parameters_of(preset)
    for name, shapes in expected.items():
        rule = rule_of(name)
        rows = rule.rows(config) if rule.rows else None
        assert [tuple(view.shape) for view in logical_matrices(parameters[name], rows)] == shapes, name


def test_unknown_parameter_is_named() -> None:
    with pytest.raises(UnassignedParameterError, match=r"layers\.0\.attn\.wx\.weight matches no row"):
        rule_of("layers.0.attn.wx.weight")


def test_ambiguous_parameter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "RULES", (*RULES, Rule("*.attn.w*", "adamw", "overlaps")))
    with pytest.raises(UnassignedParameterError, match=r"matches \*\.attn\.wkv\.weight, \*\.attn\.w\* of"):
        rule_of("layers.0.attn.wkv.weight")


def test_both_optimisers_cover_the_model_once() -> None:
    model = Transformer(PRESETS["tiny"])
    muon, adamw = build_optimizers(model.named_parameters(), PRESETS["tiny"], lr=1e-3)
    names = [name for group in (*muon.param_groups, *adamw.param_groups) for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(group["lr"] == 1e-3 for group in (*muon.param_groups, *adamw.param_groups))
    assert all(group["weight_decay"] == 0.1 for group in (*muon.param_groups, *adamw.param_groups))


def test_one_step_moves_every_parameter() -> None:
    model = Transformer(PRESETS["tiny"])
    for parameter in model.parameters():
        nn.init.normal_(parameter)
        parameter.grad = torch.randn_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for optimizer in build_optimizers(model.named_parameters(), PRESETS["tiny"], lr=1e-3):
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        moved = (parameter.detach() - before[name]).square().mean().sqrt()
        # RMS 0.18 lr for Muon, 1 lr for the first step of AdamW, each with 1e-4 of decay.
        expected = 0.18e-3 if rule_of(name).optimizer == "muon" else 1e-3
        assert float(moved) == pytest.approx(expected, rel=0.25), name
