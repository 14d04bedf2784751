"""Saving: bitwise round trips, what transformers makes of it, and that failure leaves nothing behind."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from leadline.model.config import PRESETS, ModelConfig
from leadline.model.transformer import Transformer
from leadline.weights.files import ShardWriter
from leadline.weights.load import load_checkpoint
from leadline.weights.names import NAMINGS, keeps_float32
from leadline.weights.save import save_checkpoint

TINY = PRESETS["tiny"]
Build = Callable[..., Transformer]


def assert_equal(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def loaded_by_transformers(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model, and what its loader reports as missing, unexpected or mismatched."""
    from transformers import DeepseekV4ForCausalLM

    loader: Any = DeepseekV4ForCausalLM
    return loader.from_pretrained(folder, output_loading_info=True)


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000])
def test_load_after_save_is_bitwise(
    build_model: Build, tmp_path: Path, naming: str, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    model = build_model()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if keeps_float32(name) else parameter.data.to(dtype)
    save_checkpoint(model, TINY, tmp_path / "model", naming=naming, max_shard_bytes=max_shard_bytes)
    loaded = load_checkpoint(tmp_path / "model")
    assert_equal(loaded, model)
    assert loaded.config.layer_ratios == TINY.layer_ratios
    assert loaded.config.torch_dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("naming", NAMINGS)
def test_transformers_loads_every_naming_completely(build_model: Build, tmp_path: Path, naming: str) -> None:
    model = build_model()
    save_checkpoint(model, TINY, tmp_path / "model", naming=naming, max_shard_bytes=200_000)
    theirs, report = loaded_by_transformers(tmp_path / "model")
    assert not any(report.values()), report
    tensors = theirs.state_dict()
    ours = model.state_dict()
    assert torch.equal(tensors["lm_head.weight"], ours["head.weight"])
    for layer in range(TINY.num_hidden_layers):
        there, here = f"model.layers.{layer}.mlp.experts.", f"layers.{layer}.ffn.experts."
        assert torch.equal(tensors[there + "gate_up_proj"], torch.cat([ours[here + "w1"], ours[here + "w3"]], dim=1))
        assert torch.equal(tensors[there + "down_proj"], ours[here + "w2"])
    assert theirs.config.layer_types[1] == "compressed_sparse_attention"
    assert theirs.generation_config.do_sample is True


@pytest.mark.parametrize(
    ("naming", "original_format"),
    [("official", True), ("transformers_saved", True), ("official", False), ("transformers", False)],
)
def test_what_transformers_saves_can_be_loaded(
    build_model: Build, tmp_path: Path, naming: str, original_format: bool
) -> None:
    model = build_model()
    save_checkpoint(model, TINY, tmp_path / "ours", naming=naming)
    theirs, _ = loaded_by_transformers(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs", save_original_format=original_format)
    loaded = load_checkpoint(tmp_path / "theirs", with_mtp=False)
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert {name for name in expected if not name.startswith("mtp.")} == loaded.state_dict().keys()


def test_dtype_argument(build_model: Build, tmp_path: Path) -> None:
    model = build_model()
    save_checkpoint(model, TINY, tmp_path / "model", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert tensors["layers.1.attn.wq_a.weight"].dtype == torch.bfloat16
    assert tensors["layers.1.ffn.experts.3.w2.weight"].dtype == torch.bfloat16
    assert tensors["layers.1.attn.compressor.ape"].dtype == torch.float32
    assert tensors["layers.1.ffn.gate.bias"].dtype == torch.float32
    assert tensors["layers.0.ffn.gate.tid2eid"].dtype == torch.int64
    assert torch.equal(tensors["norm.weight"], model.norm.weight.bfloat16())
    with pytest.raises(ValueError, match=r"saved as torch\.float8"):
        save_checkpoint(model, TINY, tmp_path / "other", dtype=torch.float8_e4m3fn)


def test_config_says_what_the_weights_are(build_model: Build, tmp_path: Path) -> None:
    """A config of a released model announces FP8 and FP4; plain weights under it would be misread."""
    config: ModelConfig = TINY.replace(
        torch_dtype="bfloat16", expert_dtype="fp4", quantization_config={"quant_method": "fp8"}, extra={"kept": [1]}
    )
    save_checkpoint(build_model(), config, tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert values["torch_dtype"] == "float32"
    assert values["kept"] == [1]
    assert "quantization_config" not in values
    assert "expert_dtype" not in values


def test_folder_holds_tokenizer_and_generation_config(build_model: Build, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"a": 1}')
    files = [tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"]
    for _ in range(2):
        save_checkpoint(build_model(), TINY, tmp_path / "model", tokenizer_files=files)
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert (tmp_path / "model" / "tokenizer_config.json").read_text() == '{"a": 1}'
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation == {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "bos_token_id": 0, "eos_token_id": 1}


def test_failure_keeps_the_old_checkpoint_and_leaves_no_debris(
    build_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build_model()
    save_checkpoint(old, TINY, tmp_path / "model")
    written = 0
    append = ShardWriter.append

    def failing(self: ShardWriter, name: str, piece: torch.Tensor) -> None:
        nonlocal written
        written += 1
        if written == 100:
            raise OSError(28, "No space left on device")
        append(self, name, piece)

    monkeypatch.setattr(ShardWriter, "append", failing)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(build_model(), TINY, tmp_path / "model", max_shard_bytes=50_000)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert_equal(load_checkpoint(tmp_path / "model"), old)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "notes.txt"])
def test_only_tokenizer_files_are_copied(build_model: Build, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match="is no tokenizer file"):
        save_checkpoint(build_model(), TINY, tmp_path / "model", tokenizer_files=[tmp_path / name])
    assert not (tmp_path / "model").exists()


def test_foreign_folder_is_not_replaced(build_model: Build, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        save_checkpoint(build_model(), TINY, tmp_path / "model")
    assert (tmp_path / "model" / "notes.txt").read_text() == "precious"


def test_unknown_naming(build_model: Build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="naming 'hf' is not one of official, transformers, transformers_saved"):
        save_checkpoint(build_model(), TINY, tmp_path / "model", naming="hf")


def anonymous_bytes() -> int:
    """Memory of this process that is no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon line")


@pytest.mark.parametrize("naming", ["official", "transformers"])
def test_saving_holds_no_second_copy(
    build_model: Build, tmp_path: Path, naming: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: ModelConfig = TINY.replace(n_routed_experts=64, moe_intermediate_size=256, vocab_size=8192)
    model = build_model(config)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    samples: list[int] = []
    append = ShardWriter.append

    def sampling(self: ShardWriter, name: str, piece: torch.Tensor) -> None:
        append(self, name, piece)
        samples.append(anonymous_bytes())

    monkeypatch.setattr(ShardWriter, "append", sampling)
    before = anonymous_bytes()
    save_checkpoint(model, config, tmp_path / "model", naming=naming, dtype=torch.bfloat16)
    assert max(samples) - before < 0.1 * size
