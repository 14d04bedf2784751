"""The plan of a folder against the headers of a released one, and save in every format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from leadline.model.config import PRESETS, ModelConfig
from leadline.model.transformer import Transformer
from leadline.weights.expected import expected_shapes
from leadline.weights.files import TensorSpec
from leadline.weights.header import CheckpointError, dtype_name
from leadline.weights.load import load_checkpoint
from leadline.weights.save import save_checkpoint
from leadline.weights.synthetic import few_layers
from leadline.weights.target import SCALES, config_of, form_of, plan

GOLDEN = Path(__file__).parents[1] / "golden"
WIDE = PRESETS["tiny"].replace(moe_intermediate_size=128)


def specs_of(config: ModelConfig, format: str, naming: str = "official") -> dict[str, TensorSpec]:
    shapes = expected_shapes(config)
    dtypes = {name: torch.int64 if name.endswith("tid2eid") else torch.bfloat16 for name in shapes}
    forms = {name: form_of(name, dtypes[name], format, SCALES.get(format, torch.float32)) for name in shapes}
    return {spec[0]: spec for output in plan(shapes, forms, naming) for spec in output.specs}


def test_the_released_headers_of_flash_0731() -> None:
    """Every name, dtype and shape of a pruned copy with 160 experts, whose widths are the original's."""
    released = json.loads((GOLDEN / "headers_flash_0731.json").read_text())
    config = few_layers(PRESETS["flash"], 43, 160, draft_stages=True)
    found = specs_of(config, "fp4")
    assert len(found) == 45821
    layers = {name.split(".")[1] for name in released if name.startswith("layers.")}
    ours = {
        name: [dtype_name(dtype), *shape]
        for name, dtype, shape in found.values()
        if (not name.startswith("layers.") or name.split(".")[1] in layers)
        and (".experts." not in name or ".experts.0." in name)
    }
    assert released == ours


@pytest.mark.parametrize(
    ("preset", "widths"), [("flash", (4096, 2048, 1024, 8192)), ("pro", (7168, 3072, 1536, 16384))]
)
def test_the_base_models_have_eight_bits_throughout_and_float32_scales(
    preset: str, widths: tuple[int, int, int, int]
) -> None:
    width, expert, query, output = widths
    specs = specs_of(few_layers(PRESETS[preset], 3, 2), "fp8")
    found = {name: (dtype, shape) for name, dtype, shape in specs.values() if name.startswith("layers.2.")}
    e4m3, f32, bf16 = torch.float8_e4m3fn, torch.float32, torch.bfloat16
    for name, wanted in {
        "ffn.experts.1.w1.weight": (e4m3, (expert, width)),
        "ffn.experts.1.w1.scale": (f32, (expert // 128, width // 128)),
        "ffn.experts.1.w2.scale": (f32, (width // 128, expert // 128)),
        "attn.wq_a.scale": (f32, (query // 128, width // 128)),
        "attn.wo_b.weight": (e4m3, (width, output)),
        "attn.compressor.wkv.weight": (bf16, (1024, width)),
        "attn.indexer.weights_proj.weight": (bf16, (64, width)),
        "ffn.gate.weight": (bf16, (2, width)),
        "ffn.gate.tid2eid": (torch.int64, (129280, 2)),
        "hc_attn_fn": (f32, (24, 4 * width)),
        "attn.attn_sink": (f32, (width // 64 if preset == "flash" else 128,)),
    }.items():
        assert found["layers.2." + name] == wanted, name
    assert {dtype for name, (dtype, _) in found.items() if name.endswith(".scale")} == {f32}


def test_names_of_transformers() -> None:
    specs = specs_of(few_layers(PRESETS["flash"], 3, 8), "fp4", "transformers")
    assert specs["model.layers.2.mlp.experts.gate_up_proj"][1:] == (torch.int8, (8, 4096, 2048))
    assert specs["model.layers.2.mlp.experts.gate_up_proj_scale_inv"][1:] == (torch.float8_e8m0fnu, (8, 4096, 128))
    assert specs["model.layers.2.self_attn.q_a_proj.weight_scale_inv"][1:] == (torch.float8_e8m0fnu, (8, 32))
    assert specs["model.layers.2.self_attn.compressor.indexer.q_b_proj.weight"][1] == torch.float8_e4m3fn
    assert specs["mtp.0.ffn.experts.3.w2.scale"][1:] == (torch.float8_e8m0fnu, (4096, 64))


@pytest.mark.parametrize(
    ("format", "expert_dtype", "quantised"), [("bf16", None, False), ("fp8", "fp8", True), ("fp4", "fp4", True)]
)
def test_config_fields(format: str, expert_dtype: str | None, quantised: bool) -> None:
    config = config_of(PRESETS["flash"], format)
    assert config.expert_dtype == expert_dtype
    assert (config.quantization_config is not None) == quantised
    if format == "fp4":
        assert config == PRESETS["flash"], "the preset is the released model"


def test_unknown_format() -> None:
    with pytest.raises(ValueError, match="format 'int8' is not one of bf16, fp8, fp4"):
        form_of("embed.weight", torch.float32, "int8", torch.float32)


# -- save_checkpoint(format=...) --


@pytest.mark.parametrize("naming", ["official", "transformers"])
@pytest.mark.parametrize("format", ["bf16", "fp8", "fp4"])
def test_a_model_is_saved_in_a_format(
    build_model: Callable[..., Transformer], tmp_path: Path, format: str, naming: str
) -> None:
    model = build_model(WIDE)
    save_checkpoint(model, WIDE, tmp_path / "model", format=format, naming=naming, max_shard_bytes=100_000)
    specs = specs_of(WIDE, format, naming)
    stored = {n: t for file in (tmp_path / "model").glob("*.safetensors") for n, t in load_file(file).items()}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == {
        name: spec[1:] for name, spec in specs.items()
    }
    loaded = load_checkpoint(tmp_path / "model", dtype=torch.float32)
    assert loaded.config == config_of(WIDE, format)
    bound = {"bf16": 4e-3, "fp8": 0.04, "fp4": 0.15}[format]
    for name, tensor in model.state_dict().items():
        assert (loaded.state_dict()[name] - tensor).double().norm() <= bound * tensor.double().norm(), name


def test_dtype_and_format_exclude_each_other(build_model: Callable[..., Transformer], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype torch\.bfloat16 and format fp8 exclude each other"):
        save_checkpoint(build_model(), PRESETS["tiny"], tmp_path / "a", dtype=torch.bfloat16, format="fp8")


def test_a_model_with_infinite_weights_is_not_quantised(
    build_model: Callable[..., Transformer], tmp_path: Path
) -> None:
    model = build_model(WIDE)
    model.state_dict()["layers.1.attn.wkv.weight"][3, 4] = float("inf")
    with pytest.raises(CheckpointError, match=r"tensor layers\.1\.attn\.wkv\.weight: holds infinity or NaN"):
        save_checkpoint(model, WIDE, tmp_path / "model", format="fp8")
    assert list(tmp_path.iterdir()) == []
