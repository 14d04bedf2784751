"""The engine: requests in, tokens out. One loop: plan, run, sample, commit, emit.

    engine = Engine(model, Settings(slots=8, pages=512))
    number = engine.submit(Request(prompt, max_tokens=100))
    while engine.busy:
        for event in engine.step(): ...

A step takes parts of many sequences through the model: one token of those that answer, chunks of the prompts of those
that begin. Between two steps everything is settled: each sequence's tokens, how many of them its state has taken in,
and who holds which page; requests come, go and are cancelled there. Only the step to come may be launched already, if
all that run just decode (`launched.py`). A pass that fails changes nothing that was said: the sequences in it give up
their state and compute it again.

With `speculate`, the MTP block or the draft stages guess tokens to come (`drafter.py`), and the guesses are fed
together with the last token that is known. When a guess is wrong, nothing has to be undone: the rows that it wrote in
rings and pages are exactly those that the right tokens will overwrite, and no query looks at them before.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import cast

import torch

from leadline.engine.disk import DiskCache
from leadline.engine.drafter import Drafter, drafter_of
from leadline.engine.graph import FixedSteps
from leadline.engine.launched import Launched, piece_of, rows_behind
from leadline.engine.memory import Memory
from leadline.engine.native import NativeSteps, require_native
from leadline.engine.prefix import PERIODIC, WindowPolicy
from leadline.engine.request import Request, RequestError
from leadline.engine.runner import Runner, Steps
from leadline.engine.sampler import draw, draw_of
from leadline.engine.scheduler import Candidate, Plan, Share, admit_drafts, plan
from leadline.engine.sequence import Event, Finish, Sequence, Token, Usage
from leadline.model.page_table import PAGE_TOKENS
from leadline.model.state import State
from leadline.model.transformer import Transformer
from leadline.ops.invariance import batch_invariant, check_batch_invariance
from leadline.ops.transfer import send

PATIENCE_STEPS = 64
"""Steps without a fault after which steps that had to become smaller grow again."""


@dataclass(frozen=True)
class Settings:
    """How an engine serves.

    slots: most sequences that run at once. pages: of 128 tokens each, for the entries of all of them and of the prefix
    cache. max_tokens: most tokens of one sequence, prompt and output; None: as many as the pages hold, and no more than
    the model's context. step_tokens: most tokens of a step. block_bytes: most memory for the fixed blocks of the prefix
    cache. speculate: guess with the MTP block or the draft stages, whichever the model has. draft_cost: what a token
    adds to the time of a step, relative to a step without any; the higher, the surer a guess of the draft stages has to
    be (`admit_drafts`). batch_invariant: a sequence's logits are the same bits whatever else is served and however its
    prompt is cut or cached (`ops/invariance.py`); slower, above all on a GPU, where no step is captured then.
    compile_steps: on the CPU, decode in a C++ program that is compiled first (`native`); needs weights in FP32 and the
    exact cache. overlap: launch decoding steps before the tokens of those before them are known (`launched.py`); None:
    where steps are captured and nobody guesses.
    """

    slots: int = 8
    pages: int = 512
    max_tokens: int | None = None
    step_tokens: int = 512
    policy: WindowPolicy = PERIODIC
    block_bytes: int = 2**30
    speculate: bool = False
    draft_cost: float = 0.0
    batch_invariant: bool = False
    compile_steps: bool = False
    overlap: bool | None = None


class Engine:
    """Serves one model. disk: where the prefix cache outlives the process. Not thread safe: one thread calls it."""

    def __init__(self, model: Transformer, settings: Settings, disk: DiskCache | None = None):
        if not 0.0 <= settings.draft_cost < float("inf"):
            raise ValueError(f"draft_cost is {settings.draft_cost}: expected 0 or more")
        if settings.batch_invariant:
            check_batch_invariance(model.embed.weight)
        if settings.step_tokens < PAGE_TOKENS:
            raise ValueError(f"step_tokens is {settings.step_tokens}: expected at least a page, {PAGE_TOKENS}")
        if settings.compile_steps and settings.batch_invariant:
            raise ValueError("compile_steps and batch_invariant exclude each other: compiled sums have other bits")
        if settings.compile_steps:
            require_native(model)
        if settings.overlap and settings.speculate:
            raise ValueError("overlap and speculate exclude each other: guesses wait for the token that they follow")
        config, weight = model.config, model.embed.weight
        self.settings = settings
        most = min(settings.pages * PAGE_TOKENS, config.max_position_embeddings)
        self.max_tokens = min(settings.max_tokens or most, most)
        self.drafter: Drafter | None = drafter_of(model) if settings.speculate else None
        state = State(
            config,
            settings.slots + 1,  # one for the padding of fixed steps
            pages=settings.pages,
            max_tokens=self.max_tokens,
            spare_tokens=self.drafter.length if self.drafter else 0,
            cache_format=model.cache_format,
            dtype=weight.dtype,
            device=weight.device,
        )
        self.runner = Runner(model, state, _fast_steps(model, state, settings))
        self.memory = Memory(state, settings.slots, settings.policy, settings.block_bytes, disk)
        self._overlaps = settings.overlap
        if self._overlaps is None:
            self._overlaps = self.runner.captures and self.drafter is None
        self._launched: Launched | None = None
        self._admission_is_due = False  # whether somebody came or left since nobody could be let in
        self.step_tokens = settings.step_tokens
        self._clean_steps, self._patience = 0, PATIENCE_STEPS
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._usage: dict[int, Usage] = {}
        self._events: list[Event] = []
        self._next_number = 0
        self.num_preempted = 0
        """How often a sequence had to give up its state and compute it again."""
        self.num_damaged_drafts = 0
        """How often NaN in the drafter's logits cut a guess short."""

    # -- requests come and go --------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.waiting or self.running or self._events)

    def submit(self, request: Request, said: tuple[int, ...] = ()) -> int:
        """Queue a request; returns the number of its sequence. RequestError when it can never be served.

        said: what its output began with, elsewhere or before; it goes on behind that, and says the rest only."""
        vocabulary = self.runner.model.config.vocab_size
        wrong = next((token for token in (*request.prompt, *said) if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise RequestError(f"the prompt holds token {wrong}: this model knows ids 0 to {vocabulary - 1}")
        if len(request.prompt) >= self.max_tokens:
            raise RequestError(
                f"the prompt has {len(request.prompt):,} tokens: at most {self.max_tokens - 1:,} fit, and one of output"
            )
        request = replace(request, max_tokens=min(request.max_tokens, self.max_tokens - len(request.prompt)))
        sequence = Sequence(self._next_number, request, self.drafter.name if self.drafter else "")
        self._next_number += 1
        self.waiting.append(sequence)
        self._admission_is_due = True
        ends = next((finish for token in said if (finish := sequence.append(token))), None)
        if ends is not None:
            self._end(sequence, ends)
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

    def output(self, number: int) -> list[int]:
        """What a sequence has said that has not ended."""
        return next(sequence.output for sequence in [*self.running, *self.waiting] if sequence.number == number)

    @property
    def cache_bytes(self) -> int:
        """Bytes of slots and pages that running sequences and the prefix cache hold."""
        state, pool = self.memory.state, self.memory.pool
        pages = (pool.num_pages - pool.num_free) * state.bytes_per_page
        return pages + len(self.running) * state.bytes_per_slot + self.memory.prefix.num_block_bytes

    @property
    def compile_seconds(self) -> float:
        """Seconds that compiling steps has taken so far."""
        return self.runner.steps.compile_seconds if self.runner.steps is not None else 0.0

    def usage(self, number: int) -> Usage:
        """Tokens of a sequence, also after its end; reading the usage of an ended one forgets it."""
        for sequence in [*self.running, *self.waiting]:
            if sequence.number == number:
                return sequence.usage
        return self._usage.pop(number)

    # -- the loop --------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Run whatever is due through the model; returns what it added to whom."""
        launched, self._launched = self._launched, None
        self._clean_steps += 1
        with batch_invariant() if self.settings.batch_invariant else nullcontext():
            if launched is not None and launched.alive:
                with self._surviving(launched.shares):
                    self._finish(launched)
            else:
                self.admit()
                for part in self._passes():
                    with self._surviving(part):
                        self._finish(self._launch(part))
        self._regrow()
        events, self._events = self._events, []
        return events

    def _passes(self) -> Iterable[list[tuple[Sequence, Share]]]:
        """The next step. Tokens that continue look their past up where it lies, chunks of prompts gather theirs: passes
        of their own."""
        passes: dict[int, list[tuple[Sequence, Share]]] = {}
        for sequence, share in self._plan():
            passes.setdefault(self._step_length(sequence, share), []).append((sequence, share))
        return passes.values()

    def _shares_behind(self, sequences: list[Sequence]) -> list[tuple[Sequence, Share]]:
        """Shares of the token that is being drawn for each of some sequences, with the pages for it; none when there is
        not room for all of them."""
        chosen = self._planned([_candidate_behind(sequence) for sequence in sequences])
        if len(chosen.shares) < len(sequences):
            return []
        by_number = {share.number: share for share in chosen.shares}
        shares = [(sequence, by_number[sequence.number]) for sequence in sequences]
        for sequence, share in shares:
            self.memory.grow(sequence, share.new_pages)
        return shares

    def _plan(self) -> list[tuple[Sequence, Share]]:
        by_number = {sequence.number: sequence for sequence in self.running}
        drafts = self._admitted_drafts()
        candidates = [self._candidate(sequence, drafts.get(sequence.number, 0)) for sequence in self.running]
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
        return plan(candidates, step_tokens=self.step_tokens, free_pages=free_pages)

    def _candidate(self, sequence: Sequence, drafts: int) -> Candidate:
        cut, pages = self.memory.cut(sequence), len(sequence.pages)
        return Candidate(sequence.number, sequence.order, sequence.seen, sequence.pending, drafts, pages, cut)

    def _admitted_drafts(self) -> dict[int, int]:
        """How many drafts of each sequence are verified in the next step: those that are worth their time, and do not
        run over a place where the state has to be kept."""
        decoding = [sequence for sequence in self.running if sequence.pending == 1]
        useful: list[tuple[float, ...]] = []
        for sequence in decoding:
            cut, most = self.memory.cut(sequence), sequence.most_drafts
            most = most if cut is None else min(most, cut - sequence.seen - 1)
            useful.append(sequence.survival[:most])
        admitted = admit_drafts(useful, self.settings.draft_cost)
        return {sequence.number: count for sequence, count in zip(decoding, admitted, strict=True)}

    def _step_length(self, sequence: Sequence, share: Share) -> int:
        """Tokens and drafts of a decoding step, 0 for a chunk."""
        length = share.tokens + share.drafts
        is_step = length <= 1 + self.memory.state.spare_tokens and sequence.seen >= sequence.written
        return length if is_step else 0

    def _launch(self, shares: list[tuple[Sequence, Share]]) -> Launched:
        """Queue a pass, and the drawing of the tokens behind it."""
        pieces = [piece_of(sequence, share) for sequence, share in shares]
        output, logits_NV = self.runner.run(pieces, step=self._step_length(*shares[0]) > 0)
        due = [(sequence, share) for (sequence, share), piece in zip(shares, pieces, strict=True) if piece.wanted]
        owners = [(sequence, place) for sequence, share in due for place in range(1 + share.drafts)]
        drawn = draw(logits_NV, [draw_of(*owner) for owner in owners]) if owners else None
        decodes = all(share.tokens == sequence.pending == 1 and not share.drafts for sequence, share in shares)
        return Launched(shares, owners, drawn, decodes, output, pieces)

    def _launch_behind(self, launched: Launched) -> Launched | None:
        """Queue the decoding step behind a pass whose tokens are not known yet; None where it has to wait for them, or
        for somebody who may come in."""
        if not self._overlaps or (self.waiting and self._admission_is_due):
            return None
        rows = rows_behind(launched, self.running)
        sequences = [launched.shares[row][0] for row in rows]
        shares = self._shares_behind(sequences)
        if launched.drawn is None or not shares:
            return None
        for sequence in sequences:
            block = self.memory.block_at_end(sequence)
            if block is not None:
                launched.blocks[sequence.number] = block
        ids_N = launched.drawn.ids_N
        tokens_N = ids_N if len(rows) == len(ids_N) else ids_N[send(torch.tensor(rows), ids_N.device)]
        past, slots = [len(sequence.tokens) for sequence in sequences], [cast("int", s.slot) for s in sequences]
        drawn = draw(self.runner.decode(tokens_N, past, slots), [draw_of(sequence, 1) for sequence in sequences])
        return Launched(shares, [(sequence, 0) for sequence in sequences], drawn, decodes=True)

    def _finish(self, launched: Launched) -> None:
        """Take in what a pass did, when the step behind it is on its way. If that one fails, the tokens of this one are
        known all the same."""
        try:
            self._launched = self._launch_behind(launched)
        finally:
            self._take_in(launched)

    def _take_in(self, launched: Launched) -> None:
        drawn = launched.tokens()
        for sequence, share in launched.shares:
            if sequence.slot is not None:
                self._commit(sequence, share, drawn.get(sequence.number, []))
        if self.drafter is not None and launched.output is not None:
            fed = [(sequence, piece) for (sequence, _), piece in zip(launched.shares, launched.pieces, strict=True)]
            for sequence, guess in self.drafter.guess(self.runner, launched.output, fed):
                sequence.propose(guess.tokens, guess.survival)
                self.num_damaged_drafts += guess.damaged
        for sequence, _ in launched.shares:
            if sequence.slot is not None:
                self.memory.settle(sequence, launched.blocks.get(sequence.number))

    def _commit(self, sequence: Sequence, share: Share, drawn: list[Token | None]) -> None:
        """Take in what the pass did for a sequence. drawn: a token for each draft that was right and one more, the last
        of them None if its logits were damaged; none inside of a prompt."""
        right = max(0, len(drawn) - 1)
        sequence.seen += share.tokens + right
        emitted: list[Token] = []
        finish = error = None
        for token in drawn:
            if token is None:
                finish, error = Finish.ERROR, "the logits hold NaN: weights or state are damaged"
            else:
                finish = sequence.append(token.id)
                emitted.append(token)
            if finish is not None:
                break
        sequence.count_drafts(share.drafts, min(right, len(emitted)))
        sequence.propose((), ())
        self._emit(sequence, emitted)
        if finish is not None:
            self._end(sequence, finish, error)

    # -- come and go -----------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Let waiting sequences in, in order, while a slot and all pages of their tokens are free."""
        self._admission_is_due = False
        for sequence in sorted(self.waiting, key=lambda s: s.order):
            if not self.memory.start(sequence, len(self.running)):
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        self.running.remove(sequence)
        self.waiting.append(sequence)
        self.num_preempted += 1

    def _end(self, sequence: Sequence, finish: Finish, error: str | None = None) -> None:
        self._release(sequence)
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._usage[sequence.number] = sequence.usage
        self._events.append(Event(sequence.number, finish=finish, error=error))

    def _release(self, sequence: Sequence) -> None:
        self.memory.release(sequence)
        self._admission_is_due = True

    def _emit(self, sequence: Sequence, tokens: Iterable[Token]) -> None:
        if tokens:
            self._events.append(Event(sequence.number, tuple(tokens)))

    # -- faults ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _surviving(self, shares: list[tuple[Sequence, Share]]) -> Generator[None]:
        """Around a pass of some sequences and what is launched behind it."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self._survive([sequence for sequence, _ in shares if sequence.slot is not None], error)

    def _survive(self, sequences: list[Sequence], error: torch.OutOfMemoryError) -> None:
        """The card's memory was not enough for the sequences of a pass. They compute their state again, in smaller
        steps; when steps cannot get smaller, the longest of them ends with the error. `_regrow` undoes that."""
        self._clean_steps, self._launched = 0, None
        if self.step_tokens > PAGE_TOKENS:
            self.step_tokens = max(PAGE_TOKENS, self.step_tokens // 2)
        elif sequences:
            longest = max(sequences, key=lambda s: len(s.tokens))
            self._end(longest, Finish.ERROR, f"out of memory: {str(error).splitlines()[0]}")
        for sequence in sequences:
            if sequence.slot is not None:
                self._preempt(sequence)

    def _regrow(self) -> None:
        """Steps that had to become smaller grow again when many in a row have gone well. Each time it takes twice as
        many, since steps that keep failing would cost more than small ones do."""
        if self.step_tokens < self.settings.step_tokens and self._clean_steps >= self._patience:
            self.step_tokens = min(2 * self.step_tokens, self.settings.step_tokens)
            self._clean_steps, self._patience = 0, 2 * self._patience


def _fast_steps(model: Transformer, state: State, settings: Settings) -> Steps | None:
    """Captured ones on a card, native ones on the CPU if asked for; none where they are batch-invariant, because
    attention then asks the device how much there is to see."""
    if settings.batch_invariant:
        return None
    if model.embed.weight.is_cuda:
        return FixedSteps(model, state, settings.slots)
    return NativeSteps(model, state, settings.speculate) if settings.compile_steps else None


def _candidate_behind(sequence: Sequence) -> Candidate:
    """A decoding sequence as it will be when its next token is known."""
    return Candidate(sequence.number, sequence.order, len(sequence.tokens), 1, 0, len(sequence.pages))
