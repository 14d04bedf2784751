"""The engine: requests in, tokens out. One loop: plan, run, sample, commit, emit.

    engine = Engine(model, Settings(slots=8, pages=512))
    number = engine.submit(Request(prompt, max_tokens=100))
    while engine.busy:
        for event in engine.step(): ...

A step takes parts of many sequences through the model: one token of those that answer, chunks of the prompts of those
that begin. Between two steps everything is settled: each sequence's tokens, how many of them its state has taken in,
and who holds which page; requests come, go and are cancelled there. A pass that fails changes nothing that was said:
the sequences in it give up their state and compute it again.

With `speculate`, the MTP block guesses the token after the next in the same step, and the guess is fed together with
that token. When the guess is wrong, nothing has to be undone: the rows that it wrote in rings and pages are exactly
those that the right token will overwrite, and no query looks at them before.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from leadline.engine.disk import DiskCache
from leadline.engine.memory import Memory
from leadline.engine.prefix import PERIODIC, WindowPolicy
from leadline.engine.request import Request, RequestError
from leadline.engine.runner import Piece, Runner
from leadline.engine.sampler import Draw, NonFiniteLogitsError, draw
from leadline.engine.scheduler import Candidate, Plan, Share, plan
from leadline.engine.sequence import Event, Finish, Sequence, Token, Usage
from leadline.model.page_table import PAGE_TOKENS
from leadline.model.state import State
from leadline.model.transformer import Output, Transformer
from leadline.ops.invariance import batch_invariant


@dataclass(frozen=True)
class Settings:
    """How an engine serves.

    slots: most sequences that run at once. pages: of 128 tokens each, for the entries of all of them and of the prefix
    cache. max_tokens: most tokens of one sequence, prompt and output; None: as many as the pages hold, and no more than
    the model's context. step_tokens: most tokens of a step. block_bytes: most memory for the fixed blocks of the prefix
    cache. speculate: guess with the MTP block. batch_invariant: a sequence's logits are the same bits whatever else is
    served and however its prompt is cut or cached (`ops/invariance.py`); slower, and on the CPU only.
    """

    slots: int = 8
    pages: int = 512
    max_tokens: int | None = None
    step_tokens: int = 512
    policy: WindowPolicy = PERIODIC
    block_bytes: int = 2**30
    speculate: bool = False
    batch_invariant: bool = False


class Engine:
    """Serves one model. disk: where the prefix cache outlives the process. Not thread safe: one thread calls it."""

    def __init__(self, model: Transformer, settings: Settings, disk: DiskCache | None = None):
        if settings.speculate and not model.mtp:
            raise ValueError("speculation needs the MTP block: build the model with_mtp=True")
        if settings.batch_invariant and model.embed.weight.is_cuda:
            raise ValueError("batch_invariant holds for the CPU: move the model there, or serve without it")
        if settings.step_tokens < PAGE_TOKENS:
            raise ValueError(f"step_tokens is {settings.step_tokens}: expected at least a page, {PAGE_TOKENS}")
        config, weight = model.config, model.embed.weight
        self.settings = settings
        most = min(settings.pages * PAGE_TOKENS, config.max_position_embeddings)
        self.max_tokens = min(settings.max_tokens or most, most)
        state = State(
            config,
            settings.slots + 1,  # one for the padding of captured steps
            pages=settings.pages,
            max_tokens=self.max_tokens,
            spare_tokens=int(settings.speculate),
            cache_format=model.cache_format,
            dtype=weight.dtype,
            device=weight.device,
        )
        self.runner = Runner(model, state, padding_slot=settings.slots)
        self.memory = Memory(state, settings.slots, settings.policy, settings.block_bytes, disk)
        self.step_tokens = settings.step_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._usage: dict[int, Usage] = {}
        self._events: list[Event] = []
        self._next_number = 0
        self.num_preempted = 0
        """How often a sequence had to give up its state and compute it again."""

    # -- requests come and go --------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.waiting or self.running or self._events)

    def submit(self, request: Request) -> int:
        """Queue a request; returns the number of its sequence. RequestError when it can never be served."""
        vocabulary = self.runner.model.config.vocab_size
        wrong = next((token for token in request.prompt if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise RequestError(f"the prompt holds token {wrong}: this model knows ids 0 to {vocabulary - 1}")
        if len(request.prompt) >= self.max_tokens:
            raise RequestError(
                f"the prompt has {len(request.prompt):,} tokens: at most {self.max_tokens - 1:,} fit, and one of output"
            )
        request = replace(request, max_tokens=min(request.max_tokens, self.max_tokens - len(request.prompt)))
        sequence = Sequence(self._next_number, request)
        self._next_number += 1
        self.waiting.append(sequence)
        return sequence.number

    def cancel(self, number: int) -> None:
        """End a sequence; its memory is free at once, and the next step reports the end. Unknown numbers, such as those
        of sequences that have ended, are ignored: a client may hang up at any time."""
        for sequence in [*self.running, *self.waiting]:
            if sequence.number == number:
                self._end(sequence, Finish.CANCELLED)

    def seen(self, number: int) -> int:
        """How many tokens of a running sequence its state has taken in; 0 while it waits and after its end."""
        return next((sequence.seen for sequence in self.running if sequence.number == number), 0)

    @property
    def cache_bytes(self) -> int:
        """Bytes of slots and pages that running sequences and the prefix cache hold."""
        state, pool = self.memory.state, self.memory.pool
        pages = (pool.num_pages - pool.num_free) * state.bytes_per_page
        return pages + len(self.running) * state.bytes_per_slot + self.memory.prefix.num_block_bytes

    def usage(self, number: int) -> Usage:
        """Tokens of a sequence, also after its end; reading the usage of an ended one forgets it."""
        for sequence in [*self.running, *self.waiting]:
            if sequence.number == number:
                return sequence.usage
        return self._usage.pop(number)

    # -- the loop --------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Run whatever is due through the model; returns what it added to whom."""
        self._admit()
        shares = self._plan()
        # Tokens that continue look their past up where it lies, chunks of prompts gather theirs: passes of their own.
        passes: dict[int, list[tuple[Sequence, Share]]] = {}
        for sequence, share in shares:
            passes.setdefault(self._step_length(sequence, share), []).append((sequence, share))
        with batch_invariant() if self.settings.batch_invariant else nullcontext():
            for length, part in passes.items():
                try:
                    self._run(part, step=length > 0)
                except torch.OutOfMemoryError as error:
                    self._survive(part, error)
        events, self._events = self._events, []
        return events

    def _plan(self) -> list[tuple[Sequence, Share]]:
        by_number = {sequence.number: sequence for sequence in self.running}
        candidates = [self._candidate(sequence) for sequence in self.running]
        chosen = self._planned(candidates)
        for number in chosen.preempted:
            self._preempt(by_number[number])
        shares = [(by_number[share.number], share) for share in chosen.shares]
        for sequence, share in shares:
            self.memory.grow(sequence, share.new_pages)
        return shares

    def _planned(self, candidates: list[Candidate]) -> Plan:
        chosen = self._plan_now(candidates)
        if not chosen.preempted:
            return chosen
        self.memory.prefix.evict(len(candidates))  # before anybody is pushed out, what nobody uses goes
        return self._plan_now(candidates)

    def _plan_now(self, candidates: list[Candidate]) -> Plan:
        free_pages = self.memory.pool.num_free
        return plan(candidates, step_tokens=self.step_tokens, free_pages=free_pages, page_tokens=PAGE_TOKENS)

    def _candidate(self, sequence: Sequence) -> Candidate:
        cut = self.memory.cut(sequence)
        drafts = int(sequence.draft is not None and sequence.seen + 1 != cut and sequence.may_draft)
        if len(sequence.tokens) + 1 >= self.max_tokens:
            drafts = 0
        return Candidate(
            sequence.number, sequence.order, sequence.seen, sequence.pending, drafts, len(sequence.pages), cut
        )

    def _step_length(self, sequence: Sequence, share: Share) -> int:
        """Tokens and drafts of a decoding step, 0 for a chunk."""
        length = share.tokens + share.drafts
        is_step = length <= 1 + self.memory.state.spare_tokens and sequence.seen >= sequence.written
        return length if is_step else 0

    def _run(self, shares: list[tuple[Sequence, Share]], step: bool) -> None:
        pieces = [_piece(sequence, share) for sequence, share in shares]
        output, logits_NV = self.runner.run(pieces, step)
        sampling = [(s, share) for (s, share), piece in zip(shares, pieces, strict=True) if piece.wanted]
        drawn = self._draw(sampling, logits_NV)
        for sequence, share in shares:
            self._commit(sequence, share, drawn.get(sequence.number, []))
        if self.settings.speculate:
            self._draft(output, shares, pieces, drawn)
        for sequence, _ in shares:
            if sequence.slot is not None:
                self.memory.settle(sequence)

    # -- sample ----------------------------------------------------------------------------------------------------

    def _draw(self, sampling: list[tuple[Sequence, Share]], logits_NV: torch.Tensor) -> dict[int, list[Token]]:
        """The tokens of each sequence that has some due: one, and a second when the draft turned out right."""
        owners = [(sequence, row) for sequence, share in sampling for row in range(1 + share.drafts)]
        good = list(range(len(owners)))
        tokens: list[Token] = []
        while good:
            draws = [_draw_of(*owners[row]) for row in good]
            try:
                tokens = draw(logits_NV[good], draws)
                break
            except NonFiniteLogitsError as error:
                bad = {owners[good[row]][0].number for row in error.rows}
                for sequence in {owners[row][0].number: owners[row][0] for row in good}.values():
                    if sequence.number in bad:
                        self._end(sequence, Finish.ERROR, str(error))
                good = [row for row in good if owners[row][0].number not in bad]
        drawn: dict[int, list[Token]] = {}
        for row, token in zip(good, tokens, strict=True):
            sequence, place = owners[row]
            if place == 0 or drawn[sequence.number][0].id == sequence.draft:
                drawn.setdefault(sequence.number, []).append(token)
        return drawn

    def _commit(self, sequence: Sequence, share: Share, tokens: list[Token]) -> None:
        """Take in what the pass did for a sequence: `tokens` were drawn, the first of them or none."""
        if sequence.slot is None:
            return  # it has ended with an error
        sequence.seen += share.tokens
        sequence.drafted += share.drafts
        sequence.draft = None
        emitted: list[Token] = []
        for token in tokens:
            finish = sequence.append(token.id)
            emitted.append(token)
            if finish is not None:
                self._emit(sequence, emitted)
                self._end(sequence, finish)
                return
        if len(tokens) == 2:
            sequence.seen += 1
            sequence.accepted += 1
        self._emit(sequence, emitted)

    def _draft(
        self,
        output: Output,
        shares: list[tuple[Sequence, Share]],
        pieces: list[Piece],
        drawn: dict[int, list[Token]],
    ) -> None:
        """Guess the token after the next of each sequence that is decoding now."""
        next_tokens: list[int] = []
        guessing: list[tuple[Sequence, int]] = []
        for (sequence, share), piece in zip(shares, pieces, strict=True):
            start = len(next_tokens)
            tokens = drawn.get(sequence.number, [])
            next_tokens += _next_tokens(sequence, share, piece.tokens, tokens)
            if tokens and sequence.slot is not None:
                guessing.append((sequence, start + share.tokens - 1 + len(tokens) - 1))
        logits_NV = self.runner.draft(output, next_tokens, [row for _, row in guessing])
        draws = [_draw_of(sequence, 0) for sequence, _ in guessing]
        draws = [replace(one, sampling=replace(one.sampling, logprobs=None)) for one in draws]
        # The guess stands one place behind the last token; penalties and noise are those of its own place.
        for (sequence, _), guess in zip(guessing, draw(logits_NV, draws), strict=True):
            sequence.draft = guess.id

    # -- come and go -----------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let waiting sequences in, in order, while a slot and all pages of their tokens are free."""
        for sequence in sorted(self.waiting, key=lambda s: s.order):
            if not self.memory.start(sequence, len(self.running)):
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self.memory.release(sequence)
        self.running.remove(sequence)
        self.waiting.append(sequence)
        self.num_preempted += 1

    def _end(self, sequence: Sequence, finish: Finish, error: str | None = None) -> None:
        self.memory.release(sequence)
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._usage[sequence.number] = sequence.usage
        self._events.append(Event(sequence.number, finish=finish, error=error))

    def _emit(self, sequence: Sequence, tokens: Iterable[Token]) -> None:
        if tokens:
            self._events.append(Event(sequence.number, tuple(tokens)))

    # -- faults ----------------------------------------------------------------------------------------------------

    def _survive(self, shares: list[tuple[Sequence, Share]], error: torch.OutOfMemoryError) -> None:
        """The card's memory was not enough for the pass. Its sequences compute their state again, in smaller steps;
        when steps cannot get smaller, the longest of them ends with the error."""
        if self.step_tokens > PAGE_TOKENS:
            self.step_tokens = max(PAGE_TOKENS, self.step_tokens // 2)
        else:
            longest = max((sequence for sequence, _ in shares), key=lambda s: len(s.tokens))
            self._end(longest, Finish.ERROR, f"out of memory: {str(error).splitlines()[0]}")
        for sequence, _ in shares:
            if sequence in self.running:
                self._preempt(sequence)


def _piece(sequence: Sequence, share: Share) -> Piece:
    assert sequence.slot is not None
    tokens = sequence.tokens[sequence.seen : sequence.seen + share.tokens]
    if share.drafts:
        assert sequence.draft is not None
        tokens.append(sequence.draft)
    due = share.tokens == sequence.pending
    return Piece(tuple(tokens), sequence.seen, sequence.slot, 1 + share.drafts if due else 0)


def _draw_of(sequence: Sequence, place: int) -> Draw:
    """The draw of the sequence's next token, or of the one after it, for the case that the draft is that next token."""
    counts = sequence.output_counts
    if place:
        assert sequence.draft is not None
        counts = counts + type(counts)([sequence.draft])
    request = sequence.request
    return Draw(
        request.sampling,
        len(sequence.tokens) + place,
        request.prompt if request.sampling.penalises else (),
        dict(counts),
        request.mask.allowed() if request.mask is not None else None,
        sequence.forced() if place == 0 else None,
    )


def _next_tokens(sequence: Sequence, share: Share, fed: tuple[int, ...], drawn: list[Token]) -> list[int]:
    """For each row that was fed, the token that follows it: fed behind it, known from the prompt, or drawn."""
    follows = list(fed[1:])
    if share.drafts and drawn:
        follows[-1] = drawn[0].id
    if len(drawn) == 2:
        last = drawn[1].id
    elif drawn:
        last = drawn[0].id
    else:  # a chunk inside of the prompt; of a sequence that has failed any token will do
        last = sequence.tokens[sequence.seen] if sequence.seen < len(sequence.tokens) else fed[-1]
    return [*follows, last]
