"""The same logits as transformers, on random configurations, at every prompt length from 1 to 300, and in decoding.

The two sum in different orders, so a choice that is too close to call in FP32 (see `closest_choices`) may go different
ways; from there on the logits rightly differ. A difference is forgiven only behind such a choice, and only rarely.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache

from leadline.model.config import ModelConfig
from leadline.model.segment import Segment
from leadline.model.state import State
from leadline.model.transformer import Transformer
from leadline.weights.names import file_tensors

NUM_CONFIGS = 24
LENGTHS = random.Random(0).sample(range(1, 301), 300)  # dealt out to the configurations, 12 or 13 each
TOLERANCE = 1e-4
TOO_CLOSE = 1e-5
DECODED = 10


def random_config(seed: int) -> ModelConfig:
    """Everything that may vary, varied; widths small. Seeds 0, 1, 2 begin with a layer of each kind."""
    draw = random.Random(seed)
    num_layers = draw.randint(2, 4)
    ratios = [(0, 4, 128)[seed % 3], *(draw.choice((0, 4, 4, 128)) for _ in range(num_layers - 1))]
    groups = draw.choice((1, 2, 3))
    rotary = draw.choice((4, 8, 16))
    return ModelConfig(
        vocab_size=draw.randint(50, 300),
        hidden_size=draw.choice((24, 32, 48)),
        num_hidden_layers=num_layers,
        compress_ratios=tuple(ratios),
        num_nextn_predict_layers=0,
        num_attention_heads=groups * draw.choice((1, 2)),
        o_groups=groups,
        head_dim=rotary * draw.choice((1, 2, 4)),
        qk_rope_head_dim=rotary,
        q_lora_rank=draw.choice((12, 16, 20)),
        o_lora_rank=draw.choice((8, 12)),
        index_topk=draw.randint(1, 40),
        index_n_heads=draw.randint(16, 24),
        index_head_dim=rotary * draw.choice((1, 2)),
        sliding_window=draw.choice((4, 5, 16, 37, 64, 128)),
        n_routed_experts=draw.randint(3, 9),
        num_experts_per_tok=draw.randint(1, 3),
        moe_intermediate_size=draw.choice((12, 16)),
        num_hash_layers=draw.randint(0, num_layers),
        routed_scaling_factor=draw.choice((1.0, 1.5, 2.5)),
        swiglu_limit=draw.choice((0.5, 1.0, 10.0)),
        hc_mult=draw.randint(2, 5),
        hc_sinkhorn_iters=draw.choice((1, 3, 20)),
        hc_eps=draw.choice((1e-6, 1e-3)),
        rms_norm_eps=draw.choice((1e-6, 1e-4)),
        rope_theta=draw.choice((100.0, 10000.0)),
        compress_rope_theta=draw.choice((1000.0, 160000.0)),
        rope_factor=draw.choice((1.0, 4.0, 16.0)),
        original_max_position_embeddings=draw.choice((16, 64, 256)),
        beta_fast=draw.choice((8.0, 32.0)),
        max_position_embeddings=4096,
        torch_dtype="float32",
    )


def their_model(ours: Transformer) -> DeepseekV4ForCausalLM:
    """transformers' model of the same configuration and weights."""
    config = DeepseekV4Config(**ours.config.to_dict("transformers"))
    theirs = DeepseekV4ForCausalLM(config).eval()
    tensors = ours.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    stored = {}
    for name, wanted in file_tensors(shapes, "transformers").items():
        parts = [tensors[part.ours] for part in wanted.parts]
        stored[name] = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    theirs.load_state_dict(stored)
    return theirs


@dataclass
class Pair:
    """One configuration in both implementations, and a prompt of each of its lengths with some tokens behind it."""

    seed: int
    ours: Transformer
    theirs: DeepseekV4ForCausalLM
    prompts: list[Tensor]
    following: list[Tensor]


@pytest.fixture(scope="module", params=range(NUM_CONFIGS))
def pair(request: pytest.FixtureRequest, random_model: Callable[[ModelConfig, int], Transformer]) -> Pair:
    seed: int = request.param
    ours = random_model(random_config(seed), seed)
    generator = torch.Generator().manual_seed(seed)
    lengths = LENGTHS[seed::NUM_CONFIGS]
    tokens = [torch.randint(0, ours.config.vocab_size, (n + DECODED,), generator=generator) for n in lengths]
    return Pair(seed, ours, their_model(ours), [t[:-DECODED] for t in tokens], [t[-DECODED:] for t in tokens])


def differs_after_a_close_choice(ours: Tensor, theirs: Tensor, closest: Callable[[], Tensor]) -> bool:
    """False if all rows agree, True if a choice too close to call came first; a failure otherwise."""
    off = ((ours - theirs).abs().amax(1) > TOLERANCE).nonzero().flatten()
    if not len(off):
        return False
    first = int(off[0])
    difference = float((ours - theirs)[first].abs().max())
    assert closest()[: first + 1].min() < TOO_CLOSE, f"token {first} differs by {difference:.1e} for no close choice"
    return True


@torch.no_grad()
def test_prefill(pair: Pair, logits_of: Callable[..., Tensor], closest_choices: Callable[..., Tensor]) -> None:
    """Twelve or thirteen prompts: ours as one ragged segment, theirs one by one."""
    ours = logits_of(pair.ours, Segment.of(*pair.prompts)).split([len(prompt) for prompt in pair.prompts])
    excused = 0
    for prompt, logits in zip(pair.prompts, ours, strict=True):
        theirs = pair.theirs(prompt[None], use_cache=False).logits[0]
        excused += differs_after_a_close_choice(logits, theirs, lambda p=prompt: closest_choices(pair.ours, p))
    assert excused <= 2


@torch.no_grad()
def test_decode(pair: Pair, logits_of: Callable[..., Tensor], closest_choices: Callable[..., Tensor]) -> None:
    """The shortest and the longest prompt and one between: theirs through a DynamicCache each, ours in one state."""
    order = sorted(range(len(pair.prompts)), key=lambda number: len(pair.prompts[number]))
    chosen = [order[0], order[len(order) // 2], order[-1]]
    prompts = [pair.prompts[number] for number in chosen]
    following = [pair.following[number] for number in chosen]
    state = State(pair.ours.config, len(chosen))
    logits_of(pair.ours, Segment.of(*prompts), state)
    steps = []
    for step in range(DECODED):
        past = [len(prompt) + step for prompt in prompts]
        steps.append(
            logits_of(pair.ours, Segment.of(*(tokens[step : step + 1] for tokens in following), past=past), state)
        )
    excused = 0
    for number, (prompt, tokens) in enumerate(zip(prompts, following, strict=True)):
        cache = DynamicCache(config=pair.theirs.config)
        pair.theirs(prompt[None], past_key_values=cache, use_cache=True)
        theirs = [pair.theirs(token[None, None], past_key_values=cache, use_cache=True).logits[0] for token in tokens]
        ours = torch.stack([logits[number] for logits in steps])
        everything = torch.cat([prompt, tokens])

        def closest(everything: Tensor = everything, before: int = len(prompt)) -> Tensor:
            gaps = closest_choices(pair.ours, everything)
            gaps[before] = gaps[: before + 1].min()  # a choice inside the prompt counts for the first step
            return gaps[before:]

        excused += differs_after_a_close_choice(ours, torch.cat(theirs), closest)
    assert excused <= 1


def test_all_lengths_and_every_kind_of_layer_occur() -> None:
    lengths = [length for seed in range(NUM_CONFIGS) for length in LENGTHS[seed::NUM_CONFIGS]]
    assert sorted(lengths) == list(range(1, 301))
    kinds = {
        (ratio, config.is_hash_layer(layer))
        for config in map(random_config, range(NUM_CONFIGS))
        for layer, ratio in enumerate(config.layer_ratios)
    }
    assert kinds == {(ratio, hashed) for ratio in (0, 4, 128) for hashed in (False, True)}
