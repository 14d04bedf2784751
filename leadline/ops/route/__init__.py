"""The choice of experts: from the router's logits to experts, their weights and the order of their rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from leadline.ops.dispatch import use_kernel
from leadline.ops.route import reference
from leadline.ops.token_permutation import ExpertOrder, expert_order


class Route(NamedTuple):
    """experts_TA int64, weights_TA FP32, scores_TE FP32 (all experts, for the balance loss), and the order of the
    experts' rows."""

    experts_TA: Tensor
    weights_TA: Tensor
    scores_TE: Tensor
    order: ExpertOrder


def route(
    logits_TE: Tensor, bias_E: Tensor | None, experts_TA: Tensor | None, choices: int, route_scale: float
) -> Route:
    """Which A of the E experts each token visits, and with what weight (report 2.1).

        score_te = sqrt(softplus(logit_te)),     weight_te = score_te / (sum of the A chosen scores) x route scale

    The A experts of the largest score + bias_E, in falling order, equal ones the lower first; or those of experts_TA,
    int64 [T, A], where there is no bias. logits_TE: FP32; all arithmetic is. Differentiable in the logits, through
    weights and scores; the bias has no gradient. Neither chosen weights nor gradients become NaN where all scores of a
    token underflow.
    """
    assert (bias_E is None) != (experts_TA is None), "experts are chosen by a bias or given"
    if use_kernel("route", logits_TE):
        from leadline.ops.route import kernel

        picked_TA, weights_TA, scores_TE, *order = kernel.Route.apply(
            logits_TE, bias_E, experts_TA, choices, route_scale
        )
        if order:
            return Route(picked_TA, weights_TA, scores_TE, ExpertOrder(*order))
    else:
        picked_TA, weights_TA, scores_TE = reference.route(logits_TE, bias_E, experts_TA, choices, route_scale)
    return Route(picked_TA, weights_TA, scores_TE, expert_order(picked_TA, logits_TE.shape[1]))
