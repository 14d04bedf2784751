"""Folders with the tensors of a released model and made-up values.

The real weights fill hundreds of gigabytes. A folder of a few of their layers and experts, with all names, dtypes,
shapes and scales as released, is enough to try out whatever reads or writes weights. With values of zero its files are
sparse: they have their full length, and take next to nothing on disk.
"""

from __future__ import annotations

import math
import os
import zlib
from pathlib import Path

import torch
from torch import Tensor

from leadline.model.config import ModelConfig
from leadline.weights.expected import expected_shapes
from leadline.weights.files import MAX_SHARD_BYTES, ShardWriter, plan_shards, write_index
from leadline.weights.folder import new_folder
from leadline.weights.names import Part
from leadline.weights.save import generation_config
from leadline.weights.target import CONFIG_SPELLING, SCALES, Output, config_of, form_of, plan, write_weights

VALUES = ("random", "zero")
DRAFT_STAGES = 3
DRAFT_BLOCK, NOISE_TOKEN = 5, 128799  # of the DSpark refresh


def few_layers(
    config: ModelConfig, layers: int, experts: int | None = None, *, draft_stages: bool = False
) -> ModelConfig:
    """The configuration with its first `layers` layers and `experts` experts; every width stays.

    draft_stages: with the three stages of the DSpark refresh instead of the MTP block.
    """
    ratios = config.layer_ratios[:layers]
    config = config.replace(
        num_hidden_layers=layers,
        compress_ratios=ratios + config.mtp_ratios,
        n_routed_experts=experts or config.n_routed_experts,
        num_experts_per_tok=min(config.num_experts_per_tok, experts or config.num_experts_per_tok),
    )
    if not draft_stages:
        return config
    stages = {
        "dspark_block_size": DRAFT_BLOCK,
        "dspark_noise_token_id": min(NOISE_TOKEN, config.vocab_size - 1),
        "dspark_target_layer_ids": list(range(max(0, layers - DRAFT_STAGES), layers)),
        "dspark_markov_rank": config.hidden_size // 16,
    }
    return config.replace(compress_ratios=ratios + (0,) * DRAFT_STAGES, extra={**config.extra, **stages})


def make_checkpoint(
    folder: str | Path,
    config: ModelConfig,
    format: str,
    *,
    naming: str = "official",
    values: str = "random",
    scales: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    seed: int = 0,
) -> None:
    """Write a folder with all tensors of a configuration, in one of `target.FORMATS`.

    values: "random" (a tensor's depend on its name and the seed only) or "zero" (sparse files). scales: dtype of the
    scales, by default as released. Errors as in `save.save_checkpoint`.
    """
    if values not in VALUES:
        raise ValueError(f"values {values!r} is not one of {', '.join(VALUES)}")
    shapes, scales = expected_shapes(config), scales or SCALES.get(format, torch.float32)
    forms = {ours: form_of(ours, _dtype(ours), format, scales) for ours in shapes}
    outputs = plan(shapes, forms, naming)
    config = config_of(config, format)
    with new_folder(folder) as temporary:
        (temporary / "config.json").write_text(config.to_json(CONFIG_SPELLING[naming]), encoding="utf8")
        (temporary / "generation_config.json").write_text(generation_config(config), encoding="utf8")
        if values == "zero":
            _write_holes(temporary, outputs, max_shard_bytes)
        else:
            write_weights(
                temporary,
                outputs,
                lambda part: _random(part, shapes[part.ours], config, seed),
                max_shard_bytes=max_shard_bytes,
            )


def _dtype(ours: str) -> torch.dtype:
    return torch.int64 if ours.endswith("tid2eid") else torch.float32


def _random(part: Part, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """Values of the size that a trained model has, so that it runs."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {part}".encode()))
    shape = shape[1:] if part.expert is not None else shape
    if part.ours.endswith("tid2eid"):
        return torch.randint(config.n_routed_experts, shape, generator=generator)
    values = torch.randn(shape, generator=generator)
    if part.ours.endswith("norm.weight"):
        return 1.0 + 0.1 * values
    return values / math.sqrt(shape[-1]) if len(shape) > 1 else 0.1 * values


def _write_holes(folder: Path, outputs: list[Output], max_shard_bytes: int) -> None:
    shards = plan_shards((output.specs for output in outputs), max_shard_bytes)
    for file_name, specs in shards.items():
        shard = ShardWriter(folder / file_name, specs)
        os.truncate(
            shard.path, shard.path.stat().st_size + sum(info.end - info.begin for info in shard.tensors.values())
        )
    write_index(folder, shards)
