"""The router (report 2.1): which A of the E experts each token visits, and with what weight.

    score_te = sqrt(softplus(x_t . w_e)),     weight_te = score_te / (sum of the A chosen scores) x route scale

- Score layers choose the A largest of score + bias. The bias only steers the choice and is moved by the load, outside
  of the gradient (report 4.2.2).
- Hash layers (the first few) look the A experts up by token id in a frozen table; the weights still come from the
  scores.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leadline.model.config import ModelConfig
from leadline.model.linear import linear_fp32
from leadline.ops.route import Route, route


class Gate(nn.Module):
    """weight [E, D]; then bias FP32 [E] on score layers, or tid2eid int64 [V, A] on hash layers."""

    bias: Tensor | None
    tid2eid: Tensor | None

    def __init__(self, config: ModelConfig, hashed: bool):
        super().__init__()
        self.choices, self.route_scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = None if hashed else torch.empty(config.n_routed_experts, dtype=torch.float32)
        table = torch.empty(config.vocab_size, config.num_experts_per_tok, dtype=torch.int64) if hashed else None
        self.register_buffer("bias", bias)
        self.register_buffer("tid2eid", table)

    def forward(self, x_TD: Tensor, tokens_T: Tensor) -> Route:
        logits_TE = linear_fp32(x_TD, self.weight)
        experts_TA = None if self.tid2eid is None else self.tid2eid[tokens_T]
        return route(logits_TE, self.bias, experts_TA, self.choices, self.route_scale)


def balanced_hash_table(frequencies_V: Tensor, num_experts: int, choices: int, seed: int) -> Tensor:
    """A frozen table token id -> A experts that spreads the *tokens of a corpus* evenly, int64 [V, A].

    The table of the released models is in their checkpoints; how it was made is unpublished. A table that deals token
    ids out evenly is not balanced, because a few ids make up most of a text. Here ids are dealt in the order of
    falling frequency, each to the A experts with the least load so far; equal loads are decided by chance.

    frequencies_V: how often each id occurs (any non-negative numbers). Ids that never occur are dealt evenly too.
    """
    generator = torch.Generator().manual_seed(seed)
    frequencies = frequencies_V.double().cpu()
    # An unseen id counts as a fraction of one occurrence in all, so that unseen ids balance among themselves.
    weights = frequencies + 1.0 / (len(frequencies) + 1)
    order = torch.argsort(weights, descending=True, stable=True)
    load_E = torch.zeros(num_experts, dtype=torch.float64)
    jitter = torch.rand(len(frequencies), num_experts, generator=generator, dtype=torch.float32).double()
    smallest = float(weights.min())
    table = torch.empty(len(frequencies), choices, dtype=torch.int64)
    for token in order.tolist():
        experts = torch.topk(load_E + jitter[token] * 0.1 * smallest, choices, largest=False).indices
        table[token] = experts
        load_E[experts] += weights[token]
    return table
