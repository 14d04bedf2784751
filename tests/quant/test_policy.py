"""Which weight is held in which format, and what quantising a model leaves of it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.model.config import FLASH, TINY
from leadline.model.segment import Segment
from leadline.model.transformer import Transformer
from leadline.ops.quantized_linear import QuantizedWeight, quantize
from leadline.quant.policy import BASE, RELEASED, Policy, policy_of, quantizable, quantize_model

# The published dtypes: what is neither here nor an expert is plain.
FP8 = {
    "attn.wq_a.weight", "attn.wq_b.weight", "attn.wkv.weight", "attn.wo_a.weight", "attn.wo_b.weight",
    "attn.indexer.wq_b.weight", "ffn.shared_experts.w1.weight", "ffn.shared_experts.w2.weight",
    "ffn.shared_experts.w3.weight", "e_proj.weight", "h_proj.weight",
}  # fmt: skip
EXPERTS = {"ffn.experts.w1", "ffn.experts.w2", "ffn.experts.w3"}


def kind(name: str) -> str:
    """The name without the block it is in."""
    parts = name.split(".")
    return ".".join(parts[2:]) if parts[0] in ("layers", "mtp") else name


def test_every_tensor_has_its_published_format() -> None:
    with torch.device("meta"):
        model = Transformer(TINY)
    names = dict(model.named_parameters())
    assert {kind(name) for name in names} >= FP8 | EXPERTS
    for name in names:
        wanted = "fp8" if kind(name) in FP8 else "fp4" if kind(name) in EXPERTS else None
        assert RELEASED.format_of(name) == wanted, name
        assert BASE.format_of(name) == ("fp8" if wanted else None), name
    listed = {name for name, _, _ in quantizable(model)}
    assert {name for name in names if RELEASED.format_of(name)} <= listed


def test_the_policy_of_a_configuration() -> None:
    assert policy_of(TINY) is None
    assert policy_of(FLASH) == RELEASED
    assert policy_of(FLASH.replace(expert_dtype=None)) == BASE


@pytest.mark.parametrize("policy", [RELEASED, BASE], ids=["released", "base"])
def test_a_quantised_model_has_the_values_of_its_codes(
    model: Transformer, policy: Policy, logits_of: Callable[..., Tensor]
) -> None:
    """Every weight is its rounded value, under the names of the files; only the activations' rounding is between this
    model and a floating one of the same values."""
    quantized = copy.deepcopy(model)
    quantize_model(quantized, policy)
    state = quantized.state_dict()
    for name, weight in model.state_dict().items():
        format = policy.format_of(name)
        if format is None:
            assert torch.equal(state[name], weight)
            continue
        rounded = quantize(weight, format)
        if name.endswith("wo_a.weight"):
            assert torch.equal(state[name], rounded.values())
            continue
        scale = state[name.removesuffix(".weight") + (".scale" if name.endswith(".weight") else "_scale")]
        assert scale.dtype == policy.scale_dtype
        assert torch.equal(QuantizedWeight.of(state[name], scale).values(), rounded.values())
    segment = Segment.of(torch.randint(0, TINY.vocab_size, (150,)))
    plain, ours = logits_of(model, segment), logits_of(quantized, segment)
    assert 0 < (ours - plain).norm() / plain.norm() < 0.5


def test_again_is_nothing_new(model: Transformer) -> None:
    quantize_model(model)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items() if "wo_a" not in name}
    values = {name: tensor.clone() for name, tensor in model.state_dict().items() if "wo_a" in name}
    quantize_model(model)
    after = model.state_dict()
    assert before == {name: after[name].data_ptr() for name in before}
    assert all(torch.equal(after[name], value) for name, value in values.items())


def test_codes_do_not_train_and_survive_a_copy(model: Transformer) -> None:
    quantize_model(model)
    trained = {name for name, _ in model.named_parameters()}
    assert not any(RELEASED.format_of(name) for name in trained if "wo_a" not in name)
    twin = copy.deepcopy(model)
    for name, tensor in model.state_dict().items():
        found = twin.state_dict()[name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)), name


def test_memory_is_that_of_the_formats(model: Transformer) -> None:
    experts = model.layers[0].get_submodule("ffn.experts")
    floats = sum(p.numel() for p in experts.parameters())
    quantize_model(model)
    assert sum(b.numel() * b.element_size() for b in experts.buffers()) <= floats * (0.5 + 1 / 32) + 3 * 8 * 4 * 4


def test_a_weight_too_wide_for_eight_bits_is_named(model: Transformer) -> None:
    with torch.no_grad():
        model.get_parameter("layers.1.ffn.experts.w2")[3] = 1.0
        model.get_parameter("layers.1.ffn.experts.w2")[3, 0] = 2.0**-14
    with pytest.raises(ValueError, match=r"layers\.1\.ffn\.experts\.w2: the sub-scales of block \[3, 0, 0\]"):
        quantize_model(model)


def test_a_cast_of_a_quantised_model_is_refused(model: Transformer, logits_of: Callable[..., Tensor]) -> None:
    quantize_model(model)
    with pytest.raises(ValueError, match="do not cast a quantised model"):
        logits_of(model.bfloat16(), Segment.of(torch.arange(3)))
