"""Compiled steps: a decoding step on the CPU as a few C++ functions.

A step of a small model makes thousands of calls of torch, each for a few microseconds of work, and Python cannot make
them any faster. torch.compile joins what lies between two matrix products into one C++ function and takes Python out of
the rest. It needs a C++ compiler, and time: some seconds for each kind of block, when a shape first comes up. The
compiler's results stay in torch's cache on disk, so that the next process starts faster.

Blocks that differ in nothing but their weights are one *kind*, and are compiled once. Which compiled function runs is
decided here, by kind and shape. torch's own guards would ask the same again for each of hundreds of tensors, in every
step, and could answer by compiling anew without a word; they are left out.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from leadline.engine.graph import FixedStep
from leadline.model.block import Block
from leadline.model.cache_format import CacheFormat
from leadline.model.dspark import DSpark
from leadline.model.hyper_connections import spread
from leadline.model.mtp import MTPBlock
from leadline.model.segment import Segment
from leadline.model.segment_index import SegmentIndex
from leadline.model.state import LayerState, State
from leadline.model.transformer import Output, Transformer

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class CompileError(ValueError):
    """Steps cannot be compiled here; the message says why."""


def require_compilable(model: Transformer) -> None:
    """CompileError when steps of this model cannot be compiled on this machine."""
    if model.embed.weight.device.type != "cpu":
        raise CompileError("compile_steps is for the CPU: on a card steps are captured anyway")
    held = next((name for name, tensor in model.state_dict().items() if tensor.element_size() == 1), None)
    if held is not None:
        raise CompileError(f"compile_steps needs floating weights, and {held} is in eight or four bits: convert it")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise CompileError(f"compile_steps needs a C++ compiler, and {compiler} is not there: install it, or set CXX")


class Compiled(Generic[Parameters, Result]):
    """A function that is compiled when it is first called, and from then on takes the same shapes only.

    seconds: how long that first call took. CompileError when the function cannot be compiled.
    """

    def __init__(self, function: Callable[Parameters, Result]):
        assert isinstance(function, FunctionType)
        # torch looks compiled functions up by their code object: each gets one of its own.
        own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        # With its wrapper in C++ a function is one file, one run of the compiler, and calls products without Python.
        options: dict[str, str | int | bool | Callable[..., Any]] = {"guard_filter_fn": _no_guards, "cpp_wrapper": True}
        self._name = function.__name__
        self._call: Callable[Parameters, Result] = torch.compile(  # pyright: ignore[reportUnknownMemberType]
            own, fullgraph=True, dynamic=False, options=options
        )
        self.seconds = 0.0

    def __call__(self, *arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        if self.seconds:
            return self._call(*arguments, **named)
        start = time.perf_counter()
        try:
            result = self._call(*arguments, **named)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise CompileError(f"{self._name} was not compiled: {reason}; serve without compile_steps") from error
        self.seconds = time.perf_counter() - start
        return result


def _no_guards(guards: Sequence[object]) -> list[bool]:
    """Of torch's guards, which to keep."""
    return [False] * len(guards)


class CompiledStep(FixedStep):
    """A step whose parts are compiled in its first run."""

    def __init__(self, model: Transformer, state: State, sequences: int, length: int, longest: int):
        super().__init__(model, state, sequences, length, longest)
        self._begin, self._end, self._predict = Compiled(_begin), Compiled(_end), Compiled(_predict)
        self._take_in = Compiled(_take_in)
        self._layers = [block for block in model.layers if isinstance(block, Block)]
        self._blocks = {kind: Compiled(_through_block) for kind in map(_kind, self._layers)}

    @property
    def compile_seconds(self) -> float:
        return sum(
            part.seconds for part in (self._begin, self._end, self._predict, self._take_in, *self._blocks.values())
        )

    @torch.no_grad()
    def compute(self) -> tuple[Output, Tensor]:
        model, state = self._model, self._state
        index, x_TSD = self._begin(model, self._segment, state)
        features: list[Tensor] = []
        for number, (block, layer_state) in enumerate(zip(self._layers, state.layers, strict=True)):
            x_TSD = self._blocks[_kind(block)](block, x_TSD, index, layer_state, model.cache_format)
            if model.dspark is not None and model.dspark.listens_to(number):
                features.append(model.dspark.feature(x_TSD, index))
        if model.dspark is not None:
            self._take_in(model.dspark, features, index, state.mtp, model.cache_format)
        return Output(x_TSD, index, []), self._end(model, x_TSD)

    @torch.no_grad()
    def predict_second(self, output: Output, next_T: Tensor) -> Tensor:
        return self._predict(self._model, output.streams_TSD, next_T, output.index, self._state.mtp[0])


def _kind(block: Block) -> tuple[int, bool]:
    """What decides the arithmetic of a block: its compression ratio, and whether its router looks experts up."""
    return block.attn.ratio, block.ffn.hashed


def _begin(model: Transformer, segment: Segment, state: State) -> tuple[SegmentIndex, Tensor]:
    return model.index(segment, state), spread(model.embed(segment.tokens_T), model.config.hc_mult)


def _through_block(
    block: Block, x_TSD: Tensor, index: SegmentIndex, state: LayerState, cache_format: CacheFormat
) -> Tensor:
    return block(x_TSD, index, state, cache_format)[0]


def _take_in(
    stages: DSpark, features: list[Tensor], index: SegmentIndex, state: list[LayerState], cache_format: CacheFormat
) -> None:
    stages.take_in(features, index, state, cache_format)


def _end(model: Transformer, streams_TSD: Tensor) -> Tensor:
    return model.logits(model.hidden(streams_TSD))


def _predict(model: Transformer, streams_TSD: Tensor, next_T: Tensor, index: SegmentIndex, state: LayerState) -> Tensor:
    block = model.mtp[0]
    assert isinstance(block, MTPBlock)
    return block.predict(streams_TSD, model.embed(next_T), index, state, model.cache_format)[0]
