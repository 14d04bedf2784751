"""Captured steps: a decoding step as one CUDA graph.

A step launches hundreds of kernels, each for a few microseconds of work; the host cannot launch them as fast as the
card finishes them. So a step is captured once, as a graph of its kernels, and replayed: the host hands over tokens,
positions and slots, and launches a single thing.

A graph is made for fixed shapes. Sequences are padded to a power of two, and the page lists to a power of four; the
padding works on a slot of its own, at position 0, where nothing is finished and nobody looks. The first step of a shape
runs twice before its capture, with its true tokens: a step that is repeated writes the same values into the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf

import torch
from torch import Tensor

from leadline.model.page_table import PAGE_TOKENS, num_pages
from leadline.model.segment import Segment
from leadline.model.state import State
from leadline.model.transformer import Output, Transformer

WARM_UP_RUNS = 2


class StepGraph:
    """A captured step of `sequences` x `length` tokens, none beyond `longest` tokens."""

    def __init__(self, model: Transformer, state: State, sequences: int, length: int, longest: int):
        device = state.device
        self._tokens_T = torch.zeros(sequences * length, dtype=torch.int64, device=device)
        self._positions_T = torch.zeros_like(self._tokens_T)
        self._slots_N = torch.zeros(sequences, dtype=torch.int64, device=device)
        self._model, self._state = model, state
        self._segment = Segment.on_device(self._tokens_T, self._positions_T, self._slots_N, longest)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: tuple[Output, Tensor] | None = None

    def run(self, tokens: ListOf[int], positions: ListOf[int], slots: ListOf[int]) -> tuple[Output, Tensor]:
        """Output and logits of all rows, padding included; they are overwritten by the next run."""
        for place, values in ((self._tokens_T, tokens), (self._positions_T, positions), (self._slots_N, slots)):
            place.copy_(torch.tensor(values, dtype=torch.int64), non_blocking=True)
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        assert self._result is not None
        self._graph.replay()
        return self._result

    def _capture(self) -> None:
        side = torch.cuda.Stream(self._state.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._result = self._step()
        self._graph = graph

    @torch.no_grad()
    def _step(self) -> tuple[Output, Tensor]:
        output = self._model(self._segment, self._state)
        return output, self._model.logits(self._model.hidden(output.streams_TSD))


class StepGraphs:
    """The graphs of a model and its state, made when their shape comes up. padding_slot: a slot of nobody."""

    def __init__(self, model: Transformer, state: State, padding_slot: int):
        self._model, self._state, self._padding_slot = model, state, padding_slot
        self._graphs: dict[tuple[int, int, int], StepGraph] = {}

    def run(self, tokens: ListOf[ListOf[int]], past: ListOf[int], slots: ListOf[int]) -> tuple[Output, Tensor]:
        """A step that brings the same number of tokens of each sequence. The rows of the padding come last."""
        length, padding = len(tokens[0]), power_of(2, len(tokens)) - len(tokens)
        longest = self._longest(max(past) + length)
        key = len(tokens) + padding, length, longest
        if key not in self._graphs:
            self._graphs[key] = StepGraph(self._model, self._state, *key)
        return self._graphs[key].run(
            [token for run in tokens for token in run] + [0] * (padding * length),
            [first + place for first in past for place in range(length)] + [0] * (padding * length),
            [*slots, *[self._padding_slot] * padding],
        )

    def _longest(self, tokens: int) -> int:
        """Tokens for which a graph is made: a power of four pages, but no more than a slot can have."""
        pages = min(power_of(4, num_pages(tokens)), self._state.pages.pages_per_slot)
        return pages * PAGE_TOKENS


def power_of(base: int, number: int) -> int:
    """The smallest power of a base that is not smaller than a number."""
    power = 1
    while power < number:
        power *= base
    return power
