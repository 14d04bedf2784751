"""What a decoding step adds to a cache: window keys, tails and entries, finished and stored where they belong."""

from __future__ import annotations

import torch
from torch import Tensor

from leadline.ops.cache_rows import Source, operands
from leadline.ops.cache_step.reference import (
    Finish,
    NewTokens,
    Tails,
    finished,
    store_entries_reference,
    store_keys_reference,
)
from leadline.ops.dispatch import use_kernel

__all__ = ["Finish", "NewTokens", "Tails", "finished", "store_entries", "store_keys"]


def store_keys(x_TK: Tensor, finish: Finish, rows_T: Tensor, target: Source) -> None:
    """target[rows[t]] = round(rotate(norm(x_t))): `norm_rope` and `write_rows` in one.

    x_TK: [T, K]. finish: what is done to a vector, with one angle for each of the T. rows_T: int64, -1 = nowhere, no
    row twice but for equal vectors. target: floats, or packed when `finish` rounds; changed in place. Each step is
    rounded to the dtype of x. Not differentiable.
    """
    if use_kernel("store_keys", x_TK):
        from leadline.ops.cache_step.kernel import store_keys_kernel

        store_keys_kernel(x_TK, *finish, rows_T, *operands(target))
    else:
        store_keys_reference(x_TK, finish, rows_T, target)


def store_entries(
    tokens: NewTokens, tails: Tails, slots_CG: Tensor, dtype: torch.dtype, finish: Finish, rows_C: Tensor,
    target: Source,
) -> None:  # fmt: skip
    """The step of a compressor (report 2.3.1, 2.3.2): the tails take in the new tokens, and every entry that a token
    finishes is pooled as in `gated_pool`, then finished and stored as in `store_keys`.

    slots_CG: int64, for every slot of an entry a row y < Y of the tails, or Y + t for new token t, -1 = empty; a tail
    row that an entry names is none of those that are written. dtype: of the entries once they are pooled. finish: with
    one angle for each of the C. rows_C: int64, the row of each entry, -1 = not finished, which costs nothing. Tails and
    target are changed in place. Not differentiable.
    """
    if use_kernel("store_entries", tokens.values_TE):
        from leadline.ops.cache_step.kernel import store_entries_kernel

        store_entries_kernel(*tokens, *tails, slots_CG, dtype, *finish, rows_C, *operands(target))
    else:
        store_entries_reference(tokens, tails, slots_CG, dtype, finish, rows_C, target)
