"""Cases of decoding at a million tokens: one layer's attention for one new token of each of a few sequences.

A model calls these kernels once in each of its layers, every time with another cache, from a captured graph. So that is
what is timed: a graph of several calls, each with a cache of its own, together larger than the L2 cache. The floor is
the bytes of the cache that a query has to look at, each once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from leadline.formats import fp4, hadamard
from leadline.formats.cache_entry import PackedIndex, PackedKeys, pack_keys
from leadline.ops.cache_rows import operands
from leadline.ops.decode_attention import decode_attention
from leadline.ops.decode_indexer import PAGE_KEYS, decode_pick_entries
from leadline.recipes.bench_ops.case import BF16, Case, Cost, H, Inputs, K, R, random

WINDOW, PICKS, HEADS, WIDTH = 128, 512, 64, 128  # of V4-Flash
PAGES = 8192  # of a million tokens: 32 entries of a CSA layer each, and 1 of an HCA layer
KEY_BYTES, INDEX_BYTES = K + R + 8, WIDTH // 2 + WIDTH // 32  # packed
GATE_QUERIES = (1, 3)


def _keys(rows: int, packed: bool, device: torch.device) -> tuple[Tensor, Tensor | None]:
    vectors_XK = random(rows, K, device=device)
    return operands(pack_keys(vectors_XK, R)) if packed else (vectors_XK, None)


def _index(rows: int, packed: bool, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Packed: random codes under scales from 2^-3 to 1, which are what rotated keys of unit variance need."""
    if not packed:
        return random(rows, WIDTH, device=device), None
    codes = torch.randint(0, 256, (rows, WIDTH // 2), dtype=torch.uint8, device=device)
    return codes, torch.randint(124, 128, (rows, WIDTH // 32), dtype=torch.uint8, device=device)


def _lists(queries: int, places: int, rows: int, device: torch.device) -> Tensor:
    return torch.stack([torch.randperm(rows, device=device)[:places] for _ in range(queries)]).int()


def _attention(queries: int, pages: int, packed: bool, device: torch.device) -> Inputs:
    """q, window and its rows, entries, sink; the entries of all queries in one pool."""
    window = _keys(queries * WINDOW, packed, device)
    window_rows_TW = torch.arange(queries * WINDOW, dtype=torch.int32, device=device).view(queries, WINDOW)
    entries = _keys(queries * pages, packed, device)
    return [random(queries, H, K, device=device), *window, window_rows_TW, *entries, torch.randn(H, device=device)]


def _keys_of(values: Tensor, scales: Tensor | None) -> Tensor | PackedKeys:
    return values if scales is None else PackedKeys(values, scales)


def _hca(queries: int, packed: bool) -> Case:
    """Window and every entry."""

    def inputs(count: int, device: torch.device, pages: int = PAGES) -> Inputs:
        return [*_attention(count, pages, packed, device), _lists(count, pages, count * pages, device)]

    def run(
        q: Tensor, window: Tensor, window_scales: Tensor | None, window_rows: Tensor,
        entries: Tensor, entry_scales: Tensor | None, sink: Tensor, entry_rows: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        sources = _keys_of(window, window_scales), _keys_of(entries, entry_scales)
        return decode_attention(q, sources[0], window_rows, sources[1], entry_rows, sink)

    seen = queries * (WINDOW + PAGES)
    return _case("HCA layer", queries, packed, inputs, run, seen, 0, captured=24 if queries == 1 else 4)


def _csa(queries: int, packed: bool) -> Case:
    """The indexer's scores and picks, then window and picked entries."""

    def inputs(count: int, device: torch.device, pages: int = PAGES) -> Inputs:
        rows = count * pages * PAGE_KEYS
        q_TJI = fp4.fake_quantize(hadamard.rotate(random(count, HEADS, WIDTH, device=device)))
        weight_TJ = torch.randn(count, HEADS, device=device)
        table_NP = torch.randperm(count * pages, device=device).view(count, pages).int()
        sequence_T = torch.arange(count, device=device)
        visible_T = torch.full((count,), pages * PAGE_KEYS, device=device)
        attention = _attention(count, pages * PAGE_KEYS, packed, device)
        return [*attention, q_TJI, weight_TJ, *_index(rows, packed, device), table_NP, sequence_T, visible_T]

    def run(
        q: Tensor, window: Tensor, window_scales: Tensor | None, window_rows: Tensor,
        entries: Tensor, entry_scales: Tensor | None, sink: Tensor,
        q_index: Tensor, weight: Tensor, codes: Tensor, scales: Tensor | None,
        table: Tensor, sequence: Tensor, visible: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        index = codes if scales is None else PackedIndex(codes, scales)
        _, rows = decode_pick_entries(q_index, weight, index, table, sequence, visible, PICKS)
        sources = _keys_of(window, window_scales), _keys_of(entries, entry_scales)
        return decode_attention(q, sources[0], window_rows, sources[1], rows, sink)

    scored = queries * PAGES * PAGE_KEYS
    return _case(
        "CSA layer with its indexer", queries, packed, inputs, run, queries * (WINDOW + PICKS), scored,
        captured=12 if queries == 1 else 3,
    )  # fmt: skip


def _case(
    layer: str, queries: int, packed: bool,
    inputs: Callable[..., Inputs], run: Callable[..., Any], seen: int, scored: int, captured: int,
) -> Case:  # fmt: skip
    """seen: keys attended to. scored: index keys."""
    count = f"{queries} quer{'y' if queries == 1 else 'ies'}"
    key_bytes, index_bytes = (KEY_BYTES, INDEX_BYTES) if packed else (K * BF16, WIDTH * BF16)
    return Case(
        "decode_attention",
        f"{layer} at 1,048,576 tokens, {count}, {'packed' if packed else 'bf16'}",
        inputs,
        run,
        Cost(4 * H * K * seen + 2 * HEADS * WIDTH * scored, seen * key_bytes + scored * index_bytes),
        None,
        tokens=queries,
        gate_tokens=GATE_QUERIES,
        gate_inputs=lambda count, device: inputs(count, device, 40),
        captured=captured,
    )


CASES = tuple(
    make(queries, packed) for make in (_csa, _hca) for queries in (1, 8) for packed in (True, False)
)  # fmt: skip
