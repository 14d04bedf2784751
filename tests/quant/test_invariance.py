"""Batch invariance of a model whose weights and cache are as they are served: in FP8 and FP4."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from leadline.model.cache_format import PACKED, SERVED
from leadline.model.config import FLASH, TINY, ModelConfig
from leadline.model.init import initialize
from leadline.model.segment import Segment
from leadline.model.state import State
from leadline.model.transformer import Transformer
from leadline.ops.invariance import batch_invariant
from leadline.quant.policy import RELEASED, quantize_model

# Whole blocks of scales, which Hopper's kernel takes, in all matrices but those of narrow ranks.
CARD = TINY.replace(hidden_size=256, q_lora_rank=128, head_dim=64, moe_intermediate_size=128, index_head_dim=128)
# All widths of V4-Flash, one layer of each kind: deep pipelines, and more tiles than a card has processors.
WIDE = FLASH.replace(
    num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), n_routed_experts=16, vocab_size=1024, num_hash_layers=0
)


@pytest.mark.parametrize(
    ("config", "device"),
    [
        pytest.param(TINY, "cpu", id="tiny"),
        pytest.param(CARD, "cuda", id="card", marks=pytest.mark.gpu),
        pytest.param(WIDE, "cuda", id="wide", marks=pytest.mark.gpu),
    ],
)
def test_chunks_and_steps_beside_neighbours_give_the_bits_of_one_piece(config: ModelConfig, device: str) -> None:
    with torch.device(device):
        model = Transformer(config, cache_format=SERVED, with_mtp=False)
    initialize(model, 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=weight.shape[-1] ** -0.5)  # training begins with zeros
    model.bfloat16()
    quantize_model(model, RELEASED)
    tokens = random.Random(1).choices(range(config.vocab_size), k=140)
    with batch_invariant(), torch.no_grad():
        expected_TV = model.logits(model.hidden(model(Segment.of(tokens, device=device)).streams_TSD))
        model.cache_format = PACKED
        for neighbours in ([], [1], [70, 3]):
            state = State(config, 3, 256, cache_format=PACKED, dtype=torch.bfloat16, device=device)
            for turn, (start, stop) in enumerate(pairwise([0, 3, 90, 127, *range(128, 141)])):
                beside = [random.Random(turn).choices(range(config.vocab_size), k=length) for length in neighbours]
                past = [turn * length for length in neighbours] + [start]
                segment = Segment.of(*beside, tokens[start:stop], past=past, device=device)
                streams_TSD = model(segment, state).streams_TSD[sum(neighbours) :]
                assert torch.equal(model.logits(model.hidden(streams_TSD)), expected_TV[start:stop])
