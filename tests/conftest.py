"""Rules for every test: one thread, a seed of its own, and property tests that draw the same examples in each run."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")


def pytest_configure() -> None:
    # Test processes share the cores; more threads in each would only make them wait for one another.
    torch.set_num_threads(1)


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
