"""AdamW with the numbers of the report, for what is not a matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

BETAS = (0.9, 0.95)
EPS = 1e-20
WEIGHT_DECAY = 0.1


def adamw(parameters: Iterable[Any], lr: float, *, weight_decay: float = WEIGHT_DECAY) -> torch.optim.AdamW:
    """torch's AdamW with betas 0.9 and 0.95, eps 1e-20 and decoupled decay 0.1 (report 4.2.2).

    parameters: anything that `torch.optim.Optimizer` takes; pass (name, parameter) pairs to keep names in the state.

    An eps this small only keeps 0 / 0 from being NaN: a parameter whose gradient was always zero does not move, and
    tiny gradients move a parameter as far as large ones, down to 1e-19; below that the step fades out. Float32 moments
    are enough for it because they reach into the subnormal numbers. Do not switch on flush-to-zero
    (`torch.set_flush_denormal`): gradients between 1e-20 and 1e-17 would keep their first moment and lose their
    second, and steps up to 45 times too large were measured.
    """
    return torch.optim.AdamW(parameters, lr=lr, betas=BETAS, eps=EPS, weight_decay=weight_decay)
