"""The choice of experts in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leadline.ops.invariance import rowwise

# softplus underflows to 0 for logits below -104. The root's gradient would be NaN there, and A zero scores would divide
# by zero; the floors change no score of a logit above -82.
SOFTPLUS_FLOOR = 1e-36
SUM_FLOOR = 1e-20


def route(
    logits_TE: Tensor, bias_E: Tensor | None, experts_TA: Tensor | None, choices: int, route_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(experts_TA, weights_TA, scores_TE)."""
    scores_TE = rowwise(nn.functional.softplus, logits_TE).clamp_min(SOFTPLUS_FLOOR).sqrt()
    if experts_TA is None:
        # Stable: equal scores go to the lower expert, on every device.
        ranked = torch.sort(scores_TE.detach() + bias_E, dim=-1, descending=True, stable=True).indices
        experts_TA = ranked[:, :choices]
    chosen_TA = scores_TE.gather(1, experts_TA)
    weights_TA = chosen_TA / (chosen_TA.sum(-1, keepdim=True) + SUM_FLOOR) * route_scale
    return experts_TA, weights_TA, scores_TE
