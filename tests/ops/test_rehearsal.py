"""Rehearsals: every kernel compiled once and none launched; on a card, nothing is left to compile afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from leadline.ops.rehearsal import rehearsal
from leadline.ops.rms_norm import rms_norm


@pytest.mark.interpret
def test_kernels_are_compiled_and_not_launched(tmp_path: Path) -> None:
    """Three variants of a copy, one of them twice; what they would have written is zero. One that cannot be compiled is
    left out."""
    script = Path(__file__).with_name("rehearse_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["compiled"] == ["copy_kernel"] * 3
    assert found["again"] == 0
    assert found["sums"] == [0.0, 0.0, 0.0, 16.0]
    assert found["restored"]


def test_uninitialised_memory_is_zero() -> None:
    with rehearsal(threads=1):
        assert not torch.empty(3).any()
        assert not torch.ones(2, 3).new_empty(4).any()
        assert torch.ones(2).sum() == 2


@pytest.mark.gpu
def test_after_a_rehearsal_nothing_is_compiled() -> None:
    from triton import knobs

    x, weight = torch.randn(5, 80, device="cuda"), torch.ones(80, device="cuda")
    with rehearsal():
        assert not rms_norm(x, weight, 1e-6).any()
    compiled: list[str] = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda **about: compiled.append(about["src"].name)
        y = rms_norm(x, weight, 1e-6)
    assert not compiled
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (80,), weight, 1e-6))
