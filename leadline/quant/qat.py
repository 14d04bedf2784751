"""Quantisation-aware training (report 5.2.1): the forward of the served model, over weights that train in full.

A master weight stays FP32 or BF16. Each forward rounds it to its format and multiplies it exactly as the served model
does, activations in E4M3 included, so that the two forwards are equal in every bit. The backward uses the rounded
weight, an FP4 one in the FP8 form that it is exactly equal to, and the rounded activations, and hands the gradient of
the rounded weight to the master as it is (straight through):

    y = Q(x) Q(W)^T          dx = dy Q(W)          dW = dy^T Q(x)

It is switched on from outside, by `train_quantized`; index queries and keys are rounded by the cache format
(`model/cache_format.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from leadline.formats import fp4, fp8
from leadline.model.linear import GroupedOutput, grouped_output
from leadline.model.moe import Experts
from leadline.ops.grouped_linear import grouped_linear, grouped_weight_gradient
from leadline.ops.quantized_linear import (
    Format,
    QuantizedWeight,
    quantize,
    quantized_grouped_linear,
    quantized_linear,
)
from leadline.quant.policy import RELEASED, Policy, quantizable


def train_quantized(model: nn.Module, policy: Policy = RELEASED) -> None:
    """From now on, multiply every floating weight that the policy names as its quantised form. In place.

    Parameters stay what they are, and so do their names; `quantize_model` with the same policy then gives a model with
    the same forward. Build the model with the cache format SERVED, so that keys are rounded as well.
    """
    for name, owner, _ in quantizable(model):
        format = policy.format_of(name)
        if format is None:
            continue
        if isinstance(owner, Experts):
            owner.products = RoundedProducts(format, name)
        elif isinstance(owner, GroupedOutput):
            owner.product = RoundedOutput(format, name)
        else:
            owner.product = RoundedProduct(format, name)


@dataclass(frozen=True)
class RoundedProduct:
    """`Linear.product` of a weight that is served in `format`; `name` is for errors."""

    format: Format
    name: str

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        (y_TO,) = _RoundedLinear.apply(x.flatten(0, -2), None, self, weight)
        return y_TO.unflatten(0, x.shape[:-1])


@dataclass(frozen=True)
class RoundedProducts:
    """`Experts.products` of stacks that are served in `format`; `name` is for errors."""

    format: Format
    name: str

    def __call__(self, x_XD: Tensor, weights: Sequence[Tensor], counts_E: Tensor) -> tuple[Tensor, ...]:
        return _RoundedLinear.apply(x_XD, counts_E, self, *weights)


@dataclass(frozen=True)
class RoundedOutput:
    """`GroupedOutput.product`: the weight is rounded, the activations are not."""

    format: Format
    name: str

    def __call__(self, x_TOX: Tensor, weight: Tensor) -> Tensor:
        rounded = quantize(weight.detach(), self.format, self.name).values().to(weight.dtype)
        return grouped_output(x_TOX, _StraightThrough.apply(weight, rounded))


class _StraightThrough(torch.autograd.Function):
    """`rounded` in the forward; in the backward, its gradient goes to `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, None


class _RoundedLinear(torch.autograd.Function):
    """Products of x with several masters, which are rounded on the way; with counts, with stacks of them.

    Kept for the backward: the weights in FP8, and the activations as the product saw them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TN: Tensor,
        counts_E: Tensor | None,
        rounding: RoundedProduct | RoundedProducts,
        *masters: Tensor,
    ) -> tuple[Tensor, ...]:
        weights = [quantize(master, rounding.format, rounding.name) for master in masters]
        ctx.save_for_backward(counts_E, *fp8.quantize(x_TN, fp8.ACTIVATION_BLOCK), *_codes_and_scales(weights))
        ctx.dtypes = [master.dtype for master in masters]
        if counts_E is None:
            return tuple(quantized_linear(x_TN, weight) for weight in weights)
        return quantized_grouped_linear(x_TN, weights, counts_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        counts_E, codes_TN, scale_TB, *weights = ctx.saved_tensors
        x_TN = fp8.dequantize(codes_TN, scale_TB, fp8.ACTIVATION_BLOCK).to(dy_TO[0].dtype)
        dx_TN, dmasters = None, []
        for number, (dy, dtype) in enumerate(zip(dy_TO, ctx.dtypes, strict=True)):
            if ctx.needs_input_grad[0]:
                rounded = fp8.dequantize_weight(*weights[2 * number : 2 * number + 2]).to(dy.dtype)
                part_TN = dy @ rounded if counts_E is None else grouped_linear(dy, rounded.mT, counts_E)
                dx_TN = part_TN if dx_TN is None else dx_TN + part_TN
            dmaster = None
            if ctx.needs_input_grad[3 + number]:
                dmaster = dy.mT @ x_TN if counts_E is None else grouped_weight_gradient(dy, x_TN, counts_E)
                dmaster = dmaster.to(dtype)
            dmasters.append(dmaster)
        return dx_TN, None, None, *dmasters


def _codes_and_scales(weights: Sequence[QuantizedWeight]) -> list[Tensor]:
    """Codes and scales of each weight in FP8, one after the other."""
    pairs = [
        (weight.codes, weight.scale) if weight.format == "fp8" else fp4.to_fp8(weight.codes, weight.scale)
        for weight in weights
    ]
    return [tensor for pair in pairs for tensor in pair]
