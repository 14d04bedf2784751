"""The indexer's KL loss in Triton, forward and backward.

    kl = sum_c target_c (log target_c - log guess_c)        d kl / d score_c = guess_c - target_c

The arithmetic is in two sums over heads for each query and column: the attention mass of an entry, 2 H K FLOPs, and its
index score, 2 J I. Both come from `head_sums` of the lightning indexer, in FP32 [queries, columns] for a run of queries
whose columns fit into the workspace; what remains is one pass over rows of numbers.

Picked entries. The columns are the M picks of a query, so the gradients of the scores are as long as the list of picks
itself, and far shorter than its queries (4 M bytes against 2 H K). The forward keeps them, and the backward never
computes a mass again. What each pick contributes to the gradient of its key is written into a workspace, and added in
the order of the queries through the inverse of the lists, as `sparse_attention` does: nothing is added atomically, and
two runs agree bitwise.

All visible entries (the dense warm-up). Keeping a gradient for each of them would not be linear in memory, so the
backward computes masses and scores again, run by run; a block of keys then walks over the queries that see it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from leadline.ops.lightning_indexer.kernel import Reached, head_sums, multiprocessors
from leadline.ops.opaque import opaque
from leadline.ops.sparse_attention.kernel import add_picks, picks_of_entries, queries_of_entries

WORKSPACE_BYTES = 256 * 2**20


@triton.jit
def _columns(picked_TX, visible_T, t, x, X, PICKED: tl.constexpr):
    """Numbers of the entries in some columns of query t, and which of these columns there are."""
    if PICKED:
        number = tl.load(picked_TX + t * X + x, mask=x < X, other=-1).to(tl.int32)
        return number, number >= 0
    else:
        return x, x < tl.load(visible_T + t)


@triton.jit(do_not_specialize=["start"])
def indexer_loss_rows_kernel(
    masses_tX, scores_tX, picked_TX, visible_T, kl_T, gradients_tX, start, X,
    PICKED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """kl of one query, where it is wanted, and where they are wanted the gradients of the scores, 0 where there is no
    column. These may take the place of the masses."""
    row = tl.program_id(0).to(tl.int64)
    t = start + row
    end = X if PICKED else tl.load(visible_T + t).to(tl.int32)
    place = tl.arange(0, COLUMNS)
    mass_X = tl.zeros((COLUMNS,), tl.float32)
    most_X = tl.full((COLUMNS,), float("-inf"), tl.float32)
    for at in range(0, end, COLUMNS):
        _, real = _columns(picked_TX, visible_T, t, at + place, X, PICKED)
        mass_X += tl.load(masses_tX + row * X + at + place, mask=real, other=0.0)
        score_X = tl.load(scores_tX + row * X + at + place, mask=real, other=float("-inf"))
        most_X = tl.maximum(most_X, score_X)
    most = tl.max(most_X)
    sum_X = tl.zeros((COLUMNS,), tl.float32)
    for at in range(0, end, COLUMNS):
        _, real = _columns(picked_TX, visible_T, t, at + place, X, PICKED)
        score_X = tl.load(scores_tX + row * X + at + place, mask=real, other=float("-inf"))
        sum_X += tl.where(real, tl.exp(score_X - most), 0.0)
    mass, log_sum = tl.maximum(tl.sum(mass_X), 1.1754943508222875e-38), tl.log(tl.sum(sum_X))
    kl_X = tl.zeros((COLUMNS,), tl.float32)
    for at in range(0, end, COLUMNS):
        _, real = _columns(picked_TX, visible_T, t, at + place, X, PICKED)
        target_X = tl.load(masses_tX + row * X + at + place, mask=real, other=0.0) / mass
        log_guess_X = tl.load(scores_tX + row * X + at + place, mask=real, other=0.0) - most - log_sum
        if kl_T is not None:
            # 0 log 0 is 0; a NaN is not hidden.
            log_target_X = tl.log(tl.where(target_X == 0.0, 1.0, target_X))
            kl_X += tl.where(real, target_X * (log_target_X - log_guess_X), 0.0)
        if gradients_tX is not None:
            gradient_X = tl.where(real, tl.exp(log_guess_X) - target_X, 0.0)
            tl.store(gradients_tX + row * X + at + place, gradient_X, mask=at + place < X)
    if kl_T is not None:
        tl.store(kl_T + t, tl.sum(kl_X))


@triton.jit
def _keys(keys_CI, number_X, real_X, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Keys of some entries, [X, I]; zero where a column is not real."""
    column = tl.arange(0, PADDED)
    real_XI = real_X[:, None] & (column < WIDTH)[None, :]
    return tl.load(keys_CI + number_X[:, None] * WIDTH + column[None, :], mask=real_XI, other=0.0)


@triton.jit
def _heads(q_TJI, weight_TJ, t, block, J, WIDTH: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr):
    """q [heads, I] and weights of a block of heads of query t; and where they stand in [T, J]."""
    head_J, column = block * HEADS + tl.arange(0, HEADS), tl.arange(0, PADDED)
    real = (head_J < J)[:, None] & (column < WIDTH)[None, :]
    q_JI = tl.load(q_TJI + (t * J + head_J)[:, None] * WIDTH + column[None, :], mask=real, other=0.0)
    return q_JI, tl.load(weight_TJ + t * J + head_J, mask=head_J < J, other=0.0).to(tl.float32), t * J + head_J, real


@triton.jit(do_not_specialize=["start"])
def indexer_loss_bwd_queries_kernel(
    q_TJI, weight_TJ, keys_CI, picked_TX, first_entry_T, visible_T, dkl_T, gradients_tX,
    dq_TJI, dweight_TJ, start, J, X,
    WIDTH: tl.constexpr, PICKED: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """dq and dweight of a block of heads of one query."""
    blocks = tl.cdiv(J, HEADS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    t = start + row
    q_JI, weight_J, at_J, real_JI = _heads(q_TJI, weight_TJ, t, tl.program_id(0) % blocks, J, WIDTH, HEADS, PADDED)
    keys_CI += tl.load(first_entry_T + t) * WIDTH
    dkl = tl.load(dkl_T + t)
    end = X if PICKED else tl.load(visible_T + t).to(tl.int32)
    dq_JI = tl.zeros((HEADS, PADDED), tl.float32)
    dweight_J = tl.zeros((HEADS,), tl.float32)
    for at in range(0, end, COLUMNS):
        x = at + tl.arange(0, COLUMNS)
        number, real = _columns(picked_TX, visible_T, t, x, X, PICKED)
        keys_XI = _keys(keys_CI, number, real, WIDTH, PADDED)
        dscore_X = tl.load(gradients_tX + row * X + x, mask=real, other=0.0) * dkl
        products_JX = tl.dot(q_JI, keys_XI.T, input_precision="ieee")
        passes = products_JX > 0
        dweight_J += tl.sum(tl.where(passes, products_JX, 0.0) * dscore_X[None, :], 1)
        dproducts_JX = tl.where(passes, weight_J[:, None] * dscore_X[None, :], 0.0)
        dq_JI = tl.dot(dproducts_JX.to(q_JI.dtype), keys_XI, dq_JI, input_precision="ieee")
    tl.store(dq_TJI + at_J[:, None] * WIDTH + tl.arange(0, PADDED)[None, :], dq_JI.to(q_JI.dtype), mask=real_JI)
    tl.store(dweight_TJ + at_J, dweight_J.to(dweight_TJ.dtype.element_ty), mask=at_J < (t + 1) * J)


@triton.jit
def _dproducts(keys_XI, q_JI, weight_J, dscore_X):
    """Gradients of the products of some columns and heads, [X, J]."""
    passes = tl.dot(keys_XI, q_JI.T, input_precision="ieee") > 0
    return tl.where(passes, dscore_X[:, None] * weight_J[None, :], 0.0).to(q_JI.dtype)


@triton.jit(do_not_specialize=["start"])
def indexer_loss_bwd_rows_kernel(
    q_TJI, weight_TJ, keys_CI, picked_TX, first_entry_T, visible_T, dkl_T, gradients_tX,
    rows_tXBI, start, J, X,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """What each pick of a query contributes to the gradient of its key, summed over a block of heads, of which there
    are B; in the dtype of q."""
    blocks = tl.cdiv(J, HEADS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    t = start + row
    q_JI, weight_J, _at, _real = _heads(q_TJI, weight_TJ, t, block, J, WIDTH, HEADS, PADDED)
    keys_CI += tl.load(first_entry_T + t) * WIDTH
    dkl = tl.load(dkl_T + t)
    column = tl.arange(0, PADDED)
    for at in range(0, X, COLUMNS):
        x = at + tl.arange(0, COLUMNS)
        number, real = _columns(picked_TX, visible_T, t, x, X, True)
        keys_XI = _keys(keys_CI, number, real, WIDTH, PADDED)
        dscore_X = tl.load(gradients_tX + row * X + x, mask=real, other=0.0) * dkl
        rows_XI = tl.dot(_dproducts(keys_XI, q_JI, weight_J, dscore_X), q_JI, input_precision="ieee")
        here = rows_tXBI + ((row * X + x) * blocks + block)[:, None] * WIDTH + column[None, :]
        tl.store(here, rows_XI.to(q_JI.dtype), mask=real[:, None] & (column < WIDTH)[None, :])


@triton.jit(do_not_specialize=["start", "stop", "C", "part"])
def indexer_loss_bwd_keys_kernel(
    q_TJI, weight_TJ, keys_CI, first_entry_T, visible_T, start_C, stop_C, dkl_T, gradients_tX,
    dkeys_SCI, start, stop, J, C, X, part,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of keys from the queries start + s part to start + (s + 1) part - 1, at most to stop - 1,
    where s is the second program index. Key c is seen by none but queries start_C[c] to stop_C[c] - 1."""
    s = tl.program_id(1).to(tl.int64)
    c_X = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    keys_XI = _keys(keys_CI, c_X, c_X < C, WIDTH, PADDED)
    start_X = tl.load(start_C + c_X, mask=c_X < C, other=0)
    stop_X = tl.load(stop_C + c_X, mask=c_X < C, other=0)
    empty = start_X >= stop_X
    low = tl.maximum(tl.min(tl.where(empty, stop, start_X)), start + s * part)
    high = tl.minimum(tl.max(tl.where(empty, 0, stop_X)), tl.minimum(start + (s + 1) * part, stop))
    dkeys_XI = tl.zeros((COLUMNS, PADDED), tl.float32)
    blocks = tl.cdiv(J, HEADS)
    for step in range(0, (tl.maximum(high - low, 0) * blocks).to(tl.int32)):
        t = low + step // blocks
        q_JI, weight_J, _at, _real = _heads(q_TJI, weight_TJ, t, step % blocks, J, WIDTH, HEADS, PADDED)
        x = c_X - tl.load(first_entry_T + t)
        seen = (x >= 0) & (x < tl.load(visible_T + t))
        dscore_X = tl.load(gradients_tX + (t - start) * X + x, mask=seen, other=0.0) * tl.load(dkl_T + t)
        dkeys_XI = tl.dot(_dproducts(keys_XI, q_JI, weight_J, dscore_X), q_JI, dkeys_XI, input_precision="ieee")
    column = tl.arange(0, PADDED)
    real_XI = (c_X < C)[:, None] & (column < WIDTH)[None, :]
    tl.store(dkeys_SCI + (s * C + c_X)[:, None] * WIDTH + column[None, :], dkeys_XI, mask=real_XI)


class _Operands(NamedTuple):
    """What every kernel gets; the tensors are contiguous."""

    q_TJI: Tensor
    weight_TJ: Tensor
    keys_CI: Tensor
    q_THK: Tensor
    entries_CK: Tensor
    lse_TH: Tensor
    reached: Reached
    picked_TM: Tensor | None

    @property
    def columns(self) -> int:
        """Columns of a row: the picks, or as many as entries are visible to any query, rounded up so that rows begin at
        multiples of 64 bytes."""
        return triton.cdiv(self.reached.most, 16) * 16 if self.picked_TM is None else self.picked_TM.shape[1]

    @property
    def queries_at_once(self) -> int:
        """How many rows of masses and of scores the workspace holds."""
        return max(1, min(len(self.q_TJI), WORKSPACE_BYTES // (8 * max(1, self.columns))))


def _operands(
    q_TJI: Tensor, weight_TJ: Tensor, keys_CI: Tensor, q_THK: Tensor, entries_CK: Tensor, lse_TH: Tensor,
    first_entry_T: Tensor, visible_T: Tensor, most_visible: int, num_sequences: int, picked_TM: Tensor | None,
) -> _Operands:  # fmt: skip
    tensors = [x.contiguous() for x in (q_TJI, weight_TJ, keys_CI, q_THK, entries_CK, lse_TH)]
    seen = first_entry_T.contiguous(), visible_T.contiguous()
    together = len(q_TJI) // max(1, num_sequences)
    picked_TM = None if picked_TM is None else picked_TM.contiguous()
    return _Operands(*tensors, Reached(*seen, most_visible, together), picked_TM)


def _rows(x: _Operands, start: int, sums_StX: Tensor, kl_T: Tensor | None, gradients_tX: Tensor | None) -> None:
    """kl of the queries from `start` on, and gradients of their scores. sums: room for masses and scores."""
    masses_tX, scores_tX = sums_StX
    head_sums(x.q_THK, x.lse_TH, x.entries_CK, x.reached, x.picked_TM, masses_tX, start, attention=True)
    head_sums(x.q_TJI, x.weight_TJ, x.keys_CI, x.reached, x.picked_TM, scores_tX, start)
    num_queries, length = masses_tX.shape
    indexer_loss_rows_kernel[(num_queries,)](
        masses_tX, scores_tX, x.picked_TM, x.reached.visible_T, kl_T, gradients_tX, start, length,
        PICKED=x.picked_TM is not None, COLUMNS=max(16, min(1024, triton.next_power_of_2(length))), num_warps=4,
    )  # fmt: skip


def _tiles(q_TJI: Tensor) -> dict[str, int]:
    """Shape of a program of the backward. Float32 has no matrix unit, and wants small products."""
    _, num_heads, width = q_TJI.shape
    most = 16 if q_TJI.dtype == torch.float32 else 64
    heads = min(most, max(16, triton.next_power_of_2(num_heads)))
    return {
        "WIDTH": width,
        "HEADS": heads,
        "COLUMNS": most,
        "PADDED": max(16, triton.next_power_of_2(width)),
        "num_warps": 4,
    }


def _bwd_queries(
    x: _Operands, dkl_T: Tensor, gradients_tX: Tensor, start: int, dq_TJI: Tensor, dweight_TJ: Tensor
) -> None:
    """dq and dweight of the queries from `start` on, as many as `gradients` has rows."""
    (num_queries, length), heads, tiles = gradients_tX.shape, x.q_TJI.shape[1], _tiles(x.q_TJI)
    indexer_loss_bwd_queries_kernel[(num_queries * triton.cdiv(heads, tiles["HEADS"]),)](
        x.q_TJI, x.weight_TJ, x.keys_CI, x.picked_TM, x.reached.first_entry_T, x.reached.visible_T, dkl_T, gradients_tX,
        dq_TJI, dweight_TJ, start, heads, length,
        PICKED=x.picked_TM is not None, **tiles,
    )  # fmt: skip


def _bwd_picks(x: _Operands, dkl_T: Tensor, gradients_TM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dweight and, FP32, dkeys from the gradients of the scores of all picks."""
    assert x.picked_TM is not None
    (num_queries, heads, width), picks, tiles = x.q_TJI.shape, x.columns, _tiles(x.q_TJI)
    dq_TJI, dweight_TJ = torch.empty_like(x.q_TJI), torch.empty_like(x.weight_TJ)
    dkeys_CI = torch.zeros_like(x.keys_CI, dtype=torch.float32)
    _bwd_queries(x, dkl_T, gradients_TM, 0, dq_TJI, dweight_TJ)
    blocks = triton.cdiv(heads, tiles["HEADS"])
    row_bytes = picks * blocks * width * x.q_TJI.element_size()
    rows_tMBI = x.q_TJI.new_empty((max(1, min(num_queries, WORKSPACE_BYTES // row_bytes)), picks, blocks, width))
    inverses = picks_of_entries(x.reached.first_entry_T, x.picked_TM, len(x.keys_CI), len(rows_tMBI))
    for start, inverse in zip(range(0, num_queries, len(rows_tMBI)), inverses, strict=True):
        stop = min(start + len(rows_tMBI), num_queries)
        indexer_loss_bwd_rows_kernel[((stop - start) * blocks,)](
            x.q_TJI, x.weight_TJ, x.keys_CI, x.picked_TM, x.reached.first_entry_T, x.reached.visible_T, dkl_T,
            gradients_TM[start:stop], rows_tMBI, start, heads, picks, **tiles,
        )  # fmt: skip
        add_picks(rows_tMBI, inverse, dkeys_CI)
    return dq_TJI, dweight_TJ, dkeys_CI


def _bwd_visible(x: _Operands, dkl_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dweight and, FP32, dkeys; masses and scores are computed again."""
    num_queries, heads, width = x.q_TJI.shape
    dq_TJI, dweight_TJ = torch.empty_like(x.q_TJI), torch.empty_like(x.weight_TJ)
    dkeys_CI = torch.zeros_like(x.keys_CI, dtype=torch.float32)
    num_keys, tiles = len(x.keys_CI), _tiles(x.q_TJI)
    programs = triton.cdiv(num_keys, tiles["COLUMNS"])
    start_C, stop_C = queries_of_entries(x.reached.first_entry_T, x.reached.visible_T, num_keys)
    sums_StX = x.lse_TH.new_empty((2, x.queries_at_once, x.columns))
    # One program a block of keys would leave most of the device idle when there are few.
    parts = max(1, min(4 * multiprocessors(x.q_TJI.device) // programs, triton.cdiv(x.queries_at_once, 64)))
    for start in range(0, num_queries, x.queries_at_once):
        stop = min(start + x.queries_at_once, num_queries)
        gradients_tX = sums_StX[0, : stop - start]
        _rows(x, start, sums_StX[:, : stop - start], None, gradients_tX)
        _bwd_queries(x, dkl_T, gradients_tX, start, dq_TJI, dweight_TJ)
        dkeys_SCI = torch.empty((parts, num_keys, width), device=dkeys_CI.device)
        indexer_loss_bwd_keys_kernel[(programs, parts)](
            x.q_TJI, x.weight_TJ, x.keys_CI, x.reached.first_entry_T, x.reached.visible_T, start_C, stop_C, dkl_T,
            gradients_tX, dkeys_SCI, start, stop, heads, num_keys, x.columns, triton.cdiv(stop - start, parts),
            **tiles,
        )  # fmt: skip
        dkeys_CI += dkeys_SCI.sum(0)
    return dq_TJI, dweight_TJ, dkeys_CI


def _empty_results(
    q_TJI: Tensor, weight_TJ: Tensor, keys_CI: Tensor, q_THK: Tensor, entries_CK: Tensor, lse_TH: Tensor,
    first_entry_T: Tensor, visible_T: Tensor, most_visible: int, num_sequences: int, picked_TM: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    picks = 0 if picked_TM is None else picked_TM.shape[1]
    return lse_TH.new_empty(len(q_TJI)), lse_TH.new_empty((len(q_TJI), picks))


@opaque(_empty_results)
def forward(
    q_TJI: Tensor, weight_TJ: Tensor, keys_CI: Tensor, q_THK: Tensor, entries_CK: Tensor, lse_TH: Tensor,
    first_entry_T: Tensor, visible_T: Tensor, most_visible: int, num_sequences: int, picked_TM: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """kl, and what the backward needs of the forward: the gradients of the scores of the picks, [T, M], or nothing,
    [T, 0], when all visible entries count."""
    operands = q_TJI, weight_TJ, keys_CI, q_THK, entries_CK, lse_TH
    rest = first_entry_T, visible_T, most_visible, num_sequences, picked_TM
    kl_T, gradients_TM = _empty_results(*operands, *rest)
    x = _operands(*operands, *rest)
    if x.columns == 0:
        return kl_T.zero_(), gradients_TM
    sums_StX = lse_TH.new_empty((2, x.queries_at_once, x.columns))
    for start in range(0, len(q_TJI), x.queries_at_once):
        stop = min(start + x.queries_at_once, len(q_TJI))
        _rows(x, start, sums_StX[:, : stop - start], kl_T, None if picked_TM is None else gradients_TM[start:stop])
    return kl_T, gradients_TM


def _empty_gradients(dkl_T: Tensor, gradients_TM: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq_TJI, dweight_TJ, dkeys_CI = (x.new_empty(x.shape) for x in operands[:3])
    return dq_TJI, dweight_TJ, dkeys_CI


@opaque(_empty_gradients)
def backward(
    dkl_T: Tensor, gradients_TM: Tensor,
    q_TJI: Tensor, weight_TJ: Tensor, keys_CI: Tensor, q_THK: Tensor, entries_CK: Tensor, lse_TH: Tensor,
    first_entry_T: Tensor, visible_T: Tensor, most_visible: int, num_sequences: int, picked_TM: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, weight and keys of the index, each in its dtype."""
    operands = q_TJI, weight_TJ, keys_CI, q_THK, entries_CK, lse_TH
    x = _operands(*operands, first_entry_T, visible_T, most_visible, num_sequences, picked_TM)
    if x.columns == 0:
        return torch.zeros_like(x.q_TJI), torch.zeros_like(x.weight_TJ), torch.zeros_like(x.keys_CI)
    dkl_T = dkl_T.contiguous()
    dq_TJI, dweight_TJ, dkeys_CI = _bwd_visible(x, dkl_T) if picked_TM is None else _bwd_picks(x, dkl_T, gradients_TM)
    return dq_TJI, dweight_TJ, dkeys_CI.to(keys_CI.dtype)


class IndexerLossKernel(torch.autograd.Function):
    """The operation of `reference.IndexerLoss`, for vectors of 16 or 32 bits, with the parts of `Reach`."""

    @staticmethod
    def forward(
        ctx: Any,
        q_TJI: Tensor,
        weight_TJ: Tensor,
        keys_CI: Tensor,
        q_THK: Tensor,
        entries_CK: Tensor,
        lse_TH: Tensor,
        first_entry_T: Tensor,
        visible_T: Tensor,
        most_visible: int,
        num_sequences: int,
        picked_TM: Tensor | None,
    ) -> Tensor:
        tensors = q_TJI, weight_TJ, keys_CI, q_THK, entries_CK, lse_TH, first_entry_T, visible_T
        kl_T, gradients_TM = forward(*tensors, most_visible, num_sequences, picked_TM)
        ctx.save_for_backward(gradients_TM, *tensors, picked_TM)
        ctx.numbers = most_visible, num_sequences
        return kl_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dkl_T: Tensor) -> tuple[Tensor | None, ...]:
        gradients_TM, *tensors, picked_TM = ctx.saved_tensors
        return *backward(dkl_T, gradients_TM, *tensors, *ctx.numbers, picked_TM), *((None,) * 8)
