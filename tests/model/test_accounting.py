"""Closed forms against the published numbers, and against the tensors of real modules."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leadline.model import accounting, v32
from leadline.model.config import FLASH, NANO, PRESETS, PRO, TINY, ModelConfig
from leadline.model.transformer import Transformer
from leadline.optim.groups import rule_of

MILLION = 1 << 20
K = 1 << 10


def tensors_of(config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return Transformer(config).state_dict()


def part_of(name: str) -> str:
    """The part of `parameter_breakdown` that a tensor belongs to, from its name alone."""
    for part, pieces in {
        "embedding": ("embed.",),
        "head": ("head.weight",),
        "hyper_connections": ("hc_",),
        "indexers": ("indexer.",),
        "compressors": ("compressor.",),
        "router": ("ffn.gate.",),
        "shared_experts": ("shared_experts.",),
        "routed_experts": ("experts.",),
        "attention": (".attn.",),
    }.items():
        if any(piece in name for piece in pieces):
            return part
    return "norms"


@pytest.mark.parametrize("preset", PRESETS)
def test_breakdown_equals_the_tensors_of_the_trunk(preset):
    config = PRESETS[preset]
    found = Counter()
    for name, tensor in tensors_of(config).items():
        if tensor.is_floating_point() and not name.startswith("mtp."):
            found[part_of(name)] += tensor.numel()
    assert found == accounting.parameter_breakdown(config)
    assert found.total() == accounting.parameters_total(config)


@pytest.mark.parametrize("preset", PRESETS)
def test_mtp_block_equals_its_tensors(preset):
    config = PRESETS[preset]
    found = sum(tensor.numel() for name, tensor in tensors_of(config).items() if name.startswith("mtp.0."))
    assert found == accounting.parameters_mtp_block(config)


@pytest.mark.parametrize("preset", PRESETS)
def test_optimizer_shares_equal_the_table_of_the_optimisers(preset):
    with torch.device("meta"):
        model = Transformer(PRESETS[preset])
    found = Counter()
    for name, parameter in model.named_parameters():
        found[rule_of(name).optimizer] += parameter.numel()
    adamw, trained = accounting.adamw_parameters(PRESETS[preset]), accounting.trained_parameters(PRESETS[preset])
    assert found == {"adamw": adamw, "muon": trained - adamw}


@settings(max_examples=15, deadline=None)
@given(
    ratios=st.lists(st.sampled_from((0, 4, 128)), min_size=1, max_size=6),
    mtp=st.integers(0, 1),
    hash_layers=st.integers(0, 8),
    streams=st.integers(1, 5),
    experts=st.integers(2, 9),
)
def test_any_schedule_equals_its_tensors(ratios, mtp, hash_layers, streams, experts):
    config = TINY.replace(
        num_hidden_layers=len(ratios),
        compress_ratios=(*ratios, *(0,) * mtp),
        num_nextn_predict_layers=mtp,
        num_hash_layers=hash_layers,
        hc_mult=streams,
        n_routed_experts=experts,
    )
    floats = [tensor.numel() for tensor in tensors_of(config).values() if tensor.is_floating_point()]
    assert sum(floats) == accounting.parameters_total(config) + mtp * accounting.parameters_mtp_block(config)


@pytest.mark.parametrize(
    ("config", "total", "active", "active_with_embedding", "mtp"),
    [(FLASH, 284.33, 13.27, 13.80, 6.61), (PRO, 1573.0, 48.85, 49.78, 25.84)],
)
def test_published_parameter_counts(config, total, active, active_with_embedding, mtp):
    assert accounting.parameters_total(config) / 1e9 == pytest.approx(total, abs=0.005)
    assert accounting.parameters_active(config) / 1e9 == pytest.approx(active, abs=0.005)
    assert accounting.parameters_active(config, with_embedding=True) / 1e9 == pytest.approx(
        active_with_embedding, abs=0.005
    )
    assert accounting.parameters_mtp_block(config) / 1e9 == pytest.approx(mtp, abs=0.005)


def test_v32_parameter_counts():
    # 671B and 37B were published for the body that V3.2 shares with V3; its indexers add 0.85B.
    indexers = v32.NUM_LAYERS * (v32.indexer_matrices() + v32.HIDDEN_SIZE * v32.INDEX_N_HEADS)
    assert (v32.parameters_total() - indexers) / 1e9 == pytest.approx(671.0, abs=0.1)
    assert (v32.parameters_active() - indexers) / 1e9 == pytest.approx(36.6, abs=0.1)


@pytest.mark.parametrize(
    ("context", "reference", "flash", "pro"),
    [
        (4 * K, 150.8, 33.0, 122.6),
        (32 * K, 179.4, 35.4, 128.0),
        (128 * K, 277.7, 43.6, 146.5),
        (256 * K, 408.7, 54.6, 171.2),
        (512 * K, 670.7, 76.7, 220.6),
        (MILLION, 1194.6, 120.7, 319.4),
    ],
)
def test_flops_of_one_token(context, reference, flash, pro):
    found = [v32.decode_flops(context), accounting.decode_flops(FLASH, context), accounting.decode_flops(PRO, context)]
    assert [round(flops.equivalent_fp8 / 1e9, 1) for flops in found] == [reference, flash, pro]


@pytest.mark.parametrize(
    ("config", "fp8", "fp4", "bf16", "core", "index"),
    [(FLASH, 11.7, 13.0, 1.8, 23.6, 90.2), (PRO, 45.4, 48.4, 3.9, 76.7, 128.8)],
)
def test_flops_by_format(config, fp8, fp4, bf16, core, index):
    flops = accounting.decode_flops(config, MILLION)
    terms = (flops.fp8_linears, flops.fp4_experts, flops.bf16_linears, flops.core_attention, flops.index_scores)
    assert [round(term / 1e9, 1) for term in terms] == [fp8, fp4, bf16, core, index]


@pytest.mark.parametrize(
    ("config", "of_flops", "of_cache", "cache"), [(PRO, "26.7%", "10.5%", 5.280), (FLASH, "10.1%", "7.3%", 3.688)]
)
def test_headline_at_a_million_tokens(config, of_flops, of_cache, cache):
    flops = accounting.decode_flops(config, MILLION).equivalent_fp8 / v32.decode_flops(MILLION).equivalent_fp8
    assert f"{flops:.1%}" == of_flops
    assert f"{accounting.kv_cache_bytes(config, MILLION) / v32.kv_cache_bytes(MILLION):.1%}" == of_cache
    assert round(accounting.kv_cache_bytes(config, MILLION) / 1e9, 3) == cache
    assert round(v32.kv_cache_bytes(MILLION) / 1e9, 2) == 50.40


@pytest.mark.parametrize(
    ("context", "reference", "flash", "pro"),
    [(4 * K, 196.9, 17.6, 25.2), (32 * K, 1575, 118, 169), (128 * K, 6300, 464, 664)],
)
def test_cache_at_shorter_contexts(context, reference, flash, pro):
    found = [v32.kv_cache_bytes(context), *(accounting.kv_cache_bytes(c, context) for c in (FLASH, PRO))]
    expected = [reference, flash, pro]
    assert found == [pytest.approx(1e6 * megabytes, rel=4e-3) for megabytes in expected]


def test_cache_in_bf16():
    assert accounting.kv_cache_bytes_bf16(PRO, MILLION) / 2**30 == pytest.approx(9.62, abs=0.005)
    assert v32.kv_cache_bytes_bf16(MILLION) / 2**30 == pytest.approx(83.9, abs=0.05)


@pytest.mark.parametrize(("config", "entry", "key"), [(FLASH, 584, 68), (PRO, 584, 68), (TINY, 56, 17), (NANO, 88, 17)])
def test_bytes_of_one_entry(config, entry, key):
    assert (accounting.entry_bytes(config), accounting.index_key_bytes(config)) == (entry, key)


@pytest.mark.parametrize(("config", "megabytes"), [(FLASH, 12.2), (PRO, 18.7)])
def test_tails(config, megabytes):
    assert round(accounting.tail_bytes(config) / 1e6, 1) == megabytes


def test_short_contexts_count_only_what_is_there():
    flops = accounting.decode_flops(FLASH, 3)  # three tokens: the window shows all, no window of 4 is complete
    assert flops.index_scores == 0
    assert flops.core_attention == 43 * 4 * 64 * 512 * 3
    assert accounting.kv_cache_bytes(FLASH, 3) == 43 * 3 * 584
    one_entry = accounting.kv_cache_bytes(FLASH, 4) - 43 * 4 * 584
    assert one_entry == 21 * (584 + 68)


@pytest.mark.parametrize("config", [TINY, NANO, FLASH, PRO])
def test_costs_never_fall_as_the_context_grows(config):
    contexts = [1, 2, 3, 4, 7, 8, 127, 128, 129, 2047, 2048, 4096, 100_000, MILLION]
    for cost in (accounting.kv_cache_bytes, accounting.kv_cache_bytes_bf16, accounting.core_attention_flops):
        values = [cost(config, context) for context in contexts]
        assert values == sorted(values)


def test_training_memory_counts_four_bytes_a_number():
    memory, trained = accounting.training_memory(TINY), accounting.trained_parameters(TINY)
    assert memory.weights == memory.gradients == 4 * trained
    assert memory.muon_momentum == 4 * (trained - accounting.adamw_parameters(TINY))
    assert memory.total == 12 * trained + 4 * accounting.adamw_parameters(TINY)
    assert memory.stream_bytes_per_token == 5 * 4 * 64 * 4
