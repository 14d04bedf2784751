"""The first bad number stops the run, by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NonFiniteLossError(ValueError):
    """A loss is NaN or infinite; the message names the first module whose output was."""


def check_loss(total: Tensor, named_losses: dict[str, Tensor]) -> None:
    """Raise NonFiniteLossError naming the first loss that is not finite. Waits for the device once."""
    if bool(torch.isfinite(total)):
        return
    bad = next((name for name, value in named_losses.items() if not bool(torch.isfinite(value))), "total")
    raise NonFiniteLossError(f"the {bad} loss is {float(named_losses.get(bad, total))}")


class FirstBadOutput:
    """Context manager that finds the first module whose output is not finite. Slow: used to explain a failure only.

    with FirstBadOutput(model) as finder:
        ... run the forward again ...
    finder.found        # "layers.3.attn.wq_b: 12 of 8192 values are NaN" or None
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.found: str | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> FirstBadOutput:
        for name, module in self.model.named_modules():
            if not any(True for _ in module.children()):
                self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str):
        def look(_module: nn.Module, _inputs: object, output: object) -> None:
            if self.found is None and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                bad = int((~torch.isfinite(output)).sum())
                self.found = f"{name}: {bad} of {output.numel()} values of its output are not finite"

        return look


def first_bad_tensor(model: nn.Module) -> str | None:
    """Name of the first parameter or buffer that holds a value that is not finite, or None."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return f"{name}: {int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values are not finite"
    return None
