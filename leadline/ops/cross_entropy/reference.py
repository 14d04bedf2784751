"""Cross entropy in plain PyTorch, tile by tile over the tokens that have a target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.precision import wide

LOGITS_PER_TILE = 4 * 2**20  # 16 MiB of FP32


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        rows = (targets_T >= 0).nonzero().flatten()
        nll_T = wide(hidden_TD.new_zeros(len(hidden_TD)))
        lse = torch.empty(len(rows), dtype=nll_T.dtype, device=rows.device)
        step = max(1, LOGITS_PER_TILE // len(weight_VD))
        for start in range(0, len(rows), step):
            tile = rows[start : start + step]
            logits = wide(hidden_TD[tile]) @ wide(weight_VD).T
            target_logits = logits.gather(1, targets_T[tile, None]).squeeze(1)
            largest = logits.amax(-1)
            lse[start : start + step] = largest + logits.sub_(largest[:, None]).exp_().sum(-1).log()
            nll_T[tile] = lse[start : start + step] - target_logits
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, rows, lse)
        ctx.step = step
        return nll_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnll_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, targets_T, rows, lse = ctx.saved_tensors
        dhidden_TD = torch.zeros_like(hidden_TD)
        dweight_VD = torch.zeros_like(wide(weight_VD))
        for start in range(0, len(rows), ctx.step):
            tile = rows[start : start + ctx.step]
            hidden = wide(hidden_TD[tile])
            dlogits = (hidden @ wide(weight_VD).T).sub_(lse[start : start + ctx.step, None]).exp_()
            dlogits[torch.arange(len(tile)), targets_T[tile]] -= 1.0
            dlogits *= dnll_T[tile, None]
            dhidden_TD[tile] = (dlogits @ wide(weight_VD)).to(hidden_TD.dtype)
            dweight_VD.addmm_(dlogits.T, hidden)
        return dhidden_TD, dweight_VD.to(weight_VD.dtype), None
