"""A weight in its format: one forward, names of the files, and what can be put in its place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from leadline.model.config import TINY
from leadline.model.linear import GroupedOutput, Linear, grouped_output, linears
from leadline.model.moe import Experts
from leadline.ops.grouped_product import GroupedProduct
from leadline.ops.quantized_linear import FORMATS, Format, quantize, quantized_linear
from leadline.ops.route import Route
from leadline.ops.token_permutation import expert_order


@pytest.mark.parametrize("format", FORMATS)
def test_one_forward_for_both(format: Format) -> None:
    linear, x = Linear(160, 130), torch.randn(2, 3, 160)
    nn.init.normal_(linear.weight)
    assert torch.equal(linear(x), x @ linear.weight.T) or torch.allclose(linear(x), x @ linear.weight.T)
    weight = quantize(linear.weight.detach(), format)
    linear.hold(weight)
    assert torch.equal(linear(x), quantized_linear(x, weight))
    assert dict(linear.named_parameters()) == {}
    state = linear.state_dict()
    assert state.keys() == {"weight", "scale"}
    assert (state["weight"].dtype, state["scale"].dtype) == (weight.codes.dtype, weight.scale.dtype)


@pytest.mark.parametrize("formats", [("fp8", "fp8"), ("fp4", "fp4"), ("fp8", "fp4"), (None, "fp8"), (None, None)])
def test_two_maps_of_one_input(formats: tuple[Format | None, Format | None]) -> None:
    """Whatever they are held in, as one after the other."""
    maps, x = (Linear(160, 130), Linear(160, 128)), torch.randn(3, 160)
    for linear, format in zip(maps, formats, strict=True):
        nn.init.normal_(linear.weight)
        if format is not None:
            linear.hold(quantize(linear.weight.detach(), format))
    for found, linear in zip(linears(x, *maps), maps, strict=True):
        assert torch.equal(found, linear(x))


def test_a_floating_weight_has_no_scale_on_file() -> None:
    assert Linear(4, 3).state_dict().keys() == {"weight"}
    assert Experts(TINY).state_dict().keys() == {"w1", "w2", "w3"}


@pytest.mark.parametrize("format", FORMATS)
def test_experts_hold_stacks(format: Format) -> None:
    experts = Experts(TINY)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=0.3)
    plain = copy.deepcopy(experts)
    for name in ("w1", "w2", "w3"):
        weight = quantize(getattr(experts, name).detach(), format)
        experts.hold(weight, name)
        with torch.no_grad():
            getattr(plain, name).copy_(weight.values())
    assert experts.state_dict().keys() == {"w1", "w1_scale", "w2", "w2_scale", "w3", "w3_scale"}
    x, scores = torch.randn(9, TINY.hidden_size), torch.rand(9, TINY.n_routed_experts)
    chosen = scores.topk(2).indices
    route = Route(chosen, scores.gather(1, chosen), scores, expert_order(chosen, TINY.n_routed_experts))
    out, wanted = (layer(x, route, lambda: torch.zeros_like(x)) for layer in (experts, plain))
    # Three roundings of activations to E4M3 are between the two.
    assert 0 < (out - wanted).norm() / wanted.norm() < 0.1


def test_half_quantised_experts_are_a_mistake() -> None:
    experts = Experts(TINY)
    experts.hold(quantize(torch.randn(experts.w1.shape), "fp8"), "w1")
    with pytest.raises(AssertionError, match="w1 and w3 are held in different formats"):
        experts._multiply(torch.randn(1, TINY.hidden_size), ("w1", "w3"), torch.tensor([1] + [0] * 7))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_grouped_output(groups: int) -> None:
    output, x = GroupedOutput(groups, 12, 5), torch.randn(7, groups, 12)
    nn.init.normal_(output.weight)
    y = output(x)
    assert y.shape == (7, groups, 5)
    for o in range(groups):
        torch.testing.assert_close(y[:, o], x[:, o] @ output.weight[5 * o : 5 * o + 5].T, rtol=1e-5, atol=1e-5)


def test_the_grouped_product_of_the_card_and_its_gradients() -> None:
    x = torch.randn(5, 3, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GroupedProduct.apply, (x, weight))
    torch.testing.assert_close(GroupedProduct.apply(x, weight), grouped_output(x, weight.flatten(0, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_output_takes_values(dtype: torch.dtype) -> None:
    output = GroupedOutput(2, 160, 3).to(dtype)
    weight = quantize(torch.randn(6, 160), "fp8")
    output.hold(weight)
    assert (output.weight.dtype, output.weight.requires_grad) == (dtype, True)
    assert torch.equal(output.weight.float(), weight.values()), "E4M3 times a power of two is exact in bfloat16"


def test_shapes_must_fit() -> None:
    linear, experts, output = Linear(64, 8), Experts(TINY), GroupedOutput(2, 64, 4)
    weight = quantize(torch.randn(8, 32), "fp4")
    with pytest.raises(ValueError, match=r"Linear.weight is \[8, 64\], the fp4 weight for it is \[8, 32\]"):
        linear.hold(weight)
    with pytest.raises(ValueError, match=r"Experts.w2 is \[8, 64, 32\], the fp4 weight for it is \[8, 32\]"):
        experts.hold(weight, "w2")
    with pytest.raises(ValueError, match=r"GroupedOutput.weight is \[8, 64\]"):
        output.hold(weight)
    assert isinstance(linear.weight, nn.Parameter)


def test_on_the_meta_device() -> None:
    """A model that was built without memory takes its weights one by one."""
    with torch.device("meta"):
        linear, output = Linear(64, 8), GroupedOutput(2, 64, 4)
    weight = quantize(torch.randn(8, 64), "fp8")
    linear.hold(weight)
    output.hold(weight)
    assert torch.equal(output.weight, weight.values())
    assert linear(torch.randn(3, 64)).shape == (3, 8)
