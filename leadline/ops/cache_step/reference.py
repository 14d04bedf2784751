"""A step's keys and entries in plain PyTorch: the ops that prefill uses, one behind the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leadline.ops.cache_rows import Source, write_rows
from leadline.ops.gated_pool import gated_pool
from leadline.ops.norm_rope import Rounding, norm_rope


class Finish(NamedTuple):
    """What is done to a vector before it is stored: norm, rotation, rounding.

    weight_K, eps, rounding: as `norm_rope` takes them. cos_XP, sin_XP: FP32 [X, R/2], the angles of the vectors.
    """

    weight_K: Tensor
    eps: float
    cos_XP: Tensor
    sin_XP: Tensor
    rounding: Rounding | None


def finished(x_XK: Tensor, finish: Finish) -> Tensor:
    """The vectors [X, K] that are stored, in the dtype of x. Differentiable in x and the weight."""
    weight_K, eps, cos_XP, sin_XP, rounding = finish
    return norm_rope(x_XK, cos_XP, sin_XP, weight=weight_K, eps=eps, rounding=rounding)


@torch.no_grad()
def store_keys_reference(x_TK: Tensor, finish: Finish, rows_T: Tensor, target: Source) -> None:
    write_rows(target, rows_T, finished(x_TK, finish))


@torch.no_grad()
def store_entries_reference(
    values_TE: Tensor,
    scores_TE: Tensor,
    ape_RE: Tensor,
    positions_T: Tensor,
    values_YE: Tensor,
    scores_YE: Tensor,
    tail_rows_T: Tensor,
    slots_CG: Tensor,
    dtype: torch.dtype,
    finish: Finish,
    rows_C: Tensor,
    target: Source,
) -> None:
    values_YE[tail_rows_T] = values_TE
    scores_YE[tail_rows_T] = scores_TE + ape_RE[positions_T % len(ape_RE)]
    if not len(rows_C):
        return
    # The new tokens are in the tails by now.
    new_CG = slots_CG - len(values_YE)
    rows_CG = torch.where(new_CG < 0, slots_CG, tail_rows_T[new_CG.clamp_min(0)])
    entries_CK = gated_pool(values_YE, scores_YE, rows_CG, len(finish.weight_K)).to(dtype)
    write_rows(target, rows_C, finished(entries_CK, finish))
