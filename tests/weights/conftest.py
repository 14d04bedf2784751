"""Models and folders that the tests of this layer share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from leadline.model.config import PRESETS, ModelConfig
from leadline.model.transformer import Transformer

TINY = PRESETS["tiny"]


def build(config: ModelConfig, *, dtype: torch.dtype = torch.float32, with_mtp: bool = True) -> Transformer:
    model = Transformer(config, with_mtp=with_mtp)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_()
        else:
            tensor.random_(0, config.n_routed_experts)
    return model if dtype == torch.float32 else model.to(dtype)


@pytest.fixture
def build_model() -> Callable[..., Transformer]:
    """A model with random values everywhere, buffers too; `config` defaults to the tiny preset."""

    def with_default(config: ModelConfig = TINY, **options: object) -> Transformer:
        return build(config, **options)  # type: ignore[arg-type]

    return with_default
