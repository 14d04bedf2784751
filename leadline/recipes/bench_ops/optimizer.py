"""Cases of the optimiser: Newton-Schulz for a batch of equal matrices."""

from __future__ import annotations

import torch

from leadline.ops.newton_schulz import newton_schulz
from leadline.recipes.bench_ops.case import FP32, Case, Cost, Inputs


def _newton_schulz() -> Case:
    matrices, rows, columns, steps = 8, 4096, 2048, 10

    def inputs(tokens: int, device: torch.device) -> Inputs:
        return [torch.randn(tokens, rows, columns, device=device)]

    def gate_inputs(tokens: int, device: torch.device) -> Inputs:
        return [torch.randn(2, tokens, 300, device=device)]

    # Two symmetric products, of which one half counts, and a third.
    step = columns * columns * rows + columns**3 + 2 * columns * columns * rows
    return Case(
        "newton_schulz",
        f"{steps} steps, {matrices} x {rows} x {columns}",
        inputs,
        lambda x: newton_schulz(x, torch.bfloat16 if x.dtype == torch.float32 else torch.float64),
        Cost(matrices * steps * step, 2 * matrices * rows * columns * FP32),
        None,
        ceiling="matmul",
        tokens=matrices,
        gate_inputs=gate_inputs,
        fp32_tolerance=2e-2,  # the products are bfloat16, and their rounding adds up over ten steps
    )


CASES = (_newton_schulz(),)
