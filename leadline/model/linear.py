"""Linear: a weight matrix, the format it is held in, and how it is multiplied.

A weight is either floating, a parameter, or quantised: codes with their scales (`ops.quantized_linear`), two buffers
under the released names `weight` and `scale`. `hold` turns the one into the other. Modules begin floating; which of
them hold what is decided outside, in `quant/policy.py` and by the files of a checkpoint.

`product` is how a floating weight is multiplied. Quantisation-aware training puts another one there (`quant/qat.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from leadline.ops.exact_linear import exact_linear
from leadline.ops.grouped_product import grouped_product
from leadline.ops.invariance import is_batch_invariant, rows_times
from leadline.ops.quantized_linear import QuantizedWeight, quantized_linear, quantized_linears


class Linear(nn.Module):
    """y = x W^T without bias; weight [out, in] in the model's dtype, or quantised."""

    weight: Tensor
    scale: Tensor | None
    block_scale: Tensor | None

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_buffer("scale", None)
        self.register_buffer("block_scale", None, persistent=False)
        self.product: Callable[[Tensor, Tensor], Tensor] = product

    def forward(self, x: Tensor) -> Tensor:
        quantized = self.quantized
        return self.product(x, self.weight) if quantized is None else quantized_linear(x, quantized)

    @property
    def quantized(self) -> QuantizedWeight | None:
        """The weight, if it is quantised."""
        return None if self.scale is None else QuantizedWeight(self.weight, self.scale, self.block_scale)

    def hold(self, weight: QuantizedWeight, name: str = "weight") -> None:
        """Replace the weight by a quantised one of the same shape; it no longer trains."""
        hold(self, name, weight)


def linears(x_TD: Tensor, first: Linear, second: Linear) -> tuple[Tensor, ...]:
    """Both maps of x. Where both are held in one format, x is rounded once, and few tokens are one launch."""
    weights = [map.quantized for map in (first, second)]
    quantized = [weight for weight in weights if weight is not None]
    if len({weight.format for weight in quantized}) == 1 and len(quantized) == len(weights):
        return quantized_linears(x_TD, quantized)
    return first(x_TD), second(x_TD)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of x [..., N] and a floating weight [O, N]."""
    return rows_times(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


class GroupedOutput(Linear):
    """O maps side by side, each for its group of columns: y_o = x_o W_o^T (report 2.3.3); weight [O L, X].

    The released files hold it in FP8, but the published code multiplies it in BF16 with BF16 activations. `hold`
    therefore takes the values of a quantised weight, once, in the dtype that the weight has.
    """

    def __init__(self, groups: int, in_features: int, out_features: int):
        super().__init__(in_features, groups * out_features)
        self.product = grouped_output

    def forward(self, x: Tensor) -> Tensor:
        """[T, O, X] to [T, O, L]."""
        return self.product(x, self.weight)

    def hold(self, weight: QuantizedWeight, name: str = "weight") -> None:
        """Take the values of a quantised weight of the same shape."""
        _check_shape(self, name, weight)
        self.weight = nn.Parameter(weight.values().to(self.weight.dtype), self.weight.requires_grad)


def grouped_output(x_TOX: Tensor, weight: Tensor) -> Tensor:
    """y_to = W_o x_to for the O maps that are stacked in weight [O L, X]: [T, O, L]."""
    weight_OLX = weight.unflatten(0, (x_TOX.shape[1], -1))
    if is_batch_invariant():
        return torch.stack([rows_times(x, w) for x, w in zip(x_TOX.unbind(1), weight_OLX, strict=True)], dim=1)
    if x_TOX.is_cuda:
        return grouped_product(x_TOX, weight_OLX)
    return torch.bmm(x_TOX.transpose(0, 1), weight_OLX.mT).transpose(0, 1)


def linear_fp32(x: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """scale x W^T with FP32 arithmetic and an FP32 result, for the places where the report keeps full precision."""
    return exact_linear(x.flatten(0, -2), weight, scale).unflatten(0, x.shape[:-1])


class Norm(nn.Module):
    """The learned weight of an RMS norm, [D]; applied with `ops.rms_norm`."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))


def hold(module: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Replace a parameter of `module` by the codes of a quantised weight, as a buffer of the same name, and fill the
    buffers of its scales (`scale_names`)."""
    _check_shape(module, name, weight)
    delattr(module, name)
    module.register_buffer(name, weight.codes)
    scale, block_scale = scale_names(name)
    setattr(module, scale, weight.scale)
    setattr(module, block_scale, weight.block_scale)


def scale_names(name: str) -> tuple[str, str]:
    """Names of the two buffers that hold the scales of a weight: of its own format, and of its blocks as FP8."""
    prefix = "" if name == "weight" else name + "_"
    return prefix + "scale", prefix + "block_scale"


def _check_shape(module: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """ValueError when a quantised weight is of another shape than the parameter that it is to replace."""
    own = tuple(getattr(module, name).shape)
    if own != weight.shape:
        raise ValueError(
            f"{type(module).__name__}.{name} is {list(own)}, the {weight.format} weight for it is {list(weight.shape)}"
        )
