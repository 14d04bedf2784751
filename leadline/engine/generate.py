"""Generation for one prompt: the engine with a single sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from leadline.engine.disk import DiskCache
from leadline.engine.engine import Engine, Settings
from leadline.engine.request import LIKE_THE_MODEL, Request, Sampling
from leadline.engine.sequence import Event, Finish
from leadline.model.page_table import num_pages
from leadline.model.transformer import Transformer


class GenerationError(ValueError):
    """The engine gave a sequence up; the message says why."""


def engine_for(
    model: Transformer,
    tokens: int,
    *,
    step_tokens: int = 512,
    speculate: bool = False,
    draft_cost: float = 0.0,
    compile_steps: bool = False,
    disk: DiskCache | None = None,
) -> Engine:
    """An engine for one sequence of so many tokens, prompt and output."""
    settings = Settings(
        slots=1,
        pages=num_pages(tokens + 1),
        step_tokens=step_tokens,
        speculate=speculate,
        draft_cost=draft_cost,
        compile_steps=compile_steps,
    )
    return Engine(model, settings, disk)


def events(engine: Engine, request: Request) -> Iterator[Event]:
    """Submit one request to an engine that serves nothing else; its events, step by step, until it ends."""
    engine.submit(request)
    while engine.busy:
        for event in engine.step():
            if event.finish is Finish.ERROR:
                raise GenerationError(event.error or "the sequence ended with an error")
            yield event


def generate(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling = LIKE_THE_MODEL,
    stop_ids: frozenset[int] = frozenset(),
    step_tokens: int = 512,
) -> Iterator[int]:
    """Yield up to `max_tokens` token ids that continue the prompt; ends after a stop id, which is yielded too."""
    request = Request(tuple(prompt), max_tokens, sampling, stop_ids)
    engine = engine_for(model, len(prompt) + max_tokens, step_tokens=step_tokens)
    for event in events(engine, request):
        yield from (token.id for token in event.tokens)
