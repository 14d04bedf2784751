"""The prefix cache: pages of prompts and answers that were computed before, as a radix tree.

A node is one full page: 128 tokens' entries in every layer. Its *link*, a hash over all tokens up to its end
(`disk.chain`), is its name: a path from the root is a text that is known, and whoever has hashed a text once finds its
path at any time. A new request takes over the pages of the longest path that its prompt starts with.

Entries alone are not all a sequence remembers: its window and tails belong to the last tokens before the place where it
goes on. Three policies decide where that *fixed block* is kept (report 3.5):

- full: at every page boundary. Nothing is computed again, but chunks of a prompt can be no longer than a page.
- periodic: every `period` tokens, at the last page boundary of a prompt, and at the latest one of an answer. What lies
  behind the last one kept is computed again.
- zero: nowhere. The last 128 tokens per layer before the end of the path are computed again, from an empty window: at
  layer l the first 128 l of them are wrong, the rest right, so the last layer's window is right at the end. Entries are
  not written in the meantime.

The cache holds its pages like a sequence does. When pages are needed, the leaves that were not used for the longest
time go first, unless a sequence holds them too.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from leadline.engine.disk import chain, root_key
from leadline.engine.pages import PagePool
from leadline.model.state import FixedBlock


@dataclass(frozen=True)
class WindowPolicy:
    """Where fixed blocks are kept; see above. period: tokens, a multiple of the page."""

    kind: Literal["full", "periodic", "zero"] = "periodic"
    period: int = 8192

    def keeps(self, position: int, prompt_tokens: int, page_tokens: int) -> bool:
        """Whether the fixed block after `position` tokens, a page boundary, stays in the cache for good."""
        if self.kind == "full":
            return True
        last = last_boundary(prompt_tokens, page_tokens)
        return self.kind == "periodic" and (position % self.period == 0 or position == last)

    def next_cut(self, seen: int, prompt_tokens: int, page_tokens: int) -> int | None:
        """The next position of a prompt that a chunk must not run over, because its fixed block will be kept."""
        if self.kind == "zero":
            return None
        step = page_tokens if self.kind == "full" else self.period
        last = last_boundary(prompt_tokens, page_tokens)
        cuts = [cut for cut in (seen // step * step + step, last) if seen < cut <= prompt_tokens]
        return min(cuts, default=None)


PERIODIC = WindowPolicy()


def last_boundary(prompt_tokens: int, page_tokens: int) -> int:
    """The last page boundary that leaves a token of the prompt to be computed: its logits are wanted."""
    return (prompt_tokens - 1) // page_tokens * page_tokens


@dataclass(eq=False)
class Node:
    """A full page and what follows it.

    link: of the whole path, its key on disk too. page: None for a root. block: the fixed block at its end. passing: the
    block is to be dropped when the answer that left it moves on. used: a clock reading.
    """

    link: bytes
    page: int | None
    parent: Node | None
    depth: int
    children: dict[bytes, Node] = field(default_factory=dict[bytes, "Node"])
    block: FixedBlock | None = None
    passing: bool = False
    used: int = 0


@dataclass(frozen=True)
class Match:
    """What is known of a prompt. pages: of its first `known` tokens, now held by the caller too. start: the first token
    that has to be computed; smaller than `known` under the zero policy, whose entries must then not be written again.
    block: the fixed block at `start`, or None to begin with an empty one. node: where the path ends."""

    node: Node
    pages: list[int]
    known: int
    start: int
    block: FixedBlock | None


class PrefixCache:
    """pool: the pages. recompute_tokens: what the zero policy computes again. block_bytes: most bytes of fixed blocks
    held; the ones not used for the longest time are dropped beyond that. fingerprint: of the model."""

    def __init__(
        self,
        pool: PagePool,
        policy: WindowPolicy,
        *,
        page_tokens: int,
        recompute_tokens: int,
        block_bytes: int,
        fingerprint: str = "",
    ):
        if policy.kind == "periodic" and (policy.period < 1 or policy.period % page_tokens):
            raise ValueError(f"the period is {policy.period} tokens: expected a multiple of the page, {page_tokens}")
        self.pool, self.policy = pool, policy
        self.page_tokens, self.recompute_tokens, self.block_bytes = page_tokens, recompute_tokens, block_bytes
        self._fingerprint = fingerprint
        self._roots: dict[str, Node] = {}
        self._clock = 0
        self._bytes = 0

    def root(self, namespace: str) -> Node:
        if namespace not in self._roots:
            self._roots[namespace] = Node(root_key(self._fingerprint, namespace), None, None, 0)
        return self._roots[namespace]

    def add_links(self, links: list[bytes], tokens: Sequence[int], namespace: str) -> None:
        """Bring the links of a sequence up to date: one for each of its full pages."""
        link, size = links[-1] if links else self.root(namespace).link, self.page_tokens
        for start in range(len(links) * size, len(tokens) - size + 1, size):
            link = chain(link, tokens[start : start + size])
            links.append(link)

    def match(self, links: Iterable[bytes], namespace: str = "") -> Match:
        """The longest usable prefix. links: of the pages that are of interest; the last token of a sequence has to stay
        outside of them, because its logits are wanted."""
        path = self.path(links, namespace)
        for depth in range(len(path) - 1, 0, -1):
            known = depth * self.page_tokens
            block, start = path[depth].block, known
            if block is None and self.policy.kind == "zero":
                start = known - self.recompute_tokens
            if block is not None or 0 < start < known:
                return self._take(path[: depth + 1], start, block)
        return Match(path[0], [], 0, 0, None)

    def path(self, links: Iterable[bytes], namespace: str) -> list[Node]:
        """The nodes of these links, from the root to the last one that is known."""
        path = [self.root(namespace)]
        for link in links:
            child = path[-1].children.get(link)
            if child is None:
                break
            path.append(child)
        return path

    def _take(self, path: list[Node], start: int, block: FixedBlock | None) -> Match:
        pages = [node.page for node in path if node.page is not None]
        self.pool.hold(pages)
        for node in path:
            self._touch(node)
        return Match(path[-1], pages, len(pages) * self.page_tokens, start, block)

    def _touch(self, node: Node) -> None:
        self._clock += 1
        node.used = self._clock

    def extend(self, node: Node, link: bytes, page: int) -> Node:
        """The node of a page that is full now. When the same text is known already, its node; the caller then takes
        over that node's page for its own."""
        child = node.children.get(link)
        if child is None:
            self.pool.hold([page])
            child = node.children[link] = Node(link, page, node, node.depth + 1)
        self._touch(child)
        return child

    def keep_block(self, node: Node, block: FixedBlock, *, passing: bool) -> None:
        """Keep the fixed block that belongs to the end of a node."""
        self.drop_block(node)
        node.block, node.passing = block, passing
        self._bytes += block.num_bytes
        if self._bytes > self.block_bytes:
            for old in sorted((n for n in self._nodes() if n.block), key=lambda n: n.used):
                if self._bytes <= self.block_bytes:
                    break
                self.drop_block(old)

    def drop_block(self, node: Node) -> None:
        if node.block is not None:
            self._bytes -= node.block.num_bytes
            node.block = None

    def _nodes(self) -> Iterator[Node]:
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def evictable(self) -> int:
        """Pages that `evict` could free: those that only the cache holds, with everything behind them."""
        count = 0
        pinned: set[int] = set()
        for node in sorted(self._nodes(), key=lambda n: -n.depth):
            if node.page is None:
                continue
            if id(node) in pinned or self.pool.holders(node.page) > 1:
                pinned.add(id(node.parent))
            else:
                count += 1
        return count

    def evict(self, count: int) -> None:
        """Free `count` pages, or all that can be."""
        leaves = [(n.used, id(n), n) for n in self._nodes() if self._removable(n)]
        heapq.heapify(leaves)
        while leaves and count > 0:
            _, _, node = heapq.heappop(leaves)
            parent = node.parent
            assert parent is not None
            assert node.page is not None
            self.drop_block(node)
            del parent.children[node.link]
            self.pool.release([node.page])
            count -= 1
            if self._removable(parent):
                heapq.heappush(leaves, (parent.used, id(parent), parent))

    def _removable(self, node: Node) -> bool:
        return node.page is not None and not node.children and self.pool.holders(node.page) == 1

    @property
    def num_pages(self) -> int:
        """Pages that the cache holds."""
        return sum(node.page is not None for node in self._nodes())

    @property
    def num_block_bytes(self) -> int:
        return self._bytes
