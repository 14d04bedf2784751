"""Native steps: a decoding step on the CPU as one C++ program.

A step of a small model makes thousands of calls of torch, each for a few microseconds of work, and Python cannot make
them any faster. Here it is three functions, `step.cpp`, which a C++ compiler makes in a few seconds for the widths of
the model. They read the model's own weights and the state's own rows, so that steps and chunks of prompts take turns on
one memory. What they compute is what `Block` computes, in FP32; sums have another order, and so other last bits.

Not for weights or caches in fewer bits: there the references stand.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListOf

import torch
from torch import Tensor, nn

from leadline.engine.native.library import BuildError, Program, Words, program, words
from leadline.model.block import Block
from leadline.model.compressor import Compressor
from leadline.model.config import CSA_RATIO
from leadline.model.hyper_connections import HyperConnection
from leadline.model.linear import Norm
from leadline.model.mtp import MTPBlock
from leadline.model.segment import Segment
from leadline.model.state import CompressorState, LayerState, State
from leadline.model.transformer import Output, Transformer
from leadline.ops.select_topk import NonFiniteScoresError

__all__ = ["BuildError", "NativeSteps", "require_native"]

LANES = 16  # as in step.cpp


def require_native(model: Transformer) -> None:
    """BuildError when steps of this model cannot be native; the message says what to change."""
    if model.embed.weight.device.type != "cpu":
        raise BuildError("compile_steps is for the CPU: on a card steps are captured anyway")
    held = next((name for name, tensor in model.named_parameters() if tensor.dtype != torch.float32), None)
    held = held or next((name for name, tensor in model.named_buffers() if tensor.element_size() == 1), None)
    if held is not None:
        raise BuildError(f"compile_steps computes with weights in float32, and {held} is not: load with dtype=float32")
    if model.cache_format.key or model.cache_format.index:
        raise BuildError(f"compile_steps needs cache=exact, and the model's cache is {model.cache_format.name}")
    c = model.config
    widths = c.hidden_size, c.head_dim, c.index_head_dim, c.moe_intermediate_size
    if any(width % LANES for width in widths) or c.num_attention_heads % 4:
        raise BuildError(
            "compile_steps needs hidden_size, head_dim, index_head_dim and moe_intermediate_size in multiples of "
            f"{LANES} and heads in multiples of 4: they are {', '.join(map(str, widths))} and {c.num_attention_heads}"
        )


class NativeSteps:
    """The decoding steps of a model and its state. drafts: whether somebody guesses tokens behind a step, and so needs
    its streams and their index.

    The addresses of weights and state are taken once: both may change their values, but not their place.
    """

    def __init__(self, model: Transformer, state: State, drafts: bool):
        self._model, self._state, self._drafts = model, state, drafts
        self._program = program(model.config)
        self._blocks = [_block_words(*pair) for pair in zip(model.layers, state.layers, strict=True)]
        self._extra = [] if model.dspark else [_block_words(*pair) for pair in zip(model.mtp, state.mtp, strict=False)]
        head = model.hc_head
        self._ends = words(model.embed.weight, head.fn, head.base, head.scale, model.norm.weight, model.head.weight)
        self._latest: tuple[Output, NativeStep] | None = None

    @property
    def compile_seconds(self) -> float:
        """Seconds that compiling took."""
        return self._program.seconds

    @torch.no_grad()
    def run(self, tokens_T: Tensor, past: ListOf[int], slots: ListOf[int]) -> tuple[Output | None, Tensor]:
        """A step that brings the same number of tokens of each sequence, int64: its output, if somebody drafts, and the
        logits of all rows, FP32 [T, V]."""
        step = NativeStep(self._program, self._model, self._state, self._extra, tokens_T, past, slots)
        if not self._drafts:
            step.run(self._ends, self._blocks)
            return None, step.logits_TV
        lengths = (len(tokens_T) // len(past),) * len(past)
        index = self._model.index(Segment(tokens_T, lengths, tuple(past), tuple(slots)), self._state)
        features: list[Tensor] = []
        stages = self._model.dspark

        def listen(number: int) -> None:
            if stages is not None and stages.listens_to(number):
                features.append(stages.feature(step.streams_TSD, index))

        step.run(self._ends, self._blocks, listen)
        if stages is not None:
            stages.take_in(features, index, self._state.mtp, self._model.cache_format)
        output = Output(step.streams_TSD, index, [])
        self._latest = output, step
        return output, step.logits_TV

    def step_of(self, output: Output) -> NativeStep | None:
        """The latest step, if it gave this output."""
        return self._latest[1] if self._latest is not None and self._latest[0] is output else None


class NativeStep:
    """One step: the tensors that it works on. extra: the MTP block."""

    def __init__(
        self,
        functions: Program,
        model: Transformer,
        state: State,
        extra: ListOf[Words],
        tokens_T: Tensor,
        past: ListOf[int],
        slots: ListOf[int],
    ):
        self._functions, self._model, self._extra = functions, model, extra
        length, config = len(tokens_T) // len(past), model.config
        self._num_tokens = len(tokens_T)
        groups = -(-self._num_tokens // LANES)
        positions = [first + place for first in past for place in range(length)]
        self._numbers = tokens_T, *torch.tensor([positions, [slot for slot in slots for _ in range(length)]])
        self._frequencies = [model.rotary.frequencies(ratio, state.device) for ratio in (0, CSA_RATIO)]
        self._angles = torch.empty(2, groups, config.qk_rope_head_dim, LANES)
        self._streams = torch.empty(groups, config.hc_mult, config.hidden_size, LANES)
        self.logits_TV = torch.empty(self._num_tokens, config.vocab_size)
        pages = state.pages
        self._words = words(
            *(self._num_tokens, state.spare_tokens, pages.pages_per_slot, *self._numbers, pages.table_NP),
            *(*self._frequencies, self._angles, self._streams, self.logits_TV),
        )

    def run(self, ends: Words, blocks: ListOf[Words], listen: Callable[[int], None] | None = None) -> None:
        """From tokens to logits. listen: is told the number of each block when the streams have been through it."""
        self._functions.begin(self._words, ends)
        for number, block in enumerate(blocks):
            self._through(block)
            if listen is not None:
                listen(number)
        self._functions.end(self._words, ends)

    @torch.no_grad()
    def predict_second(self, output: Output, next_T: Tensor) -> Tensor:
        """Hidden vectors of the MTP block behind the step, [T, D]."""
        block = self._model.mtp[0]
        assert isinstance(block, MTPBlock)
        x_TSD = block.enter(output.streams_TSD, self._model.embed(next_T))
        missing = self._streams.shape[0] * LANES - self._num_tokens
        padded_TSD = torch.cat([x_TSD, x_TSD.new_zeros(missing, *x_TSD.shape[1:])])
        self._streams.copy_(padded_TSD.view(-1, LANES, *x_TSD.shape[1:]).permute(0, 2, 3, 1))
        self._through(self._extra[0])
        return block.leave(self.streams_TSD)

    @property
    def streams_TSD(self) -> Tensor:
        """The streams as they are now."""
        return self._streams.permute(0, 3, 1, 2).flatten(0, 1)[: self._num_tokens].contiguous()

    def _through(self, block: Words) -> None:
        if self._functions.through_block(self._words, block):
            raise NonFiniteScoresError("the index scores are not finite: a NaN reached the top-k selection")


def _block_words(block: nn.Module, state: LayerState) -> Words:
    """`struct Block` of step.cpp."""
    assert isinstance(block, Block)
    attn, ffn = block.attn, block.ffn
    index = attn.indexer
    experts, shared = ffn.experts, ffn.shared_experts
    return words(
        *_hyper_connection(block.hc_attn, block.attn_norm),
        *(attn.wq_a.weight, attn.q_norm.weight, attn.wq_b.weight, attn.wkv.weight, attn.kv_norm.weight),
        *(attn.wo_a.weight, attn.wo_b.weight, attn.attn_sink),
        *_compressor(attn.compressor, state.entries),
        *((None, None) if index is None else (index.wq_b.weight, index.weights_proj.weight)),
        *_compressor(None if index is None else index.compressor, state.index),
        *_hyper_connection(block.hc_ffn, block.ffn_norm),
        *(ffn.gate.weight, ffn.gate.bias, ffn.gate.tid2eid),
        *(experts.w1, experts.w2, experts.w3, shared.w1.weight, shared.w2.weight, shared.w3.weight),
        *(_rows(state.window.source), attn.ratio),
    )


def _hyper_connection(connection: HyperConnection, norm: Norm) -> tuple[Tensor, ...]:
    return connection.fn, connection.base, connection.scale, norm.weight


def _compressor(compressor: Compressor | None, state: CompressorState | None) -> tuple[Tensor | None, ...]:
    if compressor is None or state is None:
        return (None,) * 7
    weights = compressor.ape, compressor.wkv.weight, compressor.wgate.weight, compressor.norm.weight
    return *weights, state.values_NRE, state.scores_NRE, _rows(state.entries.source)


def _rows(source: object) -> Tensor:
    assert isinstance(source, Tensor)
    return source
