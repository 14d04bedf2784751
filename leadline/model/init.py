"""Initial values for training from scratch; where the report is silent, the choices of docs/decisions/0002.

- Matrices and the embedding: normal, std = 0.5 / sqrt(columns). At the released width of 7168 this is DeepSeek-V3's
  0.006, and it keeps the size of activations the same at other widths.
- The two projections that write to the streams (wo_b, w2): zero, so that every block starts as the identity.
- Hyper-connections: gates 0.01 (mHC paper), pre 0.5 and post 1 for every stream, comb near the identity.
- Norm weights 1; sinks, position biases and selection biases 0.
- Hash tables: balanced by token frequency (`router.balanced_hash_table`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.model.attention import Attention
from leadline.model.compressor import Compressor
from leadline.model.dspark import MarkovHead
from leadline.model.hyper_connections import HyperConnection, StreamHead
from leadline.model.linear import Linear, Norm
from leadline.model.moe import Experts, SharedExpert
from leadline.model.router import Gate, balanced_hash_table
from leadline.model.transformer import Transformer

GATE_SCALE = 0.01
COMB_DIAGONAL = 4.0  # softmax of [4, 0, 0, 0] = 0.95 on the diagonal


@torch.no_grad()
def initialize(model: Transformer, seed: int, token_frequencies_V: Tensor | None = None) -> None:
    """Fill every parameter and buffer of a freshly built model, the same on every device.

    token_frequencies_V: occurrences of each id in the training text, for the hash tables; None = all equal.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    if token_frequencies_V is None:
        token_frequencies_V = torch.ones(config.vocab_size)
    _normal(model.embed.weight, generator)
    hash_layers = 0
    for module in model.modules():
        if isinstance(module, Linear):
            _normal(module.weight, generator)
        elif isinstance(module, Norm):
            module.weight.fill_(1.0)
        elif isinstance(module, Experts):
            _normal(module.w1, generator)
            _normal(module.w3, generator)
            module.w2.zero_()
        elif isinstance(module, Compressor):
            module.ape.zero_()
        elif isinstance(module, HyperConnection):
            _hyper_connection(module, generator)
        elif isinstance(module, StreamHead):
            _normal(module.fn, generator)
            module.base.zero_()
            module.scale.fill_(GATE_SCALE)
        elif isinstance(module, MarkovHead):
            _normal(module.markov_w1.weight, generator)
        elif isinstance(module, Gate):
            _normal(module.weight, generator)
            if module.bias is not None:
                module.bias.zero_()
            if module.tid2eid is not None:
                table = balanced_hash_table(
                    token_frequencies_V, config.n_routed_experts, config.num_experts_per_tok, seed + hash_layers
                )
                module.tid2eid.copy_(table)
                hash_layers += 1
    for module in model.modules():  # after every Linear was drawn
        if isinstance(module, Attention):
            module.attn_sink.zero_()
            module.wo_b.weight.zero_()
        elif isinstance(module, SharedExpert):
            module.w2.weight.zero_()


def _normal(weight: Tensor, generator: torch.Generator) -> None:
    values = torch.randn(weight.shape, generator=generator) * (0.5 * weight.shape[-1] ** -0.5)
    weight.copy_(values)


def _hyper_connection(module: HyperConnection, generator: torch.Generator) -> None:
    s = module.num_streams
    _normal(module.fn, generator)
    module.scale.fill_(GATE_SCALE)
    module.base.zero_()
    module.base[2 * s :].view(s, s).fill_diagonal_(COMB_DIAGONAL)
