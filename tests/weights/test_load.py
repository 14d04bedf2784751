"""Loading: either naming, either device state, and every way in which a folder can fail to fit a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from leadline.model.config import PRESETS, ModelConfig
from leadline.model.transformer import Transformer
from leadline.weights.header import CheckpointError
from leadline.weights.load import load_checkpoint, load_weights
from leadline.weights.names import NAMINGS, keeps_float32
from leadline.weights.place import Place, weights_of
from leadline.weights.save import save_checkpoint
from leadline.weights.stored import StoredReader, Value, as_float
from leadline.weights.synthetic import few_layers, make_checkpoint

TINY = PRESETS["tiny"]
WITHOUT_MTP = TINY.replace(num_nextn_predict_layers=0, compress_ratios=TINY.layer_ratios)
Build = Callable[..., Transformer]


def assert_equal(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def saved(build_model: Build, tmp_path: Path) -> tuple[Transformer, Path]:
    model = build_model()
    save_checkpoint(model, TINY, tmp_path / "model")
    return model, tmp_path / "model"


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_same_tensor_objects_are_filled(saved: tuple[Transformer, Path], build_model: Build) -> None:
    """Optimisers and views that hold the parameters must see the new values."""
    model, folder = saved
    other = build_model()
    before = {name: tensor.data_ptr() for name, tensor in other.state_dict().items()}
    load_weights(other, folder)
    assert_equal(other, model)
    assert {name: tensor.data_ptr() for name, tensor in other.state_dict().items()} == before


def test_meta_model_is_materialised(saved: tuple[Transformer, Path]) -> None:
    model, folder = saved
    with torch.device("meta"):
        other = Transformer(TINY)
    other.embed.weight.requires_grad_(False)
    load_weights(other, folder)
    assert_equal(other, model)
    assert not other.embed.weight.requires_grad
    assert other.head.weight.requires_grad
    assert isinstance(other.head.weight, torch.nn.Parameter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_argument_spares_what_the_release_keeps_in_float32(
    saved: tuple[Transformer, Path], dtype: torch.dtype
) -> None:
    model, folder = saved
    loaded = load_checkpoint(folder, dtype=dtype).state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float32 if keeps_float32(name) else dtype)
        assert loaded[name].dtype == tensor.dtype, name
        assert torch.equal(loaded[name], tensor), name


def test_bfloat16_file_into_float32_model(build_model: Build, tmp_path: Path) -> None:
    model = build_model()
    save_checkpoint(model, TINY, tmp_path / "model", dtype=torch.bfloat16)
    other = build_model()
    load_weights(other, tmp_path / "model")
    for name, tensor in model.state_dict().items():
        rounded = tensor if keeps_float32(name) or not tensor.is_floating_point() else tensor.bfloat16().float()
        assert torch.equal(other.state_dict()[name], rounded), name


def test_model_in_float64_needs_float64_files(build_model: Build, tmp_path: Path) -> None:
    model = build_model().double()
    save_checkpoint(model, TINY, tmp_path / "model")
    other = build_model().double()
    load_weights(other, tmp_path / "model")
    assert_equal(other, model)
    with pytest.raises(CheckpointError, match=r"is F64 .* needs F32"):
        load_weights(build_model(), tmp_path / "model")


def test_mtp_is_left_out_on_request_only(saved: tuple[Transformer, Path], build_model: Build) -> None:
    model, folder = saved
    trunk = load_checkpoint(folder, with_mtp=False)
    names = [name for name in model.state_dict() if not name.startswith("mtp.")]
    assert list(trunk.state_dict()) == names
    assert all(torch.equal(trunk.state_dict()[name], model.state_dict()[name]) for name in names)
    with pytest.raises(CheckpointError, match=r"holds mtp\.0\..* which the model does not have; .*ignore_mtp"):
        load_weights(build_model(WITHOUT_MTP), folder)


def test_mtp_must_be_in_the_folder_when_the_model_has_it(build_model: Build, tmp_path: Path) -> None:
    save_checkpoint(build_model(WITHOUT_MTP), WITHOUT_MTP, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"lacks mtp\.0\..* and \d+ more; .*with_mtp=False"):
        load_weights(build_model(), tmp_path / "model")


@pytest.mark.parametrize("naming", NAMINGS)
def test_missing_tensor_is_named(build_model: Build, tmp_path: Path, naming: str) -> None:
    save_checkpoint(build_model(), TINY, tmp_path / "model", naming=naming)
    names = list(load_file(tmp_path / "model" / "model.safetensors"))
    for name in names[:: len(names) // 7]:
        folder = tmp_path / "cut"
        shutil.copytree(tmp_path / "model", folder)
        edit(folder, lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(CheckpointError) as caught:
            load_weights(build_model(), folder)
        assert f"lacks {name}" in str(caught.value)
        shutil.rmtree(folder)


def test_surplus_tensor_is_named(saved: tuple[Transformer, Path], build_model: Build) -> None:
    _, folder = saved
    edit(folder, lambda tensors: tensors.update({"layers.9.attn.wq_a.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"holds layers\.9\.attn\.wq_a\.weight, which the model does not have"):
        load_weights(build_model(), folder)


@pytest.mark.parametrize(
    ("name", "tensor", "found", "needed"),
    [
        ("embed.weight", torch.zeros(255, 64), "F32 [255, 64]", "embed.weight needs F32 [256, 64]"),
        ("layers.1.attn.wq_a.weight", torch.zeros(64, 32), "F32 [64, 32]", "attn.wq_a.weight needs F32 [32, 64]"),
        ("layers.0.ffn.gate.tid2eid", torch.zeros(256, 2), "F32 [256, 2]", "gate.tid2eid needs I64 [256, 2]"),
        ("layers.0.ffn.gate.tid2eid", torch.zeros(256, 2).int(), "I32 [256, 2]", "gate.tid2eid needs I64 [256, 2]"),
        ("layers.1.ffn.gate.bias", torch.zeros(8).long(), "I64 [8]", "layers.1.ffn.gate.bias needs F32 [8]"),
        ("layers.1.ffn.gate.bias", torch.zeros(()), "F32 []", "layers.1.ffn.gate.bias needs F32 [8]"),
        ("layers.2.ffn.experts.3.w1.weight", torch.zeros(32, 63), "F32 [32, 63]", "ffn.experts.w1 needs F32 [32, 64]"),
        ("norm.weight", torch.zeros(64).double(), "F64 [64]", "norm.weight needs F32 [64]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_shape_or_dtype_is_named_and_nothing_is_loaded(
    saved: tuple[Transformer, Path], build_model: Build, name: str, tensor: Tensor, found: str, needed: str
) -> None:
    _, folder = saved
    edit(folder, lambda tensors: tensors.update({name: tensor}))
    other = build_model()
    untouched = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(other, folder)
    assert f"model.safetensors: tensor {name} is {found}, the model's" in str(caught.value)
    assert str(caught.value).endswith(needed)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in other.state_dict().items())


def test_fused_tensor_of_the_wrong_width_is_named(build_model: Build, tmp_path: Path) -> None:
    save_checkpoint(build_model(), TINY, tmp_path / "model", naming="transformers")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    edit(tmp_path / "model", lambda tensors: tensors.update({name: torch.zeros(8, 63, 64)}))
    with pytest.raises(CheckpointError, match=r"gate_up_proj is F32 \[8, 63, 64\], .* needs F32 \[8, 64, 64\]"):
        load_weights(build_model(), tmp_path / "model")


def test_experts_of_unlike_dtypes_do_not_decide_by_chance(saved: tuple[Transformer, Path]) -> None:
    _, folder = saved
    name = "layers.1.ffn.experts.5.w1.weight"
    edit(folder, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    with pytest.raises(CheckpointError, match=r"experts\.5\.w1\.weight is BF16 .* needs F32"):
        load_checkpoint(folder)
    assert load_checkpoint(folder, dtype=torch.bfloat16).layers


# -- folders in FP8 and FP4 --


@pytest.fixture
def golden_served() -> Path:
    return Path(__file__).parents[1] / "golden" / "served"


def test_codes_and_scales_are_held_as_they_are(golden_served: Path) -> None:
    tensors = load_file(golden_served / "model.safetensors")
    model = load_checkpoint(golden_served)
    state = model.state_dict()
    for name, tensor in tensors.items():
        if ".experts." in name or ".wo_a." in name or not name.startswith("layers."):
            continue
        ours = name.replace("hc_attn_", "hc_attn.").replace("hc_ffn_", "hc_ffn.")
        assert state[ours].dtype == tensor.dtype, name
        assert torch.equal(state[ours].view(torch.uint8), tensor.view(torch.uint8)), name
    experts = [tensors[f"layers.3.ffn.experts.{expert}.w2.weight"] for expert in range(6)]
    assert torch.equal(state["layers.3.ffn.experts.w2"], torch.stack(experts))
    scales = [tensors[f"layers.3.ffn.experts.{expert}.w2.scale"].view(torch.uint8) for expert in range(6)]
    assert torch.equal(state["layers.3.ffn.experts.w2_scale"].view(torch.uint8), torch.stack(scales))
    assert state["layers.3.attn.wo_a.weight"].dtype == torch.bfloat16, "multiplied in bfloat16"


@pytest.mark.parametrize("naming", ["official", "transformers"])
@pytest.mark.parametrize("format", ["fp8", "fp4"])
def test_every_way_of_loading_has_the_same_values(tmp_path: Path, format: str, naming: str) -> None:
    config = TINY.replace(moe_intermediate_size=128)
    make_checkpoint(tmp_path / "model", config, format, naming=naming)
    held = {name: as_float(weight) for name, weight in weights_of(load_checkpoint(tmp_path / "model")).items()}
    plain = load_checkpoint(tmp_path / "model", dtype=torch.float32)
    filled = Transformer(config)
    load_weights(filled, tmp_path / "model")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, held[name]), name
        assert torch.equal(tensor, filled.state_dict()[name]), name


def test_a_quantised_model_is_saved_as_it_is(golden_served: Path, tmp_path: Path) -> None:
    model = load_checkpoint(golden_served)
    save_checkpoint(model, model.config, tmp_path / "saved")
    saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", golden_served))
    assert {name: (t.dtype, t.shape) for name, t in saved.items()} == {
        n: (t.dtype, t.shape) for n, t in original.items()
    }
    for name, tensor in original.items():
        if ".wo_a." not in name:
            assert torch.equal(saved[name].view(torch.uint8), tensor.view(torch.uint8)), name
    again = load_checkpoint(tmp_path / "saved")
    assert_equal(again, model)
    assert again.config == ModelConfig.from_file(golden_served)


def test_a_quantised_model_is_filled_anew(golden_served: Path) -> None:
    """In place, what follows from the scales included: whoever holds the buffers sees the new values."""
    model = load_checkpoint(golden_served)
    buffers = dict(model.named_buffers())
    wanted = {name: tensor.clone() for name, tensor in buffers.items()}
    for tensor in buffers.values():
        tensor.view(torch.uint8).zero_()
    load_weights(model, golden_served)
    for name, tensor in model.named_buffers():
        assert tensor is buffers[name]
        assert torch.equal(tensor.view(torch.uint8), wanted[name].view(torch.uint8)), name


def test_a_quantised_model_takes_no_plain_weights(golden_served: Path, tmp_path: Path) -> None:
    model = load_checkpoint(golden_served)
    save_checkpoint(model, model.config, tmp_path / "plain", format="bf16")
    with pytest.raises(
        CheckpointError, match=r"wq_a\.weight is BF16 \[128, 128\], the model's .* needs FP8 \[128, 128\]"
    ):
        load_weights(model, tmp_path / "plain")


def test_experts_that_are_multiplied_together_need_one_format(tmp_path: Path) -> None:
    config = TINY.replace(moe_intermediate_size=128)
    make_checkpoint(tmp_path / "model", config, "fp4")
    make_checkpoint(tmp_path / "eight", config, "fp8", scales=torch.float8_e8m0fnu)
    other = load_file(tmp_path / "eight" / "model.safetensors")
    edit(
        tmp_path / "model",
        lambda tensors: tensors.update({n: t for n, t in other.items() if "layers.1.ffn.experts" in n and ".w3." in n}),
    )
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.ffn\.experts\.w1 is FP4, its w3 FP8: both must have one format"
    ):
        load_checkpoint(tmp_path / "model")
    assert load_checkpoint(tmp_path / "model", dtype=torch.bfloat16).layers


def test_experts_of_one_stack_in_several_formats(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", TINY, "fp4")

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["layers.1.ffn.experts.5.w1.scale"]
        tensors["layers.1.ffn.experts.5.w1.weight"] = torch.ones(32, 64).bfloat16()

    edit(tmp_path / "model", change)
    with pytest.raises(
        CheckpointError, match=r"experts\.5\.w1\.weight is BF16 \[32, 64\], .*experts\.w1 needs FP4 \[32, 64\]"
    ):
        load_checkpoint(tmp_path / "model")
    assert load_checkpoint(tmp_path / "model", dtype=torch.bfloat16).layers


def test_experts_too_uneven_for_eight_bits_are_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", TINY, "fp4")
    name = "layers.2.ffn.experts.3.w2.scale"
    edit(tmp_path / "model", lambda tensors: tensors[name].view(torch.uint8)[5, 0].fill_(90))
    with pytest.raises(CheckpointError, match=r"layers\.2\.ffn\.experts\.w2: the sub-scales of block \[3, 0, 0\]"):
        load_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    ("format", "naming"),
    [("fp4", "official"), ("fp8", "official"), ("bf16", "official"), ("fp4", "transformers"), ("bf16", "transformers")],
)
def test_draft_stages_come_and_go_to_the_bit(tmp_path: Path, format: str, naming: str) -> None:
    made, again = tmp_path / "made", tmp_path / "again"
    make_checkpoint(made, few_layers(TINY, 4, draft_stages=True), format)
    model = load_checkpoint(made)
    assert model.dspark is not None
    save_checkpoint(model, model.config, again, naming=naming)
    stages = [{name for name in StoredReader(folder).entries if name.startswith("mtp.")} for folder in (made, again)]
    assert stages[0] == stages[1]
    theirs = load_checkpoint(again)
    assert theirs.config.extra == model.config.extra
    found, wanted = theirs.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_draft_stages_are_left_unread_if_asked(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", few_layers(TINY, 4, draft_stages=True), "fp4")
    model = load_checkpoint(tmp_path / "model", with_mtp=False)
    assert model.config.has_draft_stages
    assert not model.mtp
    with pytest.raises(CheckpointError, match=r"lacks mtp\.0\.e_proj\.weight"):
        load_weights(Transformer(model.config.replace(extra={}, num_nextn_predict_layers=1)), tmp_path / "model")


def test_foreign_checkpoint_is_recognised(tmp_path: Path, build_model: Build) -> None:
    save_file({"transformer.h.0.attn.c_attn.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"it has transformer\.h\.0\..*, expected embed\.weight, "):
        load_weights(build_model(), tmp_path)


def test_value_too_large_for_float16(saved: tuple[Transformer, Path]) -> None:
    _, folder = saved
    edit(folder, lambda tensors: tensors["layers.2.attn.wkv.weight"][3].fill_(1e5))
    assert load_checkpoint(folder, dtype=torch.bfloat16).layers
    with pytest.raises(CheckpointError, match=r"layers\.2\.attn\.wkv\.weight has values that float16 cannot hold"):
        load_checkpoint(folder, dtype=torch.float16)


def test_infinity_in_the_file_is_kept(saved: tuple[Transformer, Path]) -> None:
    """A value of -inf (a sink that is switched off, say) is no overflow."""
    _, folder = saved
    edit(folder, lambda tensors: tensors["norm.weight"][:2].copy_(torch.tensor([float("-inf"), float("nan")])))
    loaded = load_checkpoint(folder, dtype=torch.float16).state_dict()["norm.weight"]
    assert loaded[0] == float("-inf")
    assert loaded[1].isnan()


def test_only_the_three_dtypes(saved: tuple[Transformer, Path]) -> None:
    with pytest.raises(ValueError, match=r"loaded as torch\.float64"):
        load_checkpoint(saved[1], dtype=torch.float64)


def test_truncated_file(saved: tuple[Transformer, Path]) -> None:
    file = saved[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cut short inside tensor .*fetch the file again"):
        load_checkpoint(saved[1])


def anonymous_bytes() -> int:
    """Memory of this process that is no file: mapped pages of a checkpoint do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon line")


@pytest.mark.parametrize("naming", ["official", "transformers"])
def test_loading_holds_one_copy(
    build_model: Build, tmp_path: Path, naming: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: ModelConfig = TINY.replace(n_routed_experts=64, moe_intermediate_size=256, vocab_size=8192)
    model = build_model(config)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    save_checkpoint(model, config, tmp_path / "model", naming=naming)
    del model
    samples: list[int] = []
    read = StoredReader.read

    def sampling(self: StoredReader, name: str) -> Value:
        samples.append(anonymous_bytes())
        return read(self, name)

    monkeypatch.setattr(StoredReader, "read", sampling)
    before = anonymous_bytes()
    loaded = load_checkpoint(tmp_path / "model")
    assert loaded.config == config
    assert size > 60e6
    assert max(samples) - before < 1.1 * size


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_loading_quantised_weights_holds_one_copy(
    tmp_path: Path, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TINY.replace(n_routed_experts=32, moe_intermediate_size=256, hidden_size=256)
    make_checkpoint(tmp_path / "model", config, "fp4", naming="transformers")
    samples: list[int] = []
    fill = Place.fill

    def sampling(self: Place, expert: int | None, value: Value) -> None:
        fill(self, expert, value)
        samples.append(anonymous_bytes())

    monkeypatch.setattr(Place, "fill", sampling)
    before = anonymous_bytes()
    model = load_checkpoint(tmp_path / "model", dtype=dtype)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert size > 15e6
    assert max(samples) - before < 1.1 * size + 4e6
