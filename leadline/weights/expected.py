"""Which tensors the files of a configuration hold, under our names, draft stages included."""

from __future__ import annotations

import torch

from leadline.model.config import ConfigError, ModelConfig
from leadline.model.mtp import MTPBlock
from leadline.model.transformer import Transformer
from leadline.weights.names import MTP_ONLY

Shapes = dict[str, tuple[int, ...]]


def expected_shapes(config: ModelConfig) -> Shapes:
    """Name -> shape of all tensors, in the order of the model. ConfigError where the draft stages' fields are wrong."""
    with torch.device("meta"):
        model = Transformer(config, with_mtp=not config.has_draft_stages)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {**shapes, **_draft_stages(config)} if config.has_draft_stages else shapes


def _draft_stages(config: ModelConfig) -> Shapes:
    """The stages of the DSpark refresh: window-only blocks, an entrance to the first and three heads on the last."""
    targets, rank = config.extra.get("dspark_target_layer_ids"), config.extra.get("dspark_markov_rank")
    if not isinstance(targets, list) or not isinstance(rank, int):
        raise ConfigError(
            "config fields 'dspark_target_layer_ids' and 'dspark_markov_rank': must be a list and a number"
        )
    with torch.device("meta"):
        block = {name: tuple(tensor.shape) for name, tensor in MTPBlock(config).state_dict().items()}
    width, stages = config.hidden_size, len(config.mtp_ratios)
    entrance = {"main_proj.weight": (width, len(targets) * width), "main_norm.weight": (width,)}
    heads = {
        "markov_head.markov_w1.weight": (config.vocab_size, rank),
        "markov_head.markov_w2.weight": (config.vocab_size, rank),
        "confidence_head.proj.weight": (1, width + rank),
    }
    exits = {name: shape for name, shape in block.items() if name == "norm.weight" or name.startswith("hc_head.")}
    plain = {name: shape for name, shape in block.items() if name not in MTP_ONLY}
    result: Shapes = {}
    for stage in range(stages):
        tensors = {**plain, **(entrance if stage == 0 else {}), **({**exits, **heads} if stage == stages - 1 else {})}
        result |= {f"mtp.{stage}.{name}": shape for name, shape in tensors.items()}
    return result
