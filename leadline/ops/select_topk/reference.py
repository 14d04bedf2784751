"""Top-k in plain PyTorch: the k-th value as a threshold, then the lowest columns among its equals."""

from __future__ import annotations

import torch
from torch import Tensor


class NonFiniteScoresError(ValueError):
    """A score is not a number, so no order exists."""


def select_topk_reference(scores_TC: Tensor, visible_T: Tensor, k: int) -> Tensor:
    num_columns = scores_TC.shape[1]
    column = torch.arange(num_columns, device=scores_TC.device)
    if num_columns <= k:
        picked = torch.where(column < visible_T[:, None], column, -1)
        return torch.nn.functional.pad(picked, (0, k - num_columns), value=-1)
    scores_TC = scores_TC.masked_fill(column >= visible_T[:, None], float("-inf"))
    threshold_T1 = scores_TC.topk(k, dim=1).values[:, -1:]
    above = scores_TC > threshold_T1
    equal = scores_TC == threshold_T1
    wanted_T1 = k - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1) <= wanted_T1))
    picked = chosen.nonzero()[:, 1]
    if len(picked) != k * len(scores_TC):
        raise NonFiniteScoresError("the index scores are not finite: a NaN reached the top-k selection")
    picked = picked.view(-1, k)
    # A row with fewer than k visible columns took invisible ones of score -inf; they are its last.
    return torch.where(picked < visible_T[:, None], picked, -1)
