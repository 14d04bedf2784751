"""Memory: slots and pages of the state, who holds them, and what the prefix cache makes of them.

What the prefix cache has learned goes to disk as well, if there is one, and comes back from there: page by page, and
with the fixed block that makes them usable.
"""

from __future__ import annotations

from leadline.engine.disk import DiskCache
from leadline.engine.pages import PagePool
from leadline.engine.prefix import Node, PrefixCache, WindowPolicy
from leadline.engine.scheduler import may_admit
from leadline.engine.sequence import Sequence
from leadline.model.page_table import PAGE_TOKENS, num_pages
from leadline.model.state import FixedBlock, State


class Memory:
    """The state of everything that is served. A sequence that runs owns one slot, holds its pages together with the
    prefix cache, and owns the page that it is writing alone."""

    def __init__(self, state: State, slots: int, policy: WindowPolicy, block_bytes: int, disk: DiskCache | None):
        self.state, self.policy, self.disk = state, policy, disk
        self.pool = PagePool(state.pages.pages)
        layers = len(state.layers) + len(state.mtp)
        recompute = num_pages(layers * state.config.sliding_window) * PAGE_TOKENS
        self.prefix = PrefixCache(
            self.pool,
            policy,
            page_tokens=PAGE_TOKENS,
            recompute_tokens=recompute,
            block_bytes=block_bytes,
            fingerprint=disk.fingerprint if disk else "",
        )
        self.recalled_tokens = 0
        """Tokens whose pages came back from disk."""
        self._free_slots = list(range(slots - 1, -1, -1))

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def start(self, sequence: Sequence, num_running: int) -> bool:
        """Give a sequence its slot and the pages of all tokens it has, or leave everything as it was."""
        if not self._free_slots:
            return False
        namespace = sequence.request.namespace
        self.prefix.add_links(sequence.links, sequence.tokens, namespace)
        links = sequence.links[: (len(sequence.tokens) - 1) // PAGE_TOKENS]
        if self.disk is not None:
            self._recall(links, namespace, self.disk)
        match = self.prefix.match(links, namespace)
        needed = num_pages(len(sequence.tokens) + 1) - len(match.pages)
        if not may_admit(needed, self.pool.num_free, num_running):
            self.prefix.evict(needed + num_running - self.pool.num_free)
        if not may_admit(needed, self.pool.num_free, num_running):
            self.pool.release(match.pages)
            return False
        sequence.slot = self._free_slots.pop()
        sequence.pages = [*match.pages, *self.pool.take(needed)]
        sequence.seen, sequence.written, sequence.node = match.start, match.known, match.node
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(match.start, len(sequence.request.prompt))
        self.state.clear(sequence.slot)
        if match.block is not None:
            self.state.restore(sequence.slot, match.block)
        self._assign(sequence)
        return True

    def grow(self, sequence: Sequence, new_pages: int) -> None:
        """Take the pages that the scheduler has promised."""
        if new_pages:
            sequence.pages += self.pool.take(new_pages)
            self._assign(sequence)

    def release(self, sequence: Sequence) -> None:
        """Take slot and pages back. What the prefix cache holds stays there; nothing else of the sequence does."""
        if sequence.node is not None and self.disk is not None:
            self._store([sequence.node], self.disk, passing=True)  # where an answer ends, the next question begins
        if sequence.slot is not None:
            self.state.release(sequence.slot)
            self._free_slots.append(sequence.slot)
        self.pool.release(sequence.pages)
        sequence.slot, sequence.pages, sequence.node = None, [], None
        sequence.propose((), ())
        sequence.seen = sequence.written = 0

    def cut(self, sequence: Sequence) -> int | None:
        """Where the sequence's next part has to end at the latest, so that its fixed block can be kept."""
        prompt_tokens = len(sequence.request.prompt)
        if sequence.seen < prompt_tokens:
            return self.policy.next_cut(sequence.seen, prompt_tokens, PAGE_TOKENS)
        return None if self.policy.kind == "zero" else (sequence.seen // PAGE_TOKENS + 1) * PAGE_TOKENS

    def block_at_end(self, sequence: Sequence) -> FixedBlock | None:
        """A copy of the fixed block of a decoding sequence whose last token is on its way into the state, if `settle`
        may keep it; None where no page ends."""
        keeps = self.policy.kind != "zero" and len(sequence.tokens) % PAGE_TOKENS == 0
        return self.state.snapshot(sequence.slot) if keeps and sequence.slot is not None else None

    def settle(self, sequence: Sequence, block: FixedBlock | None = None) -> None:
        """After a step: pages that are full now go into the prefix cache, and the fixed block where it is kept. block:
        a copy of it, where the state has moved on already."""
        changed = False
        assert sequence.node is not None
        self.prefix.add_links(sequence.links, sequence.tokens, sequence.request.namespace)
        full: list[Node] = []
        while (sequence.node.depth + 1) * PAGE_TOKENS <= sequence.seen:
            changed |= self._share_next_page(sequence)
            full.append(sequence.node)
        if changed:
            self._assign(sequence)
        if sequence.node.page is not None and sequence.seen == sequence.node.depth * PAGE_TOKENS:
            self._keep_block(sequence, block)
        if full and self.disk is not None:
            self._store(full, self.disk, passing=False)

    def _share_next_page(self, sequence: Sequence) -> bool:
        """Returns whether the sequence has changed its page for an equal one that was there before."""
        end = sequence.node
        assert end is not None
        depth, page = end.depth, sequence.pages[end.depth]
        sequence.node = self.prefix.extend(end, sequence.links[depth], page)
        if end.passing:
            self.prefix.drop_block(end)
        known = sequence.node.page
        assert known is not None
        if known == page:
            return False
        self.pool.hold([known])
        self.pool.release([page])
        sequence.pages[depth] = known
        return True

    def _keep_block(self, sequence: Sequence, block: FixedBlock | None) -> None:
        node = sequence.node
        assert node is not None
        assert sequence.slot is not None
        prompt_tokens = len(sequence.request.prompt)
        keeps = self.policy.keeps(sequence.seen, prompt_tokens, PAGE_TOKENS)
        if node.block is not None:
            node.passing = node.passing and not keeps
        elif keeps or (self.policy.kind != "zero" and sequence.seen >= prompt_tokens):
            self.prefix.keep_block(node, block or self.state.snapshot(sequence.slot), passing=not keeps)

    def _assign(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.state.assign(sequence.slot, sequence.pages, written=sequence.written)

    # -- disk ------------------------------------------------------------------------------------------------------

    def _store(self, nodes: list[Node], disk: DiskCache, *, passing: bool) -> None:
        """Write the pages of nodes, and their fixed blocks: those that are there to stay, or passing ones too."""
        tensors = self.state.page_tensors()
        pages = {
            node.link: {name: tensor[node.page] for name, tensor in tensors.items()}
            for node in nodes
            if node.page is not None and not disk.has_page(node.link)
        }
        blocks = {
            node.link: node.block.tensors
            for node in nodes
            if node.block is not None and (passing or not node.passing) and not disk.has_block(node.link)
        }
        disk.write(pages, blocks)

    def _recall(self, links: list[bytes], namespace: str, disk: DiskCache) -> None:
        """Bring what the disk knows of these pages, beyond what the tree knows, into the tree: all that is of use, or
        nothing where there is no room for it."""
        path = self.prefix.path(links, namespace)
        node = path[-1]
        known = self._links_on_disk(links[node.depth :], disk)
        if not known:
            return
        held = [each.page for each in path if each.page is not None]
        self.pool.hold(held)  # what is being continued must not go to make room
        self.prefix.evict(len(known) - self.pool.num_free)
        for link in known if len(known) <= self.pool.num_free else ():
            found = disk.read_page(link)
            if found is None:
                break
            (page,) = self.pool.take(1)
            held.append(page)
            for name, tensor in self.state.page_tensors().items():
                tensor[page] = found[name].to(tensor.device)
            node = self.prefix.extend(node, link, page)
        self.pool.release(held)
        self.recalled_tokens += (node.depth - path[-1].depth) * PAGE_TOKENS
        block = disk.read_block(node.link) if node.depth > path[-1].depth and disk.has_block(node.link) else None
        if block is not None:
            device = self.state.device
            tensors = {name: tensor.to(device) for name, tensor in block.items()}
            self.prefix.keep_block(node, FixedBlock(tensors), passing=False)

    def _links_on_disk(self, links: list[bytes], disk: DiskCache) -> list[bytes]:
        """The first of these pages, as far as they are of use: to the last one with a fixed block, or all of them under
        the zero policy, which needs none."""
        useful = 0
        for count, link in enumerate(links, start=1):
            if not disk.has_page(link):
                break
            if self.policy.kind == "zero" or disk.has_block(link):
                useful = count
        return links[:useful]
