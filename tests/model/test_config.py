"""Both spellings of config.json, and every rule with an example that breaks it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV4Config

from leadline.model.config import (
    FLASH,
    LAYER_TYPE_OF_RATIO,
    NANO,
    PRESETS,
    PRO,
    SPELLINGS,
    TINY,
    ConfigError,
    ModelConfig,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "exact"
UNKNOWN = {"use_cache": True, "transformers_version": "4.57.1", "dspark_block_size": 5, "nested": {"a": [1, None, "ä"]}}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_with_unknown_keys(name: str, spelling: str) -> None:
    config = PRESETS[name].replace(extra=UNKNOWN)
    written = json.loads(config.to_json(spelling))
    assert {key: written[key] for key in UNKNOWN} == UNKNOWN
    again = ModelConfig.from_dict(written)
    assert again == config
    assert json.loads(again.to_json(spelling)) == written


@pytest.mark.parametrize("name", PRESETS)
def test_spellings_translate_into_each_other(name: str) -> None:
    config = PRESETS[name]
    there = ModelConfig.from_dict(config.to_dict("transformers")).to_dict("official")
    assert there == config.to_dict("official")
    assert ModelConfig.from_dict(there).to_dict("transformers") == config.to_dict("transformers")


def test_the_golden_file_comes_back_as_it_was() -> None:
    """Same keys, same values: other engines reject a file whose keys changed."""
    values = json.loads((GOLDEN / "config.json").read_text())
    assert ModelConfig.from_file(GOLDEN).to_dict() == values
    assert ModelConfig.from_file(GOLDEN / "config.json") == ModelConfig.from_file(GOLDEN)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", PRESETS)
def test_transformers_reads_ours_and_we_read_theirs(name: str, spelling: str) -> None:
    config = PRESETS[name]
    theirs = DeepseekV4Config(**config.to_dict(spelling))
    values: dict[str, Any] = theirs.to_dict()
    assert values["layer_types"] == [LAYER_TYPE_OF_RATIO[ratio] for ratio in config.layer_ratios]
    assert values["mlp_layer_types"].count("hash_moe") == config.num_hash_layers
    assert theirs.qk_rope_head_dim == config.qk_rope_head_dim
    main, compress = values["rope_parameters"]["main"], values["rope_parameters"]["compress"]
    assert (main["rope_theta"], compress["rope_theta"]) == (config.rope_theta, config.compress_rope_theta)
    assert compress["attention_factor"] == 1.0
    again = ModelConfig.from_dict(values)
    assert again.replace(extra={}) == config
    assert again.extra["transformers_version"] == "5.23.0"


def test_the_released_models() -> None:
    """Fields that v4's two models differ in, and the schedules."""
    assert FLASH.layer_ratios == (0, 0, *(4, 128) * 20, 4)
    assert PRO.layer_ratios == (128, 128, *(4, 128) * 29, 4)
    assert (len(FLASH.compress_ratios), len(PRO.compress_ratios)) == (44, 62)
    names = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "o_groups", "moe_intermediate_size",
        "n_routed_experts", "routed_scaling_factor", "index_topk",
    )  # fmt: skip
    assert [getattr(FLASH, name) for name in names] == [4096, 43, 64, 1024, 8, 2048, 256, 1.5, 512]
    assert [getattr(PRO, name) for name in names] == [7168, 61, 128, 1536, 16, 3072, 384, 2.5, 1024]
    shared = {
        "vocab_size": 129280, "head_dim": 512, "qk_rope_head_dim": 64, "o_lora_rank": 1024, "sliding_window": 128,
        "index_n_heads": 64, "index_head_dim": 128, "num_experts_per_tok": 6, "num_hash_layers": 3,
        "swiglu_limit": 10.0, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "compress_rope_theta": 160000.0, "rope_factor": 16.0,
        "original_max_position_embeddings": 65536, "beta_fast": 32.0, "beta_slow": 1.0,
        "max_position_embeddings": 1048576, "num_nextn_predict_layers": 1, "initializer_range": 0.02,
        "bos_token_id": 0, "eos_token_id": 1, "expert_dtype": "fp4", "mtp_ratios": (0,),
    }  # fmt: skip
    for config in (FLASH, PRO):
        assert {name: getattr(config, name) for name in shared} == shared


def test_draft_stages_may_outnumber_the_mtp_field() -> None:
    """The refreshed checkpoints hold three draft stages while num_nextn_predict_layers still reads 1."""
    config = ModelConfig.from_dict({**TINY.to_dict(), "compress_ratios": [0, 4, 128, 4, 0, 0, 0]})
    assert config.mtp_ratios == (0, 0, 0)
    assert config.layer_ratios == TINY.layer_ratios


def test_hash_layers_come_first() -> None:
    assert [TINY.replace(num_hash_layers=2).is_hash_layer(layer) for layer in range(4)] == [True, True, False, False]


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.hidden_size = 3  # type: ignore[misc]


# -- rules -----------------------------------------------------------------------------------------------------------

AT_LEAST_ONE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "q_lora_rank", "o_groups",
    "o_lora_rank", "index_topk", "index_n_heads", "index_head_dim", "sliding_window", "n_routed_experts",
    "num_experts_per_tok", "moe_intermediate_size", "hc_mult", "hc_sinkhorn_iters", "max_position_embeddings",
    "original_max_position_embeddings",
)  # fmt: skip
POSITIVE = (
    "hc_eps", "rms_norm_eps", "rope_theta", "compress_rope_theta", "routed_scaling_factor", "swiglu_limit",
    "initializer_range",
)  # fmt: skip

# field, wrong value, words of the rule
BROKEN: list[tuple[str, Any, str]] = [
    *((name, value, "at least 1") for name in AT_LEAST_ONE for value in (0, -3)),
    *((name, value, "positive") for name in POSITIVE for value in (0.0, -1.0)),
    *(
        (name, value, "finite")
        for name in (*POSITIVE, "rope_factor", "beta_fast")
        for value in (float("nan"), float("inf"))
    ),
    *((name, value, "of type int") for name in AT_LEAST_ONE for value in ("8", 8.0, True, None)),
    *((name, value, "of type float") for name in POSITIVE for value in ("1", True, None)),
    ("num_key_value_heads", 2, "must be 1"),
    ("n_shared_experts", 2, "must be 1"),
    ("scoring_func", "softmax", "must be 'sqrtsoftplus'"),
    ("topk_method", "greedy", "must be 'noaux_tc'"),
    ("norm_topk_prob", False, "must be True"),
    ("norm_topk_prob", 1, "of type bool"),
    ("hidden_act", "gelu", "must be 'silu'"),
    ("attention_bias", True, "must be False"),
    ("attention_dropout", 0.1, "must be 0.0"),
    ("tie_word_embeddings", True, "must be False"),
    ("compress_ratios", (0, 4, 128), "one entry per layer (4)"),
    ("compress_ratios", (0, 4, 128, 4), "num_hidden_layers + num_nextn_predict_layers = 5"),
    ("compress_ratios", (0, 4, 64, 4, 0), "0 (window only), 4 (CSA) or 128 (HCA)"),
    ("compress_ratios", (0, 4, 128, 4, 4), "MTP blocks must be 0"),
    ("compress_ratios", (0, 4.0, 128, 4, 0), "list of int"),
    ("compress_ratios", (False, 4, 128, 4, 0), "list of int"),
    ("compress_ratios", "0,4,128,4,0", "list of int"),
    ("compress_ratios", None, "list of int"),
    ("compress_ratios", 4, "list of int"),
    ("num_nextn_predict_layers", -1, "must not be negative"),
    ("num_hash_layers", -1, "must not be negative"),
    ("o_groups", 3, "must divide num_attention_heads (4)"),
    ("qk_rope_head_dim", 7, "even and positive"),
    ("qk_rope_head_dim", 0, "even and positive"),
    ("head_dim", 14, "at least qk_rope_head_dim (16)"),
    ("index_head_dim", 14, "at least qk_rope_head_dim (16)"),
    ("num_experts_per_tok", 9, "must not exceed n_routed_experts (8)"),
    ("rope_factor", 0.5, "at least 1"),
    ("beta_fast", 1.0, "must exceed beta_slow (1.0)"),
    ("bos_token_id", "0", "of type int or None"),
    ("eos_token_id", 1.0, "of type int or None"),
    ("torch_dtype", 32, "of type str"),
    ("expert_dtype", 4, "of type str or None"),
    ("quantization_config", "fp8", "of type Mapping or None"),
]


@pytest.mark.parametrize(("name", "value", "rule"), BROKEN, ids=lambda part: str(part))
def test_a_broken_rule_names_field_value_and_rule(name: str, value: Any, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TINY.replace(**{name: value})
    message = str(caught.value)
    assert f"'{name}'" in message
    assert repr(value) in message or repr(list(value)) in message or any(repr(item) in message for item in value)
    assert rule in message
    assert "\n" not in message


# a change to the file in one of the spellings, the key that the message must name
BROKEN_FILES: list[tuple[str, dict[str, Any], str]] = [
    ("official", {"model_type": "deepseek_v3"}, "model_type"),
    ("official", {"rope_scaling": 16}, "rope_scaling"),
    ("official", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type"),
    ("official", {"rope_scaling": {"type": "yarn", "attention_factor": 1.277}}, "rope_scaling.attention_factor"),
    ("official", {"rope_scaling": {"type": "yarn", "factor": "16"}}, "rope_factor"),
    ("transformers", {"layer_types": "sliding_attention"}, "layer_types"),
    ("transformers", {"layer_types": ["full_attention"] * 4}, "layer_types"),
    ("transformers", {"layer_types": ["sliding_attention"] * 3}, "compress_ratios"),
    ("transformers", {"compress_rates": {"compressed_sparse_attention": 8}}, "compress_rates"),
    ("transformers", {"compress_rates": 4}, "compress_rates"),
    ("transformers", {"mlp_layer_types": ["moe", "hash_moe", "moe", "moe"]}, "mlp_layer_types"),
    ("transformers", {"mlp_layer_types": 2}, "mlp_layer_types"),
    ("transformers", {"rope_parameters": {"main": {}}}, "rope_parameters"),
    ("transformers", {"rope_parameters": {"main": 1, "compress": {}}}, "rope_parameters.main"),
    ("transformers", {"rope_parameters": {"main": {}, "compress": 1}}, "rope_parameters.compress"),
    (
        "transformers",
        {"rope_parameters": {"main": {"rope_type": "yarn"}, "compress": {}}},
        "rope_parameters.main.rope_type",
    ),
    ("transformers", {"num_nextn_predict_layers": "one"}, "num_nextn_predict_layers"),
]


@pytest.mark.parametrize(("spelling", "change", "key"), BROKEN_FILES, ids=lambda part: str(part)[:60])
def test_a_broken_file_names_the_key(spelling: str, change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"'{key}'"):
        ModelConfig.from_dict({**TINY.to_dict(spelling), **change})


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_missing_field_is_named(spelling: str) -> None:
    values = TINY.to_dict(spelling)
    del values["hidden_size"]
    with pytest.raises(ConfigError, match="'hidden_size' is missing"):
        ModelConfig.from_dict(values)


def test_the_spellings_may_be_mixed() -> None:
    """Layer types of one, rotary part of the other: nothing falls back to a default in silence."""
    values = TINY.to_dict("transformers")
    del values["rope_parameters"]
    values["rope_scaling"] = {"type": "yarn", "factor": 3, "original_max_position_embeddings": 77}
    assert ModelConfig.from_dict(values) == TINY.replace(rope_factor=3.0, original_max_position_embeddings=77)


def test_the_rotary_share_stands_in_for_the_rotary_width() -> None:
    values = TINY.to_dict("transformers")
    del values["qk_rope_head_dim"]
    assert ModelConfig.from_dict(values) == TINY
    with pytest.raises(ConfigError, match="partial_rotary_factor"):
        ModelConfig.from_dict({**values, "partial_rotary_factor": "half"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        ("{", "not valid JSON"),
        ("[1]", "holds a list"),
        (b"\xff\xfe", "not valid JSON"),
        ("{}", "missing"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: str | bytes | None, words: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for place in (path, tmp_path):
        with pytest.raises(ConfigError, match=words) as caught:
            ModelConfig.from_file(place)
        assert str(path) in str(caught.value)


@given(
    values=st.dictionaries(
        st.sampled_from([*TINY.to_dict("official"), *TINY.to_dict("transformers")]),
        st.recursive(
            st.none() | st.booleans() | st.integers(-5, 300) | st.floats() | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["main", "compress", "type"]), inner)
            ),
            max_leaves=4,
        ),
        max_size=4,
    ),
    spelling=st.sampled_from(SPELLINGS),
)
def test_any_file_is_read_or_refused_in_one_line(values: dict[str, Any], spelling: str) -> None:
    try:
        config = ModelConfig.from_dict({**TINY.to_dict(spelling), **values})
    except ConfigError as error:
        message = str(error)
    else:
        message = ""
        assert ModelConfig.from_dict(config.to_dict()) == config
    assert "\n" not in message


def test_presets_are_distinct_and_small_ones_small() -> None:
    assert len({json.dumps(config.to_dict(), sort_keys=True) for config in PRESETS.values()}) == len(PRESETS)
    for config in (TINY, NANO):
        assert set(config.layer_ratios) == {0, 4, 128}, "every kind of layer"
        assert 0 < config.num_hash_layers < config.num_hidden_layers, "both kinds of router"
