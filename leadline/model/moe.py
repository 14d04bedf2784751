"""Mixture of experts (report 2.1): one shared expert for every token, plus A of E routed ones.

    out_t = sum_a expert_a(x_t) + shared(x_t),     expert(x) = W2 (weight x silu(min(W1 x, 10)) x clamp(W3 x, -10, 10))

The gate weight is applied before the down projection: the same as after it in exact arithmetic, not under quantisation.
Tokens are sorted by expert, so that each expert's matrix meets one run of rows; the sum over a token's experts is FP32
and in the order of its choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from leadline.model.config import ModelConfig
from leadline.model.linear import Linear, hold, linears, scale_names
from leadline.model.router import Gate
from leadline.model.segment import Segment
from leadline.model.signals import ExpertSignals
from leadline.ops.beside import Beside
from leadline.ops.grouped_linear import grouped_linear
from leadline.ops.quantized_linear import (
    Dispatched,
    Gated,
    QuantizedWeight,
    Rows,
    quantized_grouped_linear,
    quantized_linear,
    written,
)
from leadline.ops.route import Route
from leadline.ops.token_permutation import combine

# Tokens that go through the experts at once; on a GPU an expert's matrix should meet hundreds of rows.
TOKENS_PER_RUN, TOKENS_PER_RUN_ON_GPU = 2048, 8192

GroupedProducts = Callable[[Tensor, Sequence[Tensor], Tensor], tuple[Tensor, ...]]


class Experts(nn.Module):
    """The routed experts' matrices, stacked: w1 (gate), w3 (up) [E, F, D], w2 (down) [E, D, F]. Floating or quantised,
    as in `Linear`; the scales of w1 are w1_scale."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        e, f, d = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.limit = config.swiglu_limit
        self.w1 = nn.Parameter(torch.empty(e, f, d))
        self.w2 = nn.Parameter(torch.empty(e, d, f))
        self.w3 = nn.Parameter(torch.empty(e, f, d))
        for name in ("w1", "w2", "w3"):
            scale, block_scale = scale_names(name)
            self.register_buffer(scale, None)
            self.register_buffer(block_scale, None, persistent=False)
        self.products: GroupedProducts = grouped_products

    def forward(self, x_TD: Tensor, route: Route, shared: Callable[[], Tensor]) -> Tensor:
        """Sum over each token's experts, FP32, plus what all tokens share, asked for last; [T, D] in its dtype."""
        pair_X, _, counts_E = route.order
        gate_XF, up_XF = self._multiply(Dispatched(x_TD, route.order), ("w1", "w3"), counts_E)
        hidden_XF = Gated(gate_XF, up_XF, self.limit, route.weights_TA.flatten(), pair_X)
        (out_XD,) = self._multiply(hidden_XF, ("w2",), counts_E)
        return combine(out_XD, route.order, shared())

    def hold(self, weight: QuantizedWeight, name: str) -> None:
        """Replace w1, w2 or w3 by a quantised stack of the same shape; it no longer trains."""
        hold(self, name, weight)

    def _multiply(self, rows: Rows, names: tuple[str, ...], counts_E: Tensor) -> tuple[Tensor, ...]:
        """One product for each name; w1 and w3 are held in one format."""
        weights = [self._weight(name) for name in names]
        quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
        floating = [weight for weight in weights if isinstance(weight, Tensor)]
        assert not (quantized and floating), f"{' and '.join(names)} are held in different formats"
        if quantized:
            return quantized_grouped_linear(rows, quantized, counts_E)
        return self.products(written(rows), floating, counts_E)

    def _weight(self, name: str) -> Tensor | QuantizedWeight:
        weight, scale, block_scale = (getattr(self, part) for part in (name, *scale_names(name)))
        return weight if scale is None else QuantizedWeight(weight, scale, block_scale)


def grouped_products(x_XD: Tensor, weights: Sequence[Tensor], counts_E: Tensor) -> tuple[Tensor, ...]:
    """The rows of each expert times its matrix, for each of several stacks of floating matrices."""
    return tuple(grouped_linear(x_XD, weight, counts_E) for weight in weights)


class SharedExpert(nn.Module):
    """The expert that every token visits: w1, w3 [F, D], w2 [D, F]; no gate weight."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.limit = config.swiglu_limit
        self.w1 = Linear(config.hidden_size, config.moe_intermediate_size)
        self.w2 = Linear(config.moe_intermediate_size, config.hidden_size)
        self.w3 = Linear(config.hidden_size, config.moe_intermediate_size)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TF, up_TF = linears(x_TD, self.w1, self.w3)
        hidden_TF, down = Gated(gate_TF, up_TF, self.limit), self.w2.quantized
        return self.w2(written(hidden_TF)) if down is None else quantized_linear(hidden_TF, down)


def balance_loss(route: Route, segment: Segment) -> Tensor:
    """Sequence-wise balance (report 4.2.2): sum_e f_e P_e, averaged over the sequences by their length; scalar FP32.

    f_e = E / (A T_n) x tokens sent to e, P_e = mean over the sequence of score_e / sum of scores. It is 1 when
    balanced.
    """
    num_sequences, (num_tokens, num_experts) = len(segment.lengths), route.scores_TE.shape
    choices = route.experts_TA.shape[1]
    share_TE = route.scores_TE / route.scores_TE.sum(-1, keepdim=True).clamp_min(1e-20)
    ones_TA = torch.ones_like(route.weights_TA)
    chosen_TE = torch.zeros_like(share_TE).scatter_add_(1, route.experts_TA, ones_TA)
    # Sums over the tokens of a sequence as products: in a fixed order, and the host is not asked for anything.
    sequences_N1 = torch.arange(num_sequences, device=share_TE.device)[:, None]
    member_NT = (segment.sequence_T == sequences_N1).to(share_TE.dtype)
    load_NE = member_NT @ chosen_TE * (num_experts / choices) / member_NT.sum(1, keepdim=True)
    return (load_NE * (member_NT @ share_TE)).sum() / num_tokens


class MoE(nn.Module):
    def __init__(self, config: ModelConfig, hashed: bool):
        super().__init__()
        self.hashed = hashed
        self.gate = Gate(config, hashed)
        self.experts = Experts(config)
        self.shared_experts = SharedExpert(config)

    def forward(self, x_TD: Tensor, segment: Segment, training: bool = False) -> tuple[Tensor, ExpertSignals | None]:
        if not training:
            # Tokens are independent here: a long prompt goes through in runs, so that the hidden vectors stay few.
            step = len(x_TD) if torch.is_grad_enabled() else TOKENS_PER_RUN_ON_GPU if x_TD.is_cuda else TOKENS_PER_RUN
            runs = zip(x_TD.split(step), segment.tokens_T.split(step), strict=True)
            mixed = [self._mix(x, tokens)[0] for x, tokens in runs]
            return mixed[0] if len(mixed) == 1 else torch.cat(mixed), None
        mixed_TD, route = self._mix(x_TD, segment.tokens_T)
        loss = route.scores_TE.new_zeros(()) if self.hashed else balance_loss(route, segment)
        return mixed_TD, ExpertSignals(loss, route.order.counts_E)

    def _mix(self, x_TD: Tensor, tokens_T: Tensor) -> tuple[Tensor, Route]:
        """Routed experts + shared one, in the dtype of x, and the routes."""
        shared = Beside(lambda: self.shared_experts(x_TD), x_TD)
        route = self.gate(x_TD, tokens_T)
        return self.experts(x_TD, route, shared.result), route
