"""Steps of fixed shapes: what a decoding step needs to be captured once and replayed.

A graph is made for fixed shapes. Sequences are padded to a power of two, and the page lists to a power of four; the
padding works on a slot of its own, at position 0, where nothing is finished and nobody looks. The step reads its
tokens, positions and slots from tensors, which are filled anew before each run.

On a card a step is captured as one CUDA graph. It launches hundreds of kernels, each for a few microseconds of work;
the host cannot launch them as fast as the card finishes them. Replayed, they are a single launch. The first step of a
shape runs twice before its capture, with its true tokens: a step that is repeated writes the same values into the same
rows. For the CPU see `native`.
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf

import torch
from torch import Tensor

from leadline.model.page_table import PAGE_TOKENS, num_pages
from leadline.model.segment import Segment
from leadline.model.state import State
from leadline.model.transformer import Output, Transformer
from leadline.ops.transfer import fill

WARM_UP_RUNS = 2


class StepGraph:
    """A captured step of `sequences` x `length` tokens, none beyond `longest` tokens."""

    _graph: torch.cuda.CUDAGraph | None = None
    _result: tuple[Output, Tensor] | None = None

    def __init__(self, model: Transformer, state: State, sequences: int, length: int, longest: int):
        device = state.device
        self._tokens_T = torch.zeros(sequences * length, dtype=torch.int64, device=device)
        self._positions_T = torch.zeros_like(self._tokens_T)
        self._slots_N = torch.zeros(sequences, dtype=torch.int64, device=device)
        self._model, self._state = model, state
        self._segment = Segment.on_device(self._tokens_T, self._positions_T, self._slots_N, longest)

    def run(self, tokens_T: Tensor, positions: ListOf[int], slots: ListOf[int]) -> tuple[Output, Tensor]:
        """Output and logits of all rows, padding included; the next run may overwrite them. tokens_T: int64, on the
        host or on the device. The device is not waited for."""
        fill(self._tokens_T, tokens_T)
        fill(self._positions_T, torch.tensor(positions))
        fill(self._slots_N, torch.tensor(slots))
        return self.compute()

    @torch.no_grad()
    def predict_second(self, output: Output, next_T: Tensor) -> Tensor:
        """Hidden vectors of the MTP block behind the last run, [T, D]."""
        return self._model.predict_second(output, next_T, self._state)[0]

    def compute(self) -> tuple[Output, Tensor]:
        """The step with what its tensors hold. Repeated, it writes the same values into the same rows."""
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


class FixedSteps:
    """The fixed steps of a model and its state, made when their shape comes up. padding_slot: a slot of nobody."""

    def __init__(self, model: Transformer, state: State, padding_slot: int):
        self._model, self._state, self._padding_slot = model, state, padding_slot
        self._steps: dict[tuple[int, int, int], StepGraph] = {}
        self._latest: tuple[Output, StepGraph] | None = None

    def run(self, tokens_T: Tensor, past: ListOf[int], slots: ListOf[int]) -> tuple[Output, Tensor]:
        """A step that brings the same number of tokens of each sequence; they are int64, on the host or on the device.
        The rows of the padding come last."""
        length, padding = len(tokens_T) // len(past), power_of(2, len(past)) - len(past)
        longest = self._longest(max(past) + length)
        key = len(past) + padding, length, longest
        if key not in self._steps:
            self._steps[key] = StepGraph(self._model, self._state, *key)
        step = self._steps[key]
        output, logits_TV = step.run(
            torch.nn.functional.pad(tokens_T, (0, padding * length)) if padding else tokens_T,
            [first + place for first in past for place in range(length)] + [0] * (padding * length),
            [*slots, *[self._padding_slot] * padding],
        )
        self._latest = output, step
        return output, logits_TV

    @property
    def made(self) -> list[StepGraph]:
        """The steps so far, in the order in which their shapes came up."""
        return list(self._steps.values())

    @property
    def compile_seconds(self) -> float:
        """A capture takes none to speak of."""
        return 0.0

    def step_of(self, output: Output) -> StepGraph | None:
        """The step whose latest run gave this output; None when it was not the latest, or none of them."""
        return self._latest[1] if self._latest is not None and self._latest[0] is output else None

    def _longest(self, tokens: int) -> int:
        """Tokens for which a step is made: a power of four pages, but no more than a slot can have."""
        pages = min(power_of(4, num_pages(tokens)), self._state.pages.pages_per_slot)
        return pages * PAGE_TOKENS


def power_of(base: int, number: int) -> int:
    """The smallest power of a base that is not smaller than a number."""
    power = 1
    while power < number:
        power *= base
    return power
