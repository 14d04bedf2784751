"""The lightning indexer in Triton: scores of a run of queries in a workspace, then top-k.

Scores. A score is a sum over J heads of ReLU(q . k) times a weight: 2 J I FLOPs of products with a visible entry, but
only J multiplications behind them and 4 bytes of result. So the matrix units are the floor. The products are laid out
for the sum: keys are the rows of a tile, (queries x heads) its columns. Then the heads of one query are mostly in the
registers of one thread, and a thread needs as many weights as it has columns, however many keys pass by. A tile of
queries stays in shared memory while its entries stream through; neighbouring queries of a sequence share every key that
is loaded. Entries beyond what the tile sees are never touched.

The same sum with exp(q . k / sqrt(K) - lse) in the place of ReLU is the attention mass of an entry over all heads. The
loss of the indexer needs it, for picked entries too: `head_sums` does all of these.

Workspace. The scores of a run of queries are at most 256 MiB, and the run is chosen so: 4,096 queries against 16,384
entries, 256 against 262,144. The top-k of a run (`select_topk`) follows at once. A query that sees no more entries than
it may pick needs no score, and gets none.

Few queries. In decoding a query has no neighbours and its keys are read once: bytes are the floor. The entries are cut
into so many parts that all multiprocessors read.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leadline.ops.opaque import opaque
from leadline.ops.select_topk.kernel import select_into

WORKSPACE_BYTES = 256 * 2**20
LOG2_E = math.log2(math.e)


@triton.jit
def _load(vectors, row_R, real_R, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """vectors[row], filled up with zeros to a power of two; all zero where a row is not real."""
    column = tl.arange(0, PADDED)
    real = real_R[:, None]
    if PADDED > WIDTH:
        real = real & (column < WIDTH)[None, :]
    return tl.load(vectors + row_R[:, None] * WIDTH + column[None, :], mask=real, other=0.0)


@triton.jit
def _leader(first_entry_T, visible_T, t_Q, tile, i, stop):
    """Query i of a tile leads a group when no query before it has the same entries: their first row, how many the group
    sees (none if query i is no leader), and how many each of its queries sees (0 outside of the group)."""
    first = tl.load(first_entry_T + tile + i, mask=tile + i < stop, other=-1)
    first_Q = tl.load(first_entry_T + t_Q, mask=t_Q < stop, other=-1)
    visible_Q = tl.load(visible_T + t_Q, mask=(t_Q < stop) & (first_Q == first), other=0).to(tl.int32)
    led = tl.sum(((t_Q < tile + i) & (first_Q == first)).to(tl.int32)) > 0
    return first, tl.where(led, 0, tl.max(visible_Q)), visible_Q


@triton.jit
def _rows(
    q_TJI, factor_TJ, tile, block, stop, J,
    WIDTH: tl.constexpr, ATTENTION: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """q and factor of a tile of queries and a block of heads, [queries x heads, ..]. A head that does not exist adds
    nothing to a sum."""
    row = tl.arange(0, QUERIES * HEADS)
    t_R, head_R = tile + row // HEADS, block * HEADS + row % HEADS
    real_R = (t_R < stop) & (head_R < J)
    nothing = float("inf") if ATTENTION else 0.0
    factor_R = tl.load(factor_TJ + t_R * J + head_R, mask=real_R, other=nothing).to(tl.float32)
    if ATTENTION:
        factor_R *= 1.4426950408889634
    return _load(q_TJI, t_R * J + head_R, real_R, WIDTH, PADDED), factor_R


@triton.jit
def _sums(keys, q, factor_R, scale, ATTENTION: tl.constexpr, QUERIES: tl.constexpr):
    """Sums over the heads of a tile, [keys, queries]. factor: the weight of each head, or its lse in units of log 2."""
    products = tl.dot(keys, q.T, input_precision="ieee")
    if ATTENTION:
        terms = tl.exp2(products * scale - factor_R[None, :])
    else:
        terms = tl.maximum(products, 0.0, propagate_nan=tl.PropagateNan.ALL) * factor_R[None, :]
    return tl.sum(terms.reshape(keys.shape[0], QUERIES, q.shape[0] // QUERIES), 2)


@triton.jit(do_not_specialize=["start", "stop", "enough", "part"])
def head_sums_kernel(
    q_TJI, factor_TJ, keys_CI, picked_TX, first_entry_T, visible_T, sums_tX,
    start, stop, J, X, enough, part, scale,
    WIDTH: tl.constexpr, PICKED: tl.constexpr, ATTENTION: tl.constexpr,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, BLOCKS: tl.constexpr, KEYS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """sums[t - start, x] of one tile of queries and of `part` columns: sum over j of a term of q_tj . key_x, where x
    numbers the visible entries, or the picks. Written where x is visible, or a pick; not at all for a tile whose
    queries see at most `enough` entries."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(stop - start, QUERIES)
    tile = start + program % tiles * QUERIES
    begin = (program // tiles).to(tl.int32) * part
    t_Q = tile + tl.arange(0, QUERIES)
    most = X if PICKED else tl.max(tl.load(visible_T + t_Q, mask=t_Q < stop, other=0)).to(tl.int32)
    if most > tl.maximum(begin, enough):
        if BLOCKS == 1:
            q, factor_R = _rows(q_TJI, factor_TJ, tile, 0, stop, J, WIDTH, ATTENTION, QUERIES, HEADS, PADDED)
        place = tl.arange(0, KEYS)
        for i in range(QUERIES):
            first, length, visible_Q = _leader(first_entry_T, visible_T, t_Q, tile, i, stop)
            end = tl.minimum(X if PICKED else length, begin + part)
            for at in range(begin, end, KEYS):
                x = at + place
                if PICKED:
                    number = tl.load(picked_TX + tile * X + x, mask=x < end, other=-1).to(tl.int32)
                    real = number >= 0
                    seen = tl.broadcast_to(real[:, None], (KEYS, QUERIES))
                else:
                    number = x
                    real = x < end
                    seen = real[:, None] & (x[:, None] < visible_Q[None, :])
                keys = _load(keys_CI, first + number, real, WIDTH, PADDED)
                if BLOCKS == 1:
                    sums = _sums(keys, q, factor_R, scale, ATTENTION, QUERIES)
                else:
                    sums = tl.zeros((KEYS, QUERIES), tl.float32)
                    for b in range(BLOCKS):
                        part_q, part_R = _rows(
                            q_TJI, factor_TJ, tile, b, stop, J, WIDTH, ATTENTION, QUERIES, HEADS, PADDED
                        )
                        sums += _sums(keys, part_q, part_R, scale, ATTENTION, QUERIES)
                tl.store(sums_tX + (t_Q - start)[None, :] * X + x[:, None], sums, mask=seen)


class Blocks(NamedTuple):
    """Shape of a program: queries x heads (of which there are so many blocks) against some keys; its load stages."""

    queries: int
    heads: int
    blocks: int
    keys: int
    stages: int


# (queries x heads, keys, stages) of a program, best first; the first that fits into shared memory is taken.
# Float32 products run on the ordinary arithmetic units, which want the smallest.
SHAPES = ((256, 64, 3), (128, 64, 3), (128, 64, 2), (64, 64, 2), (64, 32, 1), (16, 16, 1))
SCRATCH_BYTES = 2 * 2**10


def _blocks(q_TJI: Tensor, queries: int) -> Blocks:
    """The shape for tiles of at most this many queries."""
    _, num_heads, width = q_TJI.shape
    heads, queries = triton.next_power_of_2(num_heads), 1 << (queries.bit_length() - 1)
    bytes_of_vector = max(16, triton.next_power_of_2(width)) * q_TJI.element_size()
    room = shared_bytes(q_TJI.device) - SCRATCH_BYTES
    *larger, (rows, keys, stages) = SHAPES
    for shape in larger if q_TJI.dtype != torch.float32 else ():
        held = min(shape[0], heads * queries) + shape[1] * shape[2]
        if held * bytes_of_vector <= room:
            rows, keys, stages = shape
            break
    heads = min(heads, rows)
    queries = min(queries, rows // heads)
    heads = max(heads, 16 // queries)  # a matrix product has at least 16 columns
    return Blocks(queries, heads, triton.cdiv(num_heads, heads), keys, stages)


def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may take; the interpreter gets small programs."""
    if device.type != "cuda":
        return 2**15
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def part_of(length: int, tiles: int, device: torch.device) -> int:
    """Columns of one program: 4,096, or fewer where that would leave multiprocessors without one."""
    wanted = triton.cdiv(2 * multiprocessors(device), tiles)
    return min(4096, max(256, triton.cdiv(triton.cdiv(length, wanted), 64) * 64))


class Reached(NamedTuple):
    """What the queries of a segment see, as the kernels take it. most: the largest `visible`, or more. together: how
    many queries a sequence has on average."""

    first_entry_T: Tensor
    visible_T: Tensor
    most: int
    together: int


def head_sums(
    q_TJI: Tensor,
    factor_TJ: Tensor,
    keys_CI: Tensor,
    reached: Reached,
    picked_TX: Tensor | None,
    sums_tX: Tensor,
    start: int,
    *,
    attention: bool = False,
    enough: int = 0,
) -> None:
    """Sums over the heads, for the queries from `start` on, as many as `sums` has rows, against all visible keys, or
    against the picked ones:

        sum_j factor_tj ReLU(q_tj . key_x), or with `attention` sum_j exp(q_tj . key_x / sqrt(I) - factor_tj)

    A column that is not visible, or no pick, is left as it is; the sums of a query that sees at most `enough` entries
    may be. All tensors are contiguous.
    """
    num_queries, length = sums_tX.shape
    _, num_heads, width = q_TJI.shape
    blocks = _blocks(q_TJI, 1 if picked_TX is not None else max(1, reached.together))
    tiles = triton.cdiv(num_queries, blocks.queries)
    part = part_of(length, tiles, q_TJI.device)
    head_sums_kernel[(tiles * triton.cdiv(length, part),)](
        q_TJI, factor_TJ, keys_CI, picked_TX, reached.first_entry_T, reached.visible_T, sums_tX,
        start, start + num_queries, num_heads, length, enough, part, width**-0.5 * LOG2_E,
        WIDTH=width, PICKED=picked_TX is not None, ATTENTION=attention,
        QUERIES=blocks.queries, HEADS=blocks.heads, BLOCKS=blocks.blocks, KEYS=blocks.keys,
        PADDED=max(16, triton.next_power_of_2(width)), num_warps=4, num_stages=blocks.stages,
    )  # fmt: skip


def _empty_picks(
    q_TJI: Tensor, weight_TJ: Tensor, keys_CI: Tensor,
    first_entry_T: Tensor, visible_T: Tensor, most_visible: int, num_sequences: int, k: int,
) -> Tensor:  # fmt: skip
    return torch.empty((len(q_TJI), min(k, most_visible)), dtype=torch.int64, device=q_TJI.device)


@opaque(_empty_picks)
def pick(
    q_TJI: Tensor, weight_TJ: Tensor, keys_CI: Tensor,
    first_entry_T: Tensor, visible_T: Tensor, most_visible: int, num_sequences: int, k: int,
) -> Tensor:  # fmt: skip
    """The operation of `pick_entries_reference`, with the parts of `Reach`, except that NaN is no error."""
    seen = first_entry_T.contiguous(), visible_T.contiguous()
    picked_TM = _empty_picks(q_TJI, weight_TJ, keys_CI, *seen, most_visible, num_sequences, k)
    if not picked_TM.numel():
        return picked_TM
    q_TJI, weight_TJ, keys_CI = q_TJI.contiguous(), weight_TJ.contiguous(), keys_CI.contiguous()
    reached = Reached(*seen, most_visible, len(q_TJI) // num_sequences)
    width = triton.cdiv(most_visible, 16) * 16  # rows that begin at multiples of 64 bytes
    rows = max(1, min(len(q_TJI), WORKSPACE_BYTES // (4 * width)))
    scores_tX = torch.empty((rows, width), dtype=torch.float32, device=q_TJI.device)
    for start in range(0, len(q_TJI), rows):
        stop = min(start + rows, len(q_TJI))
        here_tX = scores_tX[: stop - start]
        head_sums(q_TJI, weight_TJ, keys_CI, reached, None, here_tX, start, enough=picked_TM.shape[1])
        select_into(here_tX, reached.visible_T[start:stop], picked_TM[start:stop])
    return picked_TM
