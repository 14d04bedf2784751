"""The learning rate and the extra-token weight as functions of the step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leadline.optim.schedule import lr_at, mtp_weight_at

FLASH = {"peak": 2.7e-4, "final": 2.7e-5, "warmup_steps": 2000, "decay_start": 50_000, "total_steps": 60_000}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 2.7e-4 / 2000),
        (999, 2.7e-4 / 2),
        (1999, 2.7e-4),
        (2000, 2.7e-4),
        (49_999, 2.7e-4),
        (54_999, (2.7e-4 + 2.7e-5) / 2),
        (59_999, 2.7e-5),
        (10**9, 2.7e-5),
    ],
)
def test_landmarks(step: int, expected: float) -> None:
    assert lr_at(step, **FLASH) == pytest.approx(expected, rel=1e-9)  # type: ignore[arg-type]


@given(
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(0, 50),
    st.floats(1e-6, 1.0),
    st.floats(0.0, 1.0),
)
def test_shape(warmup: int, constant: int, decay: int, peak: float, share: float) -> None:
    """Rises, holds, falls; starts above zero and ends at `final`."""
    final, total = peak * share, warmup + constant + decay
    rates = [
        lr_at(step, peak=peak, final=final, warmup_steps=warmup, decay_start=warmup + constant, total_steps=total)
        for step in range(total)
    ]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates if final > 0)
    rising, holding, falling = rates[:warmup], rates[warmup : warmup + constant], rates[warmup + constant :]
    assert rising == sorted(rising)
    assert holding == [peak] * constant
    assert falling == sorted(falling, reverse=True)
    if decay:
        assert math.isclose(falling[-1], final, rel_tol=1e-9, abs_tol=1e-15)


@pytest.mark.parametrize(
    "change", [{"warmup_steps": -1}, {"warmup_steps": 50_001}, {"decay_start": 60_001}, {"total_steps": 1}], ids=str
)
def test_overlapping_phases_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="warmup_steps <= decay_start"):
        lr_at(0, **{**FLASH, **change})  # type: ignore[arg-type]


def test_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step -1"):
        lr_at(-1, **FLASH)  # type: ignore[arg-type]


def test_mtp_weight_drops_with_the_decay() -> None:
    assert [mtp_weight_at(step, decay_start=3) for step in range(5)] == [0.3, 0.3, 0.3, 0.1, 0.1]
