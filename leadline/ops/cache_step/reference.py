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


class NewTokens(NamedTuple):
    """What a compressor has of a step's tokens.

    values_TE, scores_TE: FP32. ape_RE: FP32, the bias that the scores get, ape[position mod R]. positions_T: int64.
    """

    values_TE: Tensor
    scores_TE: Tensor
    ape_RE: Tensor
    positions_T: Tensor


class Tails(NamedTuple):
    """The tokens that a compressor keeps until their entries are finished, and where a step's tokens belong.

    values_YE, scores_YE: FP32, bias included. rows_T: int64, the rows y of the new tokens.
    """

    values_YE: Tensor
    scores_YE: Tensor
    rows_T: Tensor


def finished(x_XK: Tensor, finish: Finish) -> Tensor:
    """The vectors [X, K] that are stored, in the dtype of x. Differentiable in x and the weight."""
    weight_K, eps, cos_XP, sin_XP, rounding = finish
    return norm_rope(x_XK, cos_XP, sin_XP, weight=weight_K, eps=eps, rounding=rounding)


@torch.no_grad()
def store_keys_reference(x_TK: Tensor, finish: Finish, rows_T: Tensor, target: Source) -> None:
    write_rows(target, rows_T, finished(x_TK, finish))


@torch.no_grad()
def store_entries_reference(
    tokens: NewTokens, tails: Tails, slots_CG: Tensor, dtype: torch.dtype, finish: Finish, rows_C: Tensor,
    target: Source,
) -> None:  # fmt: skip
    tails.values_YE[tails.rows_T] = tokens.values_TE
    tails.scores_YE[tails.rows_T] = tokens.scores_TE + tokens.ape_RE[tokens.positions_T % len(tokens.ape_RE)]
    if not len(rows_C):
        return
    # The new tokens are in the tails by now.
    new_CG = slots_CG - len(tails.values_YE)
    rows_CG = torch.where(new_CG < 0, slots_CG, tails.rows_T[new_CG.clamp_min(0)])
    entries_CK = gated_pool(tails.values_YE, tails.scores_YE, rows_CG, len(finish.weight_K)).to(dtype)
    write_rows(target, rows_C, finished(entries_CK, finish))
