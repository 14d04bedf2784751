"""Load balance without a loss (report 4.2.2): the selection bias follows the load, outside of the gradient.

After each update the bias of every expert that got more than its share goes down by a constant, and that of every
expert that got less goes up. The bias enters the choice of experts alone, never their weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.model.moe import MoE
from leadline.model.transformer import Transformer


def moe_layers(model: Transformer) -> list[MoE]:
    """The MoE of every block in order, the MTP blocks last: the order of `Losses.counts_LE`."""
    return [module for block in [*model.layers, *model.mtp] for module in block.children() if isinstance(module, MoE)]


@torch.no_grad()
def update_selection_bias(model: Transformer, counts_LE: Tensor, speed: float) -> None:
    """bias_e += speed x sign(mean load - load_e) on every score-routed layer. counts_LE: tokens per layer and
    expert."""
    for moe, counts_E in zip(moe_layers(model), counts_LE, strict=True):
        if moe.gate.bias is not None:
            load_E = counts_E.to(moe.gate.bias)
            moe.gate.bias += speed * torch.sign(load_E.mean() - load_E)


def largest_bias(model: Transformer) -> float:
    """The largest absolute selection bias of the model, for the log; 0 when no layer is score-routed."""
    biases = [moe.gate.bias for moe in moe_layers(model) if moe.gate.bias is not None]
    return float(torch.cat(biases).abs().max()) if biases else 0.0
