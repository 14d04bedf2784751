"""Training with the forward of the served model: equal bits, and gradients that pass straight through."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from leadline.formats import fp4, fp8
from leadline.model.config import TINY
from leadline.model.linear import GroupedOutput, Linear
from leadline.model.moe import Experts
from leadline.model.segment import Segment
from leadline.model.transformer import Transformer
from leadline.ops.quantized_linear import FORMATS, Format, QuantizedWeight, quantize, quantized_linear
from leadline.ops.route import Route
from leadline.ops.token_permutation import expert_order
from leadline.quant.policy import BASE, RELEASED, Policy, quantize_model
from leadline.quant.qat import RoundedOutput, RoundedProduct, RoundedProducts, train_quantized


@pytest.mark.parametrize("policy", [RELEASED, BASE], ids=["released", "base"])
def test_the_forward_is_the_served_one(model: Transformer, policy: Policy, logits_of: Callable[..., Tensor]) -> None:
    """Bit for bit, trunk and extra block, over ragged segments."""
    served = copy.deepcopy(model)
    quantize_model(served, policy)
    exact = copy.deepcopy(model)
    train_quantized(model, policy)
    segment = Segment.of(*(torch.randint(0, TINY.vocab_size, (n,)) for n in (1, 129, 4, 20)))
    assert torch.equal(logits_of(model, segment), logits_of(served, segment))
    assert not torch.equal(logits_of(model, segment), logits_of(exact, segment))
    with torch.no_grad():
        second = [m.predict_second(m(segment), segment.tokens_T.roll(-1))[0] for m in (model, served)]
    assert torch.equal(*second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (130, 160), (129, 256)])
def test_linear(format: Format, dtype: torch.dtype, rows: int, columns: int) -> None:
    linear, served = Linear(columns, rows).to(dtype), Linear(columns, rows).to(dtype)
    nn.init.normal_(linear.weight)
    served.hold(quantize(linear.weight.detach(), format))
    linear.product = RoundedProduct(format, "linear")
    for shape in ((3, columns), (2, 5, columns), (0, columns)):
        x = torch.randn(shape, dtype=dtype)
        y = linear(x)
        assert (y.dtype, y.requires_grad) == (dtype, True)
        assert torch.equal(y, served(x))


@pytest.mark.parametrize("format", FORMATS)
def test_four_bits_train_on_the_eight_bit_path(format: Format) -> None:
    """The report's chain: master, FP4, FP8 without loss, product in FP8."""
    weight, x = torch.randn(130, 160), torch.randn(7, 160)
    rounded = quantize(weight, format)
    if format == "fp4":
        rounded = QuantizedWeight.of(*fp4.to_fp8(rounded.codes, rounded.scale))
    assert rounded.format == "fp8"
    assert torch.equal(RoundedProduct(format, "w")(x, weight), quantized_linear(x, rounded))


def straight_through(x: Tensor, w: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Rounded x and w as leaves of a product in plain floats."""
    x_hat = fp8.fake_quantize(x.detach(), 128).requires_grad_()
    w_hat = quantize(w.detach(), format).values().requires_grad_()
    return x_hat, w_hat


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_of_linear(format: Format) -> None:
    x, w = torch.randn(6, 160, requires_grad=True), torch.randn(9, 160, requires_grad=True)
    dy = torch.randn(6, 9)
    found = torch.autograd.grad(RoundedProduct(format, "w")(x, w), [x, w], dy)
    x_hat, w_hat = straight_through(x, w, format)
    for ours, wanted in zip(found, torch.autograd.grad(x_hat @ w_hat.T, [x_hat, w_hat], dy), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_of_experts(format: Format) -> None:
    counts = torch.tensor([2, 0, 3, 1])
    x = torch.randn(6, 64, requires_grad=True)
    stacks = [torch.randn(4, rows, 64, requires_grad=True) for rows in (3, 5)]
    dys = [torch.randn(6, rows) for rows in (3, 5)]
    results = RoundedProducts(format, "w")(x, stacks, counts)
    dx, *dstacks = torch.autograd.grad(results, [x, *stacks], dys)
    expert_X = torch.repeat_interleave(torch.arange(4), counts)
    wanted_x = torch.zeros_like(x)
    for stack, dy, dstack in zip(stacks, dys, dstacks, strict=True):
        x_hat, w_hat = straight_through(x, stack, format)
        y = torch.einsum("xd,xfd->xf", x_hat, w_hat[expert_X])
        part, wanted = torch.autograd.grad(y, [x_hat, w_hat], dy)
        wanted_x += part
        torch.testing.assert_close(dstack, wanted, rtol=1e-5, atol=1e-5)
        assert not dstack[1].any()
    torch.testing.assert_close(dx, wanted_x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("needed", ["x", "weights"])
def test_only_the_gradients_that_are_asked_for(format: Format, needed: str) -> None:
    x, w = torch.randn(3, 64, requires_grad=needed == "x"), torch.randn(4, 64, requires_grad=needed != "x")
    RoundedProduct(format, "w")(x, w).sum().backward()
    assert ((x.grad is None), (w.grad is None)) == (needed != "x", needed == "x")


@pytest.mark.parametrize("policy", [RELEASED, BASE], ids=["released", "base"])
def test_experts(policy: Policy) -> None:
    experts = Experts(TINY)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=0.3)
    served = copy.deepcopy(experts)
    for name in ("w1", "w2", "w3"):
        served.hold(quantize(getattr(served, name).detach(), policy.experts), name)
    experts.products = RoundedProducts(policy.experts, "experts")
    x, scores = torch.randn(40, TINY.hidden_size), torch.rand(40, TINY.n_routed_experts)
    chosen = scores.topk(2).indices
    route = Route(chosen, scores.gather(1, chosen), scores, expert_order(chosen, TINY.n_routed_experts))
    ours, theirs = (layer(x, route, lambda: torch.zeros_like(x)) for layer in (experts, served))
    assert torch.equal(ours, theirs)


def test_the_grouped_output_rounds_its_weight_alone() -> None:
    output = GroupedOutput(2, 160, 3)
    nn.init.normal_(output.weight)
    served = copy.deepcopy(output)
    served.hold(quantize(output.weight.detach(), "fp8"))
    output.product = RoundedOutput("fp8", "wo_a")
    x = torch.randn(5, 2, 160)
    assert torch.equal(output(x), served(x))
    dy = torch.randn(5, 2, 3)
    (ours,) = torch.autograd.grad(output(x), output.weight, dy)
    (theirs,) = torch.autograd.grad(served(x), served.weight, dy)
    assert torch.equal(ours, theirs)


def test_training_moves_masters_by_less_than_a_code(model: Transformer) -> None:
    """Names, dtypes and parameters stay; a step far below the distance of two codes changes masters all the same."""
    names = dict(model.named_parameters()).keys()
    train_quantized(model)
    assert dict(model.named_parameters()).keys() == names
    segment = Segment.of(torch.randint(0, TINY.vocab_size, (30,)))
    weight = model.get_parameter("layers.0.ffn.shared_experts.w1.weight")
    before = weight.detach().clone()
    logits = model.logits(model.hidden(model(segment).streams_TSD))
    nn.functional.cross_entropy(logits, segment.tokens_T).backward()
    for name, parameter in model.named_parameters():
        if "layers" in name and "indexer" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    assert weight.grad is not None
    with torch.no_grad():
        weight -= 1e-6 * weight.grad.sign()
    assert not torch.equal(weight, before)
    assert torch.equal(quantize(weight, "fp8").scale.view(torch.uint8), quantize(before, "fp8").scale.view(torch.uint8))


def test_a_master_too_wide_for_eight_bits_is_named() -> None:
    w = torch.ones(2, 64)
    w[0, 32:] = 2.0**-13
    with pytest.raises(ValueError, match=r"layers.3.ffn.experts.w2: the sub-scales of block \[0, 0\]"):
        RoundedProduct("fp4", "layers.3.ffn.experts.w2")(torch.ones(1, 64), w)
