"""The name table against the published shapes, against transformers itself, and as a bijection."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leadline.model.config import PRESETS, ModelConfig
from leadline.model.transformer import Transformer
from leadline.quant.policy import RELEASED
from leadline.weights.names import (
    NAMINGS,
    TABLE,
    Part,
    file_tensors,
    is_experts,
    is_linear,
    is_mtp,
    keeps_float32,
    model_order,
    scale_name,
    to_file,
    to_ours,
)

Shapes = dict[str, tuple[int, ...]]


def our_shapes(config: ModelConfig) -> Shapes:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}


def published_shapes(c: ModelConfig) -> Shapes:
    """The tensors of a released file, written down from its headers rather than from our model."""
    d, s, f = c.hidden_size, c.hc_mult, c.moe_intermediate_size
    heads = c.num_attention_heads * c.head_dim

    def hyper(prefix: str, rows: int, scales: int) -> Shapes:
        return {f"{prefix}_fn": (rows, s * d), f"{prefix}_base": (rows,), f"{prefix}_scale": (scales,)}

    def compressor(prefix: str, ratio: int, width: int) -> Shapes:
        columns = 2 * width if ratio == 4 else width
        return {
            f"{prefix}.ape": (ratio, columns),
            f"{prefix}.wkv.weight": (columns, d),
            f"{prefix}.wgate.weight": (columns, d),
            f"{prefix}.norm.weight": (width,),
        }

    def block(prefix: str, ratio: int, hashed: bool) -> Shapes:
        tensors: Shapes = {
            "attn_norm.weight": (d,),
            "ffn_norm.weight": (d,),
            **hyper("hc_attn", (2 + s) * s, 3),
            **hyper("hc_ffn", (2 + s) * s, 3),
            "attn.attn_sink": (c.num_attention_heads,),
            "attn.wq_a.weight": (c.q_lora_rank, d),
            "attn.q_norm.weight": (c.q_lora_rank,),
            "attn.wq_b.weight": (heads, c.q_lora_rank),
            "attn.wkv.weight": (c.head_dim, d),
            "attn.kv_norm.weight": (c.head_dim,),
            "attn.wo_a.weight": (c.o_groups * c.o_lora_rank, heads // c.o_groups),
            "attn.wo_b.weight": (d, c.o_groups * c.o_lora_rank),
            "ffn.gate.weight": (c.n_routed_experts, d),
            "ffn.shared_experts.w1.weight": (f, d),
            "ffn.shared_experts.w3.weight": (f, d),
            "ffn.shared_experts.w2.weight": (d, f),
        }
        if ratio:
            tensors |= compressor("attn.compressor", ratio, c.head_dim)
        if ratio == 4:
            tensors["attn.indexer.wq_b.weight"] = (c.index_n_heads * c.index_head_dim, c.q_lora_rank)
            tensors["attn.indexer.weights_proj.weight"] = (c.index_n_heads, d)
            tensors |= compressor("attn.indexer.compressor", 4, c.index_head_dim)
        if hashed:
            tensors["ffn.gate.tid2eid"] = (c.vocab_size, c.num_experts_per_tok)
        else:
            tensors["ffn.gate.bias"] = (c.n_routed_experts,)
        for expert in range(c.n_routed_experts):
            tensors |= {f"ffn.experts.{expert}.{w}.weight": (f, d) for w in ("w1", "w3")}
            tensors[f"ffn.experts.{expert}.w2.weight"] = (d, f)
        return {prefix + name: shape for name, shape in tensors.items()}

    result: Shapes = {"embed.weight": (c.vocab_size, d), "head.weight": (c.vocab_size, d), "norm.weight": (d,)}
    result |= hyper("hc_head", s, 1)
    for layer, ratio in enumerate(c.layer_ratios):
        result |= block(f"layers.{layer}.", ratio, layer < c.num_hash_layers)
    result |= block("mtp.0.", 0, False) | hyper("mtp.0.hc_head", s, 1)
    result |= {f"mtp.0.{name}.weight": (d, d) for name in ("e_proj", "h_proj")}
    result |= {f"mtp.0.{name}.weight": (d,) for name in ("enorm", "hnorm", "norm")}
    return result


@pytest.mark.parametrize("preset", PRESETS)
def test_official_names_and_shapes_are_the_published_ones(preset: str) -> None:
    config = PRESETS[preset]
    ours = {name: tensor.shape for name, tensor in file_tensors(our_shapes(config), "official").items()}
    assert ours == published_shapes(config)


@pytest.mark.parametrize("preset", PRESETS)
def test_transformers_names_and_shapes_are_those_of_its_model(preset: str) -> None:
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = PRESETS[preset]
    values = config.to_dict("transformers")
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(DeepseekV4Config(**values))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ours = {name: tensor.shape for name, tensor in file_tensors(our_shapes(config), "transformers").items()}
    assert {name: shape for name, shape in ours.items() if not is_mtp(name)} == theirs


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_tensor_of_every_preset_maps_there_and_back(preset: str, naming: str) -> None:
    shapes = our_shapes(PRESETS[preset])
    tensors = file_tensors(shapes, naming)
    # Flash and Pro repeat one layer dozens of times over hundreds of experts: a sample of the experts is enough.
    for name, tensor in tensors.items():
        if any(part.expert not in (None, 0, 7, 255) for part in tensor.parts):
            continue
        assert to_ours(name, naming) == tensor.parts
        assert all(to_file(part, naming) == name for part in tensor.parts)
    covered: dict[str, int] = {}
    for tensor in tensors.values():
        for part in tensor.parts:
            covered[part.ours] = covered.get(part.ours, 0) + 1
    assert covered.keys() == shapes.keys()
    for ours, count in covered.items():
        assert count in (1, shapes[ours][0])


@given(st.sampled_from(TABLE), st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(NAMINGS))
def test_table_is_a_bijection(row: object, layer: int, expert: int, naming: str) -> None:
    ours = row.ours.format(layer=layer)  # type: ignore[attr-defined]
    stacked_apart = "{expert}" in getattr(row, naming)
    part = Part(ours, expert if stacked_apart else None)
    assert part in to_ours(to_file(part, naming), naming)


@given(st.text(alphabet="layers.mtp0123456789{}weight*_", max_size=40), st.sampled_from(NAMINGS))
def test_unknown_names_are_unknown(name: str, naming: str) -> None:
    for part in to_ours(name, naming):
        assert to_file(part, naming) == name


@pytest.mark.parametrize(
    "name",
    ["layers.00.attn.wq_a.weight", "layers.-1.attn.wq_a.weight", "layers.x.attn.wq_a.weight", "x.0.attn.wq_a.weight",
     "layers.0.attn.wq_a.weight\n", "layers.0.attn.wq_a_weight", "layers.0.ffn.experts.01.w1.weight", ""],
)  # fmt: skip
def test_near_misses_are_unknown(name: str) -> None:
    assert to_ours(name, "official") == ()


def test_errors_name_the_tensor_and_the_naming() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.wx has no published name"):
        file_tensors({"layers.0.attn.wx": (1,)}, "official")
    with pytest.raises(ValueError, match="naming 'hf' is not one of official"):
        to_ours("embed.weight", "hf")


def test_tensors_that_the_release_keeps_in_float32() -> None:
    kept = {name.split(".", 2)[-1] if name.startswith("layers") else name for name in our_shapes(PRESETS["tiny"])}
    kept = {name for name in kept if keeps_float32(name) and not is_mtp(name)}
    hyper = {f"hc_{place}.{part}" for place in ("attn", "ffn", "head") for part in ("fn", "base", "scale")}
    assert kept == hyper | {"attn.attn_sink", "attn.compressor.ape", "attn.indexer.compressor.ape", "ffn.gate.bias"}
    assert keeps_float32("mtp.0.hc_head.fn")
    assert keeps_float32("layers.3.ffn.gate.bias")


def test_tensors_that_the_release_quantises() -> None:
    """Written down from the dtypes of the released headers."""
    names = [name for name in our_shapes(PRESETS["tiny"]) if name.startswith(("layers.3.", "mtp.0.", "embed", "head"))]
    linear = {name.split(".", 2)[-1] for name in names if is_linear(name)}
    attention = {f"attn.{name}.weight" for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "indexer.wq_b")}
    shared = {f"ffn.shared_experts.{name}.weight" for name in ("w1", "w2", "w3")}
    assert linear == attention | shared | {"e_proj.weight", "h_proj.weight"}
    assert is_linear("mtp.0.main_proj.weight")
    experts = {name.split(".", 2)[-1] for name in names if is_experts(name)}
    assert experts == {"ffn.experts.w1", "ffn.experts.w2", "ffn.experts.w3"}


def test_files_and_models_quantise_the_same_tensors() -> None:
    for name in our_shapes(PRESETS["flash"]):
        wanted = "fp8" if is_linear(name) else "fp4" if is_experts(name) else None
        assert RELEASED.format_of(name) == wanted, name


@pytest.mark.parametrize(
    ("name", "naming", "scale"),
    [
        ("layers.3.attn.wq_a.weight", "official", "layers.3.attn.wq_a.scale"),
        ("layers.3.ffn.experts.7.w1.weight", "official", "layers.3.ffn.experts.7.w1.scale"),
        (
            "model.layers.3.self_attn.q_a_proj.weight",
            "transformers",
            "model.layers.3.self_attn.q_a_proj.weight_scale_inv",
        ),
        ("model.layers.3.mlp.experts.down_proj", "transformers", "model.layers.3.mlp.experts.down_proj_scale_inv"),
        ("mtp.0.e_proj.weight", "transformers", "mtp.0.e_proj.scale"),
    ],
)
def test_names_of_scales(name: str, naming: str, scale: str) -> None:
    assert scale_name(name, naming) == scale
    assert to_ours(scale, naming) == (), "scales are no tensors of the model"


def test_order_of_a_folder() -> None:
    names = ["mtp.0.norm.weight", "norm.weight", "layers.10.attn_norm.weight", "layers.2.ffn.gate.weight",
             "layers.2.attn_norm.weight", "head.weight", "embed.weight"]  # fmt: skip
    assert sorted(names, key=model_order) == [
        "embed.weight", "layers.2.attn_norm.weight", "layers.2.ffn.gate.weight", "layers.10.attn_norm.weight",
        "norm.weight", "head.weight", "mtp.0.norm.weight",
    ]  # fmt: skip
