"""AdamW with an eps of 1e-20: what happens at and near a zero gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from leadline.optim.adamw import adamw

LR = 0.01


def test_numbers_of_the_report() -> None:
    group = adamw([nn.Parameter(torch.zeros(2))], LR).param_groups[0]
    assert group["betas"] == (0.9, 0.95)
    assert group["eps"] == 1e-20
    assert group["weight_decay"] == 0.1


def test_zero_gradient_only_decays() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = adamw([weight], LR)
    for _ in range(3):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert torch.allclose(weight, torch.full((4,), (1 - LR * 0.1) ** 3))


@pytest.mark.parametrize("exponent", range(-44, 19, 3))
def test_no_step_exceeds_that_of_a_large_gradient(exponent: int) -> None:
    """From subnormal gradients to huge ones, |update| stays within 1.01 lr, and reaches lr from 1e-17 on."""
    weight = nn.Parameter(torch.zeros(64))
    optimizer = adamw([weight], LR, weight_decay=0.0)
    largest = 0.0
    for _ in range(10):
        before = weight.detach().clone()
        weight.grad = torch.randn(64) * 10.0**exponent
        optimizer.step()
        largest = max(largest, float((weight.detach() - before).abs().max()))
    assert math.isfinite(largest)
    assert largest <= 1.01 * LR
    if exponent >= -17:
        assert largest >= 0.99 * LR
