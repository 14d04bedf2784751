"""The scheduler: which sequences run in the next step, and how many tokens of each. Pure: numbers in, a plan out.

A step has room for `step_tokens` tokens. Sequences that are decoding come first, with one token each (and their
drafts): nobody who is reading an answer waits for somebody else's prompt. What is left is shared by the prompts: each
gets an equal part, so that a short prompt is through in a few steps however long its neighbour is, and what one does
not need goes to the others in order. Order is priority, then arrival.

When a decoding sequence needs a page and none is free, the last in order gives up its pages and its place; it is
admitted again later and computes its state anew. Its tokens are kept, so nothing is lost and nothing said twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from leadline.model.page_table import PAGE_TOKENS, num_pages


class Candidate(NamedTuple):
    """A running sequence as the scheduler sees it.

    pending: tokens that its state has not taken in, at least 1. drafts: guesses that may ride along with the last one.
    pages: how many it holds. cut: a number of tokens at which a chunk has to end, because its state is kept there.
    """

    number: int
    order: tuple[int, int]
    seen: int
    pending: int
    drafts: int
    pages: int
    cut: int | None = None


class Share(NamedTuple):
    """A sequence's part of a step: `tokens` pending ones, `drafts` guesses behind them; `new_pages` are taken first."""

    number: int
    tokens: int
    drafts: int
    new_pages: int


@dataclass(frozen=True)
class Plan:
    """The next step. preempted: sequences that give up their pages and slots before it."""

    shares: tuple[Share, ...] = ()
    preempted: tuple[int, ...] = ()


def plan(running: Sequence[Candidate], *, step_tokens: int, free_pages: int) -> Plan:
    """Shares of the next step; their tokens and drafts sum to at most `step_tokens`, their pages to those that are free
    once the preempted have given up theirs. Some sequence always advances, as long as one alone fits."""
    ranked = sorted(running, key=lambda candidate: candidate.order)
    shares: list[Share] = []
    preempted: list[Candidate] = []
    room = step_tokens
    for candidate in [c for c in ranked if c.pending == 1]:
        if candidate in preempted:
            continue
        if room < 1:
            break
        tokens = min(1 + candidate.drafts, room)
        if _new_pages(candidate, tokens) > free_pages:
            tokens = 1  # nobody gives way for a guess
        needed = _new_pages(candidate, tokens)
        while needed > free_pages:
            loser = next(c for c in reversed(ranked) if c not in preempted)
            preempted.append(loser)
            free_pages += loser.pages
            if loser is candidate:
                break
        if candidate in preempted:
            continue
        free_pages -= needed
        room -= tokens
        shares.append(Share(candidate.number, 1, tokens - 1, needed))
    lost = {candidate.number for candidate in preempted}
    shares = [share for share in shares if share.number not in lost]
    prompts = [c for c in ranked if c.pending > 1 and c not in preempted]
    return Plan((*shares, *_prompt_shares(prompts, room)), tuple(c.number for c in preempted))


def admit_drafts(survival: Sequence[Sequence[float]], token_cost: float) -> list[int]:
    """How many of each decoding sequence's drafts to verify in a step (DSpark paper 3.2.2).

    A draft brings a token with its survival's probability, and makes the step longer. The likeliest go first, whoever
    has them, as long as the tokens to be expected per second rise:

        (R + sum of survivals) * steps per second,     steps per second ~ 1 / (1 + token_cost B)

    with R sequences and B tokens in the step. survival: of each sequence's drafts, never rising. token_cost: what a
    token adds to the time of a step, relative to what a step takes without any; 0 admits whatever can survive.
    """
    expected = float(len(survival))
    tokens, admitted = len(survival), [0] * len(survival)
    ranked = sorted(((chance, number) for number, run in enumerate(survival) for chance in run), key=lambda x: -x[0])
    for chance, number in ranked:
        if chance * (1 + token_cost * tokens) <= expected * token_cost:
            break  # (expected + chance) / (1 + cost (B + 1)) is no more than expected / (1 + cost B)
        expected += chance
        tokens += 1
        admitted[number] += 1
    return admitted


def _prompt_shares(prompts: Sequence[Candidate], room: int) -> list[Share]:
    """Cut the room among prompts. They hold the pages of all their tokens since their admission."""
    if not prompts or room < 1:
        return []
    quota = max(PAGE_TOKENS, room // len(prompts))
    given = {prompt.number: 0 for prompt in prompts}
    for limit in (quota, room):  # the equal part first, then whatever is left, in order
        for prompt in prompts:
            tokens = min(_until_cut(prompt) - given[prompt.number], limit, room)
            given[prompt.number] += tokens
            room -= tokens
    cut = {prompt.number: _aligned(prompt, given[prompt.number]) for prompt in prompts}
    return [Share(number, tokens, 0, 0) for number, tokens in cut.items() if tokens]


def _until_cut(prompt: Candidate) -> int:
    if prompt.cut is None or prompt.cut <= prompt.seen:
        return prompt.pending
    return min(prompt.pending, prompt.cut - prompt.seen)


def _aligned(prompt: Candidate, tokens: int) -> int:
    """Let a chunk end where a page ends, if that leaves anything of it: pages that are full can be shared."""
    if tokens == prompt.pending:
        return tokens
    shorter = (prompt.seen + tokens) // PAGE_TOKENS * PAGE_TOKENS - prompt.seen
    return shorter if shorter > 0 else tokens


def _new_pages(candidate: Candidate, tokens: int) -> int:
    return max(0, num_pages(candidate.seen + tokens) - candidate.pages)


def may_admit(needed_pages: int, free_pages: int, num_running: int) -> bool:
    """Whether a waiting sequence may start: all pages of the tokens it has now must be free, and beyond them one for
    each running sequence, so that its arrival does not push anybody out at once. Alone, it may have them all."""
    return needed_pages + num_running <= free_pages
