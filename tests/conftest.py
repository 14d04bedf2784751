"""Rules for every test: one thread, a seed of its own, and property tests that draw the same examples in each run.

Tests marked `gpu` or `multi_gpu` exist only where there are such devices, those marked `interpret` only where there is
none but Triton: it decides once, when it is imported, between compiling kernels and interpreting them. Those marked
`ray` exist where the extra `ray` is installed.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import settings

NUM_DEVICES = torch.cuda.device_count()
if NUM_DEVICES == 0:
    os.environ["TRITON_INTERPRET"] = "1"
# Poisoned memory asks for deterministic algorithms; cuBLAS has them only with a workspace of fixed size.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")


def pytest_configure() -> None:
    # Test processes share the cores; more threads in each would only make them wait for one another.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that this machine cannot run."""
    absent = set() if NUM_DEVICES == 0 and find_spec("triton") else {"interpret"}
    absent |= {marker for marker, devices in (("gpu", 1), ("multi_gpu", 2)) if devices > NUM_DEVICES}
    absent |= set() if find_spec("ray") else {"ray"}
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in absent)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """A test draws the same numbers alone, in any order, and in any process."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that torch hands out uninitialised holds NaN (or the largest integer), so that an element nobody wrote
    fails the test at once instead of passing as the zero that happened to be there.

    torch does so itself while deterministic algorithms are asked for.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
