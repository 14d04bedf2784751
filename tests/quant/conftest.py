"""A small model in which every weight matters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.model.cache_format import SERVED
from leadline.model.config import TINY
from leadline.model.init import initialize
from leadline.model.segment import Segment
from leadline.model.state import State
from leadline.model.transformer import Transformer


@pytest.fixture(autouse=True)
def _poison(poisoned_memory: None) -> None:
    """A weight that nobody wrote is NaN."""


@pytest.fixture
def model() -> Transformer:
    """TINY with the cache format SERVED. Its matrices are random, those too that training begins at zero."""
    model = Transformer(TINY, cache_format=SERVED)
    initialize(model, 0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("wo_b.weight", "w2.weight", "experts.w2")):
                weight.normal_(std=weight.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="session")
def logits_of() -> Callable[..., Tensor]:
    """logits_of(model, segment, state): FP32 logits of all new tokens."""

    @torch.no_grad()
    def logits(model: Transformer, segment: Segment, state: State | None = None) -> Tensor:
        return model.logits(model.hidden(model(segment, state).streams_TSD))

    return logits
