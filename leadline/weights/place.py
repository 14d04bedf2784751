"""Where a weight from a folder goes in a model: into a tensor, or as codes and scales that its module holds.

A place is allocated when its first bytes arrive, so that a model on the meta device grows as it is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leadline.model.linear import Linear, scale_names
from leadline.model.moe import Experts
from leadline.ops.quantized_linear import QuantizedWeight
from leadline.weights.header import CheckpointError
from leadline.weights.names import is_experts, is_linear
from leadline.weights.stored import CODES, E8M0, PLAIN, Quantized, Value, pieces, quantized_specs
from leadline.weights.target import Form


def can_hold(ours: str) -> bool:
    """Whether our model multiplies this weight in eight or four bits. wo_a is multiplied in bfloat16, as in the
    published code, though files hold it in FP8."""
    return is_experts(ours) or (is_linear(ours) and not ours.endswith(".attn.wo_a.weight"))


@dataclass
class Place:
    """A parameter or buffer of a model, `own`, and the form that it gets. device: where one on meta is allocated."""

    model: nn.Module
    name: str
    own: Tensor | Quantized
    form: Form
    device: torch.device | str
    _filled: Tensor | Quantized | None = None

    def fill(self, expert: int | None, value: Value) -> None:
        """Copy a matrix, or a tensor that is no stack. A place with a quantised form takes that form only.

        CheckpointError, without the name of the tensor, for values that float16 cannot hold.
        """
        if self._filled is None:
            self._filled = self._tensor() if self.form.kind == PLAIN else self._codes()
        whole = self._filled
        target = whole if expert is None else whole[expert]
        if isinstance(target, Quantized):
            assert isinstance(value, Quantized)
            target.codes.copy_(value.codes.view(target.codes.dtype))
            target.scale.copy_(value.scale)
        else:
            _copy(target.detach(), value)

    def finish(self) -> None:
        """Give codes and scales to the module. CheckpointError for an FP4 weight that is not exact in FP8."""
        if not isinstance(self._filled, Quantized):
            return
        module, leaf = self._owner()
        assert isinstance(module, Linear | Experts)
        try:
            weight = QuantizedWeight.of(self._filled.codes, self._filled.scale, self.name)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        if self._filled is not self.own:
            module.hold(weight, leaf)
        elif weight.block_scale is not None:
            getattr(module, scale_names(leaf)[1]).copy_(weight.block_scale)

    def _owner(self) -> tuple[nn.Module, str]:
        path, _, leaf = self.name.rpartition(".")
        return self.model.get_submodule(path), leaf

    def _tensor(self) -> Tensor:
        own = self.own
        assert isinstance(own, Tensor)
        if not own.is_meta and own.dtype == self.form.dtype:
            return own
        fresh = torch.empty(own.shape, dtype=self.form.dtype, device=self.device if own.is_meta else own.device)
        if isinstance(own, nn.Parameter):
            fresh = nn.Parameter(fresh, requires_grad=own.requires_grad)
        module, leaf = self._owner()
        setattr(module, leaf, fresh)
        return fresh

    def _codes(self) -> Quantized:
        if isinstance(self.own, Quantized):
            return self.own
        device = self.device if self.own.is_meta else self.own.device
        codes, scale = quantized_specs("", "", self.form.kind, tuple(self.own.shape), self.form.dtype)
        return Quantized(
            self.form.kind,
            torch.empty(codes[2], dtype=codes[1], device=device),
            torch.empty(scale[2], dtype=scale[1], device=device),
        )


def _copy(target: Tensor, value: Value) -> None:
    begin = 0
    for piece in pieces(value):
        values = piece.float() if isinstance(piece, Quantized) else piece
        rows = target if values.ndim < 2 else target[begin : begin + len(values)]
        rows.copy_(values)
        if target.dtype == torch.float16 and bool((rows.cpu().isinf() & values.isfinite()).any()):
            raise CheckpointError("has values that float16 cannot hold, load it as bfloat16 or float32")
        begin += len(values) if values.ndim else 0


def weights_of(model: nn.Module) -> dict[str, Tensor | Quantized]:
    """All parameters and persistent buffers of a model by name, codes together with their scales; nothing is copied."""
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    held: dict[str, Quantized] = {}
    scales: set[str] = set()
    for name, tensor in tensors.items():
        if tensor.dtype in CODES:
            path, dot, leaf = name.rpartition(".")
            scale_name = path + dot + scale_names(leaf)[0]
            scale = tensors[scale_name]
            scales.add(scale_name)
            held[name] = Quantized(
                CODES[tensor.dtype], tensor, scale.view(E8M0) if scale.dtype == torch.uint8 else scale
            )
    return {name: held.get(name, tensor) for name, tensor in tensors.items() if name not in scales}
