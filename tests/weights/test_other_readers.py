"""What other programs make of our folders: transformers by loading them, vLLM and SGLang by what their readers ask for.

transformers 5.23 loads quantised folders on a CPU by dequantising them. vLLM and SGLang do not run here; the tables
below name what the released code of vLLM 0.33.0 and SGLang 0.5.23 reads from config.json and expects of tensor names
and dtypes, and a change of ours that would break them fails here.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from leadline.model.config import PRESETS, ModelConfig
from leadline.model.segment import Segment
from leadline.weights.convert import Conversion, convert, prepare
from leadline.weights.files import CheckpointReader
from leadline.weights.header import TensorInfo
from leadline.weights.load import load_checkpoint
from leadline.weights.synthetic import few_layers, make_checkpoint

# Wide enough for whole blocks of 128, which transformers needs.
CONFIG = PRESETS["tiny"].replace(
    hidden_size=128, moe_intermediate_size=128, q_lora_rank=128, head_dim=128, qk_rope_head_dim=64, o_lora_rank=64,
    index_head_dim=128,
)  # fmt: skip


@pytest.fixture
def four(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "four", CONFIG, "fp4")
    return tmp_path / "four"


def converted(source: Path, target: Path, **options: Any) -> Path:
    convert(prepare(source, Conversion(**options)), target)
    return target


# -- transformers --


def loaded_by_transformers(folder: Path) -> Any:
    """The model in float32; nothing may be missing, unexpected or of another shape."""
    from transformers import DeepseekV4ForCausalLM

    loader: Any = DeepseekV4ForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, report = loader.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.float()


@pytest.mark.parametrize(
    ("format", "naming"),
    [
        ("fp4", "official"), ("fp8", "official"), ("bf16", "official"), ("bf16", "transformers"),
        ("bf16", "transformers_saved"),
    ],
)  # fmt: skip
def test_transformers_computes_the_same_logits(tmp_path: Path, four: Path, format: str, naming: str) -> None:
    folder = converted(four, tmp_path / "folder", format=format, naming=naming)
    theirs = loaded_by_transformers(folder)
    ours = load_checkpoint(four, dtype=torch.float32)
    tokens_T = torch.randint(CONFIG.vocab_size, (140,))
    with torch.no_grad():
        logits_TV = ours.logits(ours.hidden(ours(Segment.of(tokens_T)).streams_TSD))
        torch.testing.assert_close(theirs(tokens_T[None]).logits[0], logits_TV, rtol=0, atol=5e-5)


@pytest.mark.parametrize("format", ["fp8", "fp4"])
def test_stacked_names_are_those_of_transformers_modules_for_quantised_weights(
    tmp_path: Path, four: Path, format: str
) -> None:
    """Its FP8 modules run on a GPU only; here they are built without memory."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
    from transformers.utils.quantization_config import FineGrainedFP8Config

    # Its stacks have whole blocks: an expert's gate and up matrix of 128 rows are one block each.
    folder = converted(four, tmp_path / "folder", format=format, naming="transformers", scales=torch.float8_e8m0fnu)
    config = DeepseekV4Config.from_pretrained(folder)
    quantization: Any = config.quantization_config
    assert quantization["expert_dtype"] == format, "moved there by its own config class"
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(config)
    model = replace_with_fp8_linear(model, ["lm_head"], FineGrainedFP8Config(**quantization), pre_quantized=True)
    theirs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    ours = CheckpointReader(folder).tensors
    quantised = {
        name: (info.dtype, info.shape)
        for name, info in ours.items()
        if not name.startswith("mtp.") and (f"{name}_scale_inv" in ours or name.endswith("_scale_inv"))
    }
    assert len(quantised) == 84
    assert {name: theirs[name] for name in quantised} == quantised


# -- vLLM 0.33.0 --

# Attributes of the config object that models/deepseek_v4 reads. The object is transformers' DeepseekV4Config.
VLLM_FIELDS = {
    "compress_rates", "compress_rope_theta", "hc_eps", "hc_mult", "hc_sinkhorn_iters", "head_dim", "hidden_act",
    "hidden_size", "index_head_dim", "index_n_heads", "index_topk", "layer_types", "max_position_embeddings",
    "mlp_layer_types", "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "norm_topk_prob",
    "num_attention_heads", "num_experts_per_tok", "num_hidden_layers", "num_nextn_predict_layers", "o_groups",
    "o_lora_rank", "q_lora_rank", "qk_rope_head_dim", "rms_norm_eps", "rope_parameters", "rope_theta",
    "routed_scaling_factor", "scoring_func", "sliding_window", "swiglu_limit", "topk_method", "vocab_size",
}  # fmt: skip
# What its loader makes of the scales: experts' FP4 scales apart, everything else as block scales.
VLLM_SCALES = re.compile(r"(.*\.experts\.\d+\.w[123]|.*)\.scale")


@pytest.mark.parametrize("naming", ["official", "transformers"])
@pytest.mark.parametrize("format", ["bf16", "fp8", "fp4"])
def test_vllm_finds_its_fields(tmp_path: Path, format: str, naming: str) -> None:
    from transformers import DeepseekV4Config

    make_checkpoint(tmp_path / "model", CONFIG, format, naming=naming)
    config: Any = DeepseekV4Config.from_pretrained(tmp_path / "model")
    assert not {name for name in VLLM_FIELDS if getattr(config, name, None) is None}
    # It takes a folder without expert_dtype for FP4, and FP8 experts for float32 scales.
    assert getattr(config, "expert_dtype", "fp4") == ("fp8" if format == "fp8" else "fp4")
    if format == "bf16":
        assert getattr(config, "quantization_config", None) is None
    else:
        assert config.quantization_config["quant_method"] == "fp8"
        assert config.quantization_config["weight_block_size"] == [128, 128]
    rates = {"sliding_attention": 0, **config.compress_rates}
    ratios = [rates[name] for name in config.layer_types] + [0] * config.num_nextn_predict_layers
    assert tuple(ratios) == CONFIG.compress_ratios
    assert config.mlp_layer_types.count("hash_moe") == CONFIG.num_hash_layers
    assert config.rope_parameters["compress"]["rope_theta"] == CONFIG.compress_rope_theta
    assert config.rope_parameters["main"]["rope_theta"] == CONFIG.rope_theta


@pytest.mark.parametrize(("format", "scales"), [("fp8", torch.float32), ("fp4", torch.float8_e8m0fnu)])
def test_scales_have_the_names_and_dtypes_that_vllm_expects(tmp_path: Path, format: str, scales: torch.dtype) -> None:
    make_checkpoint(tmp_path / "model", CONFIG, format)
    tensors = CheckpointReader(tmp_path / "model").tensors
    named = {name: info for name, info in tensors.items() if name.endswith(".scale")}
    assert all(VLLM_SCALES.fullmatch(name) for name in named)
    assert {info.dtype for info in named.values()} == {scales}
    codes = {torch.float8_e4m3fn, torch.int8} if format == "fp4" else {torch.float8_e4m3fn}

    def weight_of(name: str) -> TensorInfo:
        return tensors[name.removesuffix(".scale") + ".weight"]

    assert {weight_of(name).dtype for name in named} == codes


def test_vllm_finds_the_fields_of_draft_stages(tmp_path: Path) -> None:
    from transformers import DeepseekV4Config

    make_checkpoint(tmp_path / "model", few_layers(CONFIG, 4, draft_stages=True), "fp4")
    config: Any = DeepseekV4Config.from_pretrained(tmp_path / "model")
    assert config.dspark_target_layer_ids == [1, 2, 3]
    assert config.dspark_markov_rank == 8
    assert len(config.layer_types) == config.num_hidden_layers == 4


# -- SGLang 0.5.23 --

# Keys of config.json that models/deepseek_v4.py, its experts in deepseek_v2.py and configs/model_config.py read. Its
# config class is that of DeepSeek-V3 under another name: a key that is missing silently has V3's value or none, which
# is why it needs the official spelling.
SGLANG_FIELDS = {
    "architectures", "compress_ratios", "compress_rope_theta", "hc_eps", "hc_mult", "hc_sinkhorn_iters", "head_dim",
    "hidden_act", "hidden_size", "index_head_dim", "index_n_heads", "index_topk", "max_position_embeddings",
    "model_type", "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "norm_topk_prob",
    "num_attention_heads", "num_experts_per_tok", "num_hash_layers", "num_hidden_layers", "num_key_value_heads",
    "num_nextn_predict_layers", "o_groups", "o_lora_rank", "q_lora_rank", "qk_rope_head_dim", "rms_norm_eps",
    "rope_scaling", "rope_theta", "routed_scaling_factor", "scoring_func", "sliding_window", "swiglu_limit",
    "tie_word_embeddings", "topk_method", "vocab_size",
}  # fmt: skip
SGLANG_DRAFT_FIELDS = {
    "dspark_block_size", "dspark_markov_rank", "dspark_noise_token_id", "dspark_target_layer_ids"
}  # fmt: skip


@pytest.mark.parametrize("format", ["bf16", "fp8", "fp4"])
def test_sglang_finds_its_fields(tmp_path: Path, format: str) -> None:
    make_checkpoint(tmp_path / "model", few_layers(CONFIG, 4, draft_stages=True), format)
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert values.keys() >= SGLANG_FIELDS | SGLANG_DRAFT_FIELDS
    assert values["architectures"] == ["DeepseekV4ForCausalLM"]
    assert {"type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"} <= values[
        "rope_scaling"
    ].keys()
    assert len(values["compress_ratios"]) == 4 + len(values["dspark_target_layer_ids"])
    # It tells the experts' format by the dtype of one of their tensors.
    experts = CheckpointReader(tmp_path / "model").tensors["layers.0.ffn.experts.0.w1.weight"]
    assert experts.dtype == {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp4": torch.int8}[format]


def test_the_released_config_has_all_fields() -> None:
    for preset in ("flash", "pro"):
        values = PRESETS[preset].to_dict()
        assert values.keys() >= SGLANG_FIELDS | {"expert_dtype", "quantization_config"}
        assert ModelConfig.from_dict(values) == PRESETS[preset]
