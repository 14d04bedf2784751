"""Which positions turn how fast: the two sets of rotary frequencies of a model.

Window-only layers rotate with the plain base; CSA and HCA layers with their own base and YaRN, in every part: queries,
window keys, entries, index queries and keys, and the output's rotation back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.model.config import ModelConfig
from leadline.ops.rope import frequencies, rotations

Rotation = tuple[Tensor, Tensor]  # cos and sin


class Rotary:
    """Frequencies are made once for each device and kept: a copy from the host in every pass would cost a step of
    decoding time, and could not be part of a captured graph."""

    def __init__(self, config: ModelConfig):
        self._config = config
        self._frequencies: dict[tuple[bool, torch.device], Tensor] = {}

    def at(self, positions_X: Tensor, ratio: int) -> Rotation:
        """cos and sin, FP32 [X, R/2], at some positions in a layer of this ratio."""
        return rotations(positions_X, self.frequencies(ratio, positions_X.device))

    def frequencies(self, ratio: int, device: torch.device) -> Tensor:
        """Angular frequencies, FP32 [R/2], of a layer of this ratio."""
        key = ratio > 0, device
        if key not in self._frequencies:
            self._frequencies[key] = self._make(compressed=ratio > 0).to(device)
        return self._frequencies[key]

    def _make(self, compressed: bool) -> Tensor:
        c = self._config
        if not compressed:
            return frequencies(c.qk_rope_head_dim, c.rope_theta)
        return frequencies(
            c.qk_rope_head_dim,
            c.compress_rope_theta,
            factor=c.rope_factor,
            original_positions=c.original_max_position_embeddings,
            beta_fast=c.beta_fast,
            beta_slow=c.beta_slow,
        )
