"""Generation through the state: a prompt in chunks, then one token after the other.

Every forward pass is the same call as in training; only the past grows. The work of a new token does not depend on how
it was reached, so any chunk size gives the same continuation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leadline.model.segment import Segment
from leadline.model.state import State
from leadline.model.transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. temperature 0 takes the most likely one. top_p keeps the smallest set of tokens whose
    probability reaches it. seed makes a run repeatable."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


def sample(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from FP32 logits [V]."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probabilities_V = torch.softmax(logits_V / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ranked, order = probabilities_V.sort(descending=True, stable=True)
        outside = ranked.cumsum(-1) - ranked >= sampling.top_p
        probabilities_V[order[outside]] = 0.0
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling = Sampling(),
    stop_ids: frozenset[int] = frozenset(),
    chunk_tokens: int = 512,
) -> Iterator[int]:
    """Yield up to `max_tokens` token ids that continue the prompt; ends after a stop id, which is yielded too."""
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token")
    device = model.embed.weight.device
    state = State(
        model.config,
        1,
        len(prompt) + max_tokens,
        cache_format=model.cache_format,
        dtype=model.embed.weight.dtype,
        device=device,
    )
    generator = torch.Generator(device=device).manual_seed(sampling.seed)
    new: list[int] = list(prompt)
    past = 0
    for _ in range(max_tokens):
        streams_TSD = _run_in_chunks(model, state, new, past, chunk_tokens)
        past += len(new)
        token = sample(model.logits(model.hidden(streams_TSD[-1:]))[0], sampling, generator)
        yield token
        if token in stop_ids:
            return
        new = [token]


def _run_in_chunks(model: Transformer, state: State, tokens: list[int], past: int, chunk_tokens: int) -> Tensor:
    """Streams of the last chunk of some tokens that follow `past` others."""
    first, *rest = range(0, len(tokens), chunk_tokens)
    device = model.embed.weight.device
    output = model(Segment.of(tokens[:chunk_tokens], past=[past + first], device=device), state)
    for start in rest:
        output = model(Segment.of(tokens[start : start + chunk_tokens], past=[past + start], device=device), state)
    return output.streams_TSD
