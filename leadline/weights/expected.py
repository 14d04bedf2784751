"""Which tensors the files of a configuration hold, under our names, draft stages included."""

from __future__ import annotations

import torch

from leadline.model.config import ModelConfig
from leadline.model.transformer import Transformer

Shapes = dict[str, tuple[int, ...]]


def expected_shapes(config: ModelConfig) -> Shapes:
    """Name -> shape of all tensors, in the order of the model. ConfigError where the draft stages' fields are wrong."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
