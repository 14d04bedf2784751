"""State: what the layers remember of sequences between forward passes.

A V4 layer does not keep every key. Per sequence it keeps a *fixed block*, whatever the length,

- the *window*: a ring of the last W keys, position p in row p mod W;
- for each compressor a *tail*: a ring of the last tokens' pooled values and scores, one window of R tokens, or two
  where windows overlap. It holds the tokens that no entry covers yet, and the previous window that the next entry
  overlaps;

and, in *pages* of 128 tokens, the *entries* made so far (and on CSA layers the index keys), the only part that grows.

Each sequence owns one slot of every fixed tensor. Its pages are a list of numbers (`page_table.py`), the same for all
layers. A state made for a number of tokens gives every slot pages of its own and grows by itself; a state made for a
number of pages leaves it to its owner which slot gets which.

State is an argument of the model: it goes in, is updated in place, and holds nothing that another sequence can read.
Gradients never flow through a state; training runs without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leadline.model.cache_format import EXACT, CacheFormat
from leadline.model.config import CSA_RATIO, ModelConfig
from leadline.model.page_table import PAGE_TOKENS, PageTable, num_pages, page_entries
from leadline.model.rows import Layout, PoolRows, RingRows, ring_length
from leadline.model.segment import Segment
from leadline.model.store import Store


class StateError(ValueError):
    """A state that does not fit what is asked of it; the message names what differs."""


@dataclass
class CompressorState:
    """Memory of one compressor: tails FP32 [slots, ring, E], and the entries of all pages."""

    values_NRE: Tensor
    scores_NRE: Tensor
    entries: Store

    @property
    def tails(self) -> tuple[Tensor, Tensor]:
        """Values and scores as rows [Y, E], the rings of all slots one behind the other."""
        return self.values_NRE.flatten(0, 1), self.scores_NRE.flatten(0, 1)

    def with_past(self, values_TE: Tensor, scores_TE: Tensor, rows: PoolRows) -> tuple[Tensor, Tensor]:
        """Values and scores of past and new tokens, gathered as `PoolRows.rows_CG` counts them; keeps the latest."""
        assert rows.past_X is not None
        source = values_TE, scores_TE
        values, scores = self.tails
        if len(rows.past_X):
            source = torch.cat([values[rows.past_X], values_TE]), torch.cat([scores[rows.past_X], scores_TE])
        values[rows.keep_ring] = values_TE[rows.keep_new]
        scores[rows.keep_ring] = scores_TE[rows.keep_new]
        return source


@dataclass
class LayerState:
    """Memory of one layer: the window rings of all slots, and the compressors it has."""

    window: Store
    entries: CompressorState | None = None
    index: CompressorState | None = None

    def with_past(self, keys_TK: Tensor, rows: RingRows) -> Tensor:
        """Window keys of past and new tokens, gathered as `Reach` counts them; keeps the latest."""
        assert rows.past_X is not None
        source = keys_TK
        if len(rows.past_X):
            keys_XK = torch.cat([self.window.read(rows.past_X), keys_TK])
            source = keys_XK if rows.order_X is None else keys_XK[rows.order_X]
        self.keep(keys_TK[rows.keep_new], rows)
        return source

    def keep(self, keys_XK: Tensor, rows: RingRows) -> None:
        """Put the keys of the latest tokens, `RingRows.keep_new`, into the ring."""
        self.window.write(rows.keep_ring, keys_XK)


@dataclass(frozen=True)
class FixedBlock:
    """A copy of one slot's fixed block: the windows and tails of all layers, by name; those of MTP blocks or
    draft stages are among them.

    With the pages that its sequence had at the time it is all that is needed to go on from there.
    """

    tensors: dict[str, Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class State:
    """Memory of `slots` sequences for all layers of a model, with those of its MTP blocks or draft stages.

    capacity_tokens: how many tokens of a sequence its slot can hold, rounded up to pages; `reserve` grows it.
    pages: in place of that, a number of pages that are given out with `assign`; max_tokens is then the length of the
    longest sequence, which bounds the page table.
    spare_tokens: how many of the latest tokens can be taken back without `restore`. The rings are longer by as many
    rows, so that what these tokens overwrite is out of every later token's sight.
    cache_format, dtype, device: those of the model. A packed format keeps keys and entries as bytes.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        capacity_tokens: int = 0,
        *,
        pages: int | None = None,
        max_tokens: int | None = None,
        spare_tokens: int = 0,
        cache_format: CacheFormat = EXACT,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if (pages is None) != (max_tokens is None) or (pages is not None and capacity_tokens):
            raise StateError("a state takes either capacity_tokens, or pages and max_tokens")
        self.config, self.slots, self.spare_tokens = config, slots, spare_tokens
        self.cache_format, self.dtype = cache_format, dtype
        self.owns_pages = pages is None
        if pages is None or max_tokens is None:
            self.pages = PageTable.fixed(slots, num_pages(capacity_tokens), device)
        else:
            self.pages = PageTable(slots, pages, num_pages(max_tokens), device)
        self.layers = [self._layer(ratio, device) for ratio in config.layer_ratios]
        self.mtp = [self._layer(ratio, device) for ratio in config.mtp_ratios]

    def _layer(self, ratio: int, device: torch.device | str) -> LayerState:
        window = self._keys(self.slots * (self.config.sliding_window + self.spare_tokens), device)
        if ratio == 0:
            return LayerState(window)
        rows = self.pages.pages * page_entries(ratio)
        entries = CompressorState(*self._tails(ratio, self.config.head_dim, device), self._keys(rows, device))
        if ratio != CSA_RATIO:
            return LayerState(window, entries)
        tails = self._tails(ratio, self.config.index_head_dim, device)
        return LayerState(window, entries, CompressorState(*tails, self._index_keys(rows, device)))

    def _tails(self, ratio: int, width: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        columns = 2 * width if ratio == CSA_RATIO else width
        shape = self.slots, ring_length(ratio) + self.spare_tokens, columns
        precision = torch.promote_types(self.dtype, torch.float32)
        values = torch.zeros(shape, dtype=precision, device=device)
        return values, values.clone()

    def _keys(self, rows: int, device: torch.device | str) -> Store:
        width, rotary_width = self.config.head_dim, self.config.qk_rope_head_dim
        if self.cache_format.packed:
            return Store.packed_keys(rows, width, rotary_width, self.dtype, device)
        return Store.floats(rows, width, self.dtype, device)

    def _index_keys(self, rows: int, device: torch.device | str) -> Store:
        store = Store.packed_index if self.cache_format.packed else Store.floats
        return store(rows, self.config.index_head_dim, self.dtype, device)

    @property
    def device(self) -> torch.device:
        return self.pages.table_NP.device

    @property
    def capacity_tokens(self) -> int:
        """Tokens of the longest sequence that a slot can hold."""
        return self.pages.pages_per_slot * PAGE_TOKENS

    @property
    def layout(self) -> Layout:
        """What `SegmentIndex` needs to know of this state."""
        return Layout(self.pages, in_place=not self.cache_format.packed, spare_tokens=self.spare_tokens)

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of a fixed block."""
        return sum(map(_bytes_of_one, self.fixed_tensors().values()))

    @property
    def bytes_per_page(self) -> int:
        """Bytes of what all layers keep of 128 tokens."""
        return sum(map(_bytes_of_one, self.page_tensors().values()))

    @property
    def num_bytes(self) -> int:
        """Bytes of every tensor held: fixed blocks, pages and the page table."""
        tensors = [*self.fixed_tensors().values(), *self.page_tensors().values(), self.pages.table_NP]
        return sum(tensor.nbytes for tensor in tensors)

    # -- pages ---------------------------------------------------------------------------------------------------

    def reserve(self, segment: Segment) -> None:
        """See that the sequences of a segment have pages for their new tokens.

        Slots with pages of their own grow, at least to twice their size, so that appending stays linear. Where the
        pages have an owner, a PageError names the slot that lacks one, or that shares one it would write into.
        """
        longest = max(past + length for past, length in zip(segment.past, segment.lengths, strict=True))
        if self.owns_pages and longest > self.capacity_tokens:
            self._grow(num_pages(max(longest, 2 * self.capacity_tokens)))
        for slot, past, length in zip(segment.slots, segment.past, segment.lengths, strict=True):
            self.pages.check(slot, past, length)

    def _grow(self, pages_per_slot: int) -> None:
        for _, store, ratio in self._entry_stores():
            store.grow(self.slots, pages_per_slot * page_entries(ratio))
        self.pages = PageTable.fixed(self.slots, pages_per_slot, self.device)

    def assign(self, slot: int, pages: Sequence[int], written: int = 0) -> None:
        """The pages of a slot from now on: the i-th covers its tokens 128 i to 128 i + 127. Full pages may be shared by
        slots; a page that is written into must be the slot's alone (`copy_page`). written: tokens whose entries are in
        place already; computing them again leaves these as they are."""
        self._check_owner()
        self.pages.assign(slot, pages, written)

    def release(self, slot: int) -> None:
        """Take a slot's pages away and clear its fixed block. What the pages hold stays until they are used again."""
        self._check_owner()
        self.pages.release(slot)
        self.clear(slot)

    def copy_page(self, source: int, target: int) -> None:
        """Copy what all layers keep in a page into another."""
        for page in (source, target):
            if not 0 <= page < self.pages.pages:
                raise StateError(f"page {page} does not exist: the state has {self.pages.pages} pages")
        for tensor in self.page_tensors().values():
            tensor[target] = tensor[source]

    def _check_owner(self) -> None:
        if self.owns_pages:
            raise StateError("this state gives its slots pages of their own: build it with pages and max_tokens")

    # -- fixed blocks --------------------------------------------------------------------------------------------

    def clear(self, slot: int) -> None:
        """Fill a slot's fixed block with zeros, so that nothing of its last sequence stays readable there."""
        for tensor in self.fixed_tensors().values():
            tensor[self._existing(slot)] = 0

    def snapshot(self, slot: int) -> FixedBlock:
        """A copy of a slot's fixed block."""
        return FixedBlock({name: tensor[self._existing(slot)].clone() for name, tensor in self.fixed_tensors().items()})

    def restore(self, slot: int, block: FixedBlock) -> None:
        """Bring a slot back to a snapshot of any slot of a state of the same model and format. Its pages stay; entries
        of later tokens in them are out of sight, and are overwritten when the sequence gets there again."""
        fixed = self.fixed_tensors()
        shapes = {name: (tensor[self._existing(slot)].shape, tensor.dtype) for name, tensor in fixed.items()}
        found = {name: (tensor.shape, tensor.dtype) for name, tensor in block.tensors.items()}
        for name in sorted(shapes.keys() | found.keys()):
            if shapes.get(name) != found.get(name):
                raise StateError(
                    f"the snapshot does not fit the state: {name} is {found.get(name)}, not {shapes.get(name)}"
                )
        for name, tensor in fixed.items():
            tensor[slot] = block.tensors[name]

    def _existing(self, slot: int) -> int:
        if not 0 <= slot < self.slots:
            raise StateError(f"slot {slot} does not exist: the state has {self.slots} slots")
        return slot

    # -- tensors -------------------------------------------------------------------------------------------------

    def _named_layers(self) -> Iterator[tuple[str, int, LayerState]]:
        """Name, ratio and memory of every layer."""
        config = self.config
        for group, layers, ratios in (
            ("layers", self.layers, config.layer_ratios),
            ("mtp", self.mtp, config.mtp_ratios),
        ):
            for number, (layer, ratio) in enumerate(zip(layers, ratios, strict=True)):
                yield f"{group}.{number}", ratio, layer

    def fixed_tensors(self) -> dict[str, Tensor]:
        """The tensors of the fixed blocks by name, [slots, ...] each."""
        tensors: dict[str, Tensor] = {}
        for name, _, layer in self._named_layers():
            for part, tensor in layer.window.tensors().items():
                tensors[f"{name}.window.{part}"] = tensor.unflatten(0, (self.slots, -1))
            for part, compressor in (("entries", layer.entries), ("index", layer.index)):
                if compressor is not None:
                    tensors[f"{name}.{part}.values"] = compressor.values_NRE
                    tensors[f"{name}.{part}.scores"] = compressor.scores_NRE
        return tensors

    def page_tensors(self) -> dict[str, Tensor]:
        """The tensors of the pages by name, [pages, ...] each."""
        return {
            f"{name}.{part}": tensor.unflatten(0, (self.pages.pages, page_entries(ratio)))
            for name, store, ratio in self._entry_stores()
            for part, tensor in store.tensors().items()
        }

    def _entry_stores(self) -> Iterator[tuple[str, Store, int]]:
        """Entries and index keys of all layers, with their name and the layer's ratio."""
        for name, ratio, layer in self._named_layers():
            for part, compressor in (("entries", layer.entries), ("index", layer.index)):
                if compressor is not None:
                    yield f"{name}.{part}", compressor.entries, ratio


def _bytes_of_one(tensor: Tensor) -> int:
    """Bytes of one of the things that the first axis counts."""
    return tensor.shape[1:].numel() * tensor.element_size()
