"""Numbers and labels of the report's charts; the charts themselves are checked on the page (test_report.py)."""

from __future__ import annotations

import numpy as np
import pytest

from leadline.train.pictures import bytes_label, column, context_label, first_sparse_step, smoothed, smoothing_window


def test_column_leaves_out_steps_without_the_number():
    rows = [{"step": 1, "recall": None}, {"step": 2, "recall": 0.5}, {"step": 3}, {"step": 4, "recall": 0.0}]
    steps, values = column(rows, "recall")
    assert steps.tolist() == [2, 4]
    assert values.tolist() == [0.5, 0.0]
    assert [len(part) for part in column(rows, "loss")] == [0, 0]


@pytest.mark.parametrize("window", [1, 2, 3, 10, 99])
def test_smoothed_is_the_mean_of_the_neighbours_that_exist(window):
    values = np.random.default_rng(0).normal(size=23)
    reach = window // 2
    expected = [values[max(0, at - reach) : at + reach + 1].mean() for at in range(23)]
    np.testing.assert_allclose(smoothed(values, window), expected)


def test_smoothing_grows_with_the_run():
    assert [smoothing_window(steps) for steps in (1, 39, 80, 400)] == [1, 1, 2, 10]


def test_first_sparse_step():
    rows = [{"step": step, "dense": step < 3} for step in range(1, 6)]
    assert first_sparse_step(rows) == 3
    assert first_sparse_step(rows[:2]) is None


@pytest.mark.parametrize(
    ("amount", "label"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_345, "12.3 kB"),
        (999_400, "999 kB"),
        (999_600, "1.00 MB"),
        (3_688_172_544, "3.69 GB"),
        (50_400_000_000, "50.4 GB"),
        (2e14, "200 TB"),
    ],
)
def test_bytes_label(amount, label):
    assert bytes_label(amount) == label


@pytest.mark.parametrize(("context", "label"), [(4096, "4K"), (1 << 20, "1M"), (131072, "128K"), (1000, "1,000")])
def test_context_label(context, label):
    assert context_label(context) == label
