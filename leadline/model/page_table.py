"""The page table: where the entries of each sequence lie.

Entries are kept in *pages*. A page covers 128 tokens, the smallest number that both ratios divide: 32 entries and 32
index keys of every CSA layer, one entry of every HCA layer. A page number means the same rows in every layer, so one
list of page numbers for each slot places all that it has made: entry j of a layer of ratio R is

    row  page[j R / 128] * (128 / R) + j mod (128 / R)

of that layer's entries. Pages need no order: a sequence that grows takes any free page, and sequences with a common
beginning may share its pages. Whoever owns the pages decides that; the table only refuses what would let one sequence
change what another one reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from leadline.model.config import CSA_RATIO, HCA_RATIO
from leadline.ops.transfer import fill

PAGE_TOKENS = HCA_RATIO
assert PAGE_TOKENS % CSA_RATIO == 0


def page_entries(ratio: int) -> int:
    """Entries that a page holds of a layer of this ratio."""
    return PAGE_TOKENS // ratio


def num_pages(tokens: int) -> int:
    """Pages that cover this many tokens."""
    return -(-tokens // PAGE_TOKENS)


class PageError(ValueError):
    """A page that a slot lacks, shares or cannot have; the message names slot and page."""


class PageTable:
    """Page numbers of each slot, in the order of the tokens that they cover.

    table_NP: int32 [slots, pages of the longest slot] on the device, -1 = no page; what ops read.
    """

    def __init__(self, slots: int, pages: int, pages_per_slot: int, device: torch.device | str = "cpu"):
        self.slots, self.pages = slots, pages
        self._numbers = np.full((slots, pages_per_slot), -1, dtype=np.int32)
        self._counts = [0] * slots
        self._written = [0] * slots
        self._in_a_row = [0] * slots  # of a slot's pages, how many at its beginning lie one behind the other
        self._owners = np.zeros(pages, dtype=np.int32)  # slots that list each page
        self.table_NP = torch.full((slots, pages_per_slot), -1, dtype=torch.int32, device=device)

    @classmethod
    def fixed(cls, slots: int, pages_per_slot: int, device: torch.device | str = "cpu") -> PageTable:
        """Every slot has its own pages, one behind the other."""
        table = cls(slots, slots * pages_per_slot, pages_per_slot, device)
        for slot in range(slots):
            table.assign(slot, range(slot * pages_per_slot, (slot + 1) * pages_per_slot))
        return table

    @property
    def pages_per_slot(self) -> int:
        return self._numbers.shape[1]

    def assign(self, slot: int, pages: Sequence[int], written: int = 0) -> None:
        """The pages of a slot from now on, in place of those it had. The entries of its first `written` tokens are in
        them and are not written again, even if these tokens are computed once more. PageError when a page does not
        exist or is listed twice, or when there are more than a slot can have."""
        self._check_slot(slot)
        numbers = np.asarray(pages, dtype=np.int64)
        if len(numbers) > self.pages_per_slot:
            raise PageError(f"slot {slot} can have {self.pages_per_slot} pages, got {len(numbers)}: raise max_tokens")
        wrong = numbers[(numbers < 0) | (numbers >= self.pages)]
        if len(wrong):
            raise PageError(f"slot {slot} got page {wrong[0]}: there are pages 0 to {self.pages - 1}")
        if len(np.unique(numbers)) != len(numbers):
            raise PageError(f"slot {slot} got a page twice: its tokens would overwrite each other")
        self._owners[self._pages_of(slot)] -= 1
        self._owners[numbers] += 1
        self._numbers[slot] = -1
        self._numbers[slot, : len(numbers)] = numbers
        self._counts[slot], self._written[slot] = len(numbers), written
        breaks = np.flatnonzero(np.diff(numbers) != 1)
        self._in_a_row[slot] = int(breaks[0]) + 1 if len(breaks) else len(numbers)
        fill(self.table_NP[slot], torch.from_numpy(self._numbers[slot]))

    def release(self, slot: int) -> None:
        """Take a slot's pages away."""
        self.assign(slot, ())

    def pages_of(self, slot: int) -> list[int]:
        """Page numbers of a slot."""
        return self._pages_of(slot).tolist()

    def written(self, slot: int) -> int:
        """Tokens whose entries are in place and stay as they are."""
        return self._written[slot]

    def tokens_of(self, slot: int) -> int:
        """Tokens that the pages of a slot cover."""
        return self._counts[slot] * PAGE_TOKENS

    def check(self, slot: int, past: int, length: int) -> None:
        """PageError when `length` new tokens of a slot lack a page, or would go into one that another slot lists."""
        self._check_slot(slot)
        if past + length > self.tokens_of(slot):
            raise PageError(
                f"slot {slot} has pages for {self.tokens_of(slot)} tokens, the segment needs {past + length}: "
                "assign more pages"
            )
        target = self._numbers[slot, max(past, self._written[slot]) // PAGE_TOKENS : num_pages(past + length)]
        shared = target[self._owners[target] > 1]
        if len(shared):
            raise PageError(
                f"slot {slot} would write into page {shared[0]}, which another slot lists too: copy it, and assign the "
                "copy"
            )

    def in_a_row(self, slot: int, tokens: int) -> bool:
        """Whether the pages of a slot's first tokens lie one behind the other."""
        return num_pages(tokens) <= self._in_a_row[slot]

    def rows(self, slot: int, ratio: int, entries: np.ndarray) -> np.ndarray:
        """Rows of some entries of a slot, by their numbers in the sequence."""
        per_page = page_entries(ratio)
        return self._numbers[slot, entries // per_page].astype(np.int64) * per_page + entries % per_page

    def _pages_of(self, slot: int) -> np.ndarray:
        return self._numbers[slot, : self._counts[slot]]

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise PageError(f"slot {slot} does not exist: the state has {self.slots} slots")
