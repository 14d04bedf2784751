"""What changes over a run: the learning rate and the weight of the extra-token loss (report 4.2.2)."""

from __future__ import annotations

import math


def lr_at(step: int, *, peak: float, final: float, warmup_steps: int, decay_start: int, total_steps: int) -> float:
    """Learning rate of the update `step`, counted from 0 (report 4.2.2).

    A linear warm-up reaches `peak` on its last step (and is not zero on its first); `peak` is held; from `decay_start`
    on, half a cosine falls to `final`, which the last step `total_steps - 1` uses. Later steps stay at `final`. With 0
    warm-up steps, or with decay_start = total_steps, that part is absent. Raises ValueError for a negative step or
    phases that overlap.
    """
    if step < 0:
        raise ValueError(f"step {step} must not be negative")
    if not 0 <= warmup_steps <= decay_start <= total_steps:
        raise ValueError(
            f"schedule needs 0 <= warmup_steps <= decay_start <= total_steps, "
            f"got {warmup_steps}, {decay_start}, {total_steps}"
        )
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if step < decay_start:
        return peak
    decay_steps = total_steps - decay_start
    progress = min(1.0, (step - decay_start + 1) / decay_steps) if decay_steps else 1.0
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def mtp_weight_at(step: int, *, decay_start: int) -> float:
    """Weight of the extra-token loss: 0.3, and 0.1 once the learning rate decays (report 4.2.2)."""
    return 0.3 if step < decay_start else 0.1
