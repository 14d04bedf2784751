"""Pages: who holds which rows of the entry pools.

A page is a number. It stands for the entries and index keys of 128 consecutive tokens in every layer (`model/state.py`
holds the rows; nothing here touches a tensor). A page is written by one sequence until it is full and never after that,
so any number of sequences and the prefix cache can hold it together; it is free again when the last holder lets go.
"""

from __future__ import annotations

from collections.abc import Sequence


class PageError(ValueError):
    """The pool was asked for more pages than are free, or for something that would corrupt it."""


class PagePool:
    """Reference counts of `num_pages` pages."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._holders = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def holders(self, page: int) -> int:
        """How many hold this page."""
        return self._holders[page]

    def take(self, count: int) -> list[int]:
        """`count` free pages, each now held once; PageError when there are fewer, and then nothing is taken."""
        if count > len(self._free):
            raise PageError(f"{count} pages asked for, {len(self._free)} of {self.num_pages} are free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def hold(self, pages: Sequence[int]) -> None:
        """One more holder for pages that are in use."""
        for page in pages:
            if self._holders[page] == 0:
                raise PageError(f"page {page} is free: only a page in use can be shared")
        for page in pages:
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less; a page without holders is free."""
        for page in pages:
            if self._holders[page] == 0:
                raise PageError(f"page {page} is free already: it was released twice")
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)
