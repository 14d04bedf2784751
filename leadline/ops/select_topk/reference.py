"""Top-k in plain PyTorch.

`torch.topk` promises nothing about equal scores, so rows where the k-th and the next are equal are decided again.
How many these are is a question to the numbers, so torch.compile takes the whole as one operation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.ops.opaque import opaque


class NonFiniteScoresError(ValueError):
    """A score is not a number, so no order exists."""


@opaque(lambda scores_TC, visible_T, k: scores_TC.new_empty(len(scores_TC), k, dtype=torch.int64))
def select_topk_reference(scores_TC: Tensor, visible_T: Tensor, k: int) -> Tensor:
    num_columns = scores_TC.shape[1]
    column = torch.arange(num_columns, device=scores_TC.device)
    if num_columns <= k:
        picked = torch.where(column < visible_T[:, None], column, -1)
        return torch.nn.functional.pad(picked, (0, k - num_columns), value=-1)
    scores_TC = scores_TC.masked_fill(column >= visible_T[:, None], float("-inf"))
    best = scores_TC.topk(k + 1, dim=1)
    if bool(best.values[:, 0].isnan().any()):  # topk ranks NaN first
        raise NonFiniteScoresError("the index scores are not finite: a NaN reached the top-k selection")
    picked_Tk = best.indices[:, :k].sort(dim=1).values
    tied = (best.values[:, k - 1] == best.values[:, k]).nonzero().flatten()
    if len(tied):
        picked_Tk[tied] = _lowest_of_equals(scores_TC[tied], k)
    # A row with fewer than k visible columns took invisible ones of score -inf; they are its last.
    return torch.where(picked_Tk < visible_T[:, None], picked_Tk, -1)


def _lowest_of_equals(scores_TC: Tensor, k: int) -> Tensor:
    """The k largest of each row in ascending order of column, the lowest columns among those equal to the k-th."""
    threshold_T1 = scores_TC.topk(k, dim=1).values[:, -1:]
    above = scores_TC > threshold_T1
    equal = scores_TC == threshold_T1
    wanted_T1 = k - above.sum(1, keepdim=True)
    return (above | (equal & (equal.cumsum(1) <= wanted_T1))).nonzero()[:, 1].view(-1, k)
