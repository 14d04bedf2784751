"""Random models whose every weight matters, and where their choices are too close to call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from leadline.model import indexer
from leadline.model.config import ModelConfig
from leadline.model.router import Gate, Route
from leadline.model.segment import Segment
from leadline.model.state import State
from leadline.model.transformer import Transformer


@pytest.fixture(autouse=True)
def _poison(poisoned_memory: None) -> None:
    """A weight that nobody loaded is NaN."""


def fill(model: Transformer, seed: int) -> Transformer:
    """Random weights of a size that keeps activations near 1. No norm is 1, no sink, bias or gate is 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("tid2eid"):
            num_experts = model.config.n_routed_experts
            order = torch.rand(len(tensor), num_experts, generator=generator).argsort(1)
            tensor.copy_(order[:, : tensor.shape[1]])
            continue
        values = torch.randn(tensor.shape, generator=generator)
        if "norm." in name or name.endswith("norm"):
            values = 1 + 0.2 * values
        elif name.endswith("scale"):
            values = 0.5 + values.abs()
        elif name.endswith("gate.bias"):
            values = 0.1 * values
        elif not name.endswith(("base", "ape", "attn_sink", "embed.weight")):
            values = values * tensor.shape[-1] ** -0.5
        tensor.copy_(values)
    return model


@pytest.fixture(scope="session")
def random_model() -> Callable[[ModelConfig, int], Transformer]:
    """random_model(config, seed): a model with `fill`ed weights."""
    return lambda config, seed: fill(Transformer(config), seed)


@pytest.fixture(scope="session")
def logits_of() -> Callable[..., Tensor]:
    """logits_of(model, segment, state): FP32 logits of all new tokens."""

    @torch.no_grad()
    def logits(model: Transformer, segment: Segment, state: State | None = None) -> Tensor:
        return model.logits(model.hidden(model(segment, state).streams_TSD))

    return logits


def _gap(ranked: Tensor, kept: int) -> float:
    """Distance between the last of `kept` values and the first one left out, relative to the largest."""
    if len(ranked) <= kept:
        return float("inf")
    return float((ranked[kept - 1] - ranked[kept]) / ranked.abs().max())


@contextmanager
def watching_choices(model: Transformer, gaps: list[tuple[int, float]]) -> Iterator[None]:
    """While inside, add (row of the segment, gap) for every choice that an indexer or a router makes."""
    pick = indexer.pick_entries

    def watched_pick(q: Tensor, weight: Tensor, keys: Tensor, reach: Any, k: int) -> Tensor:
        products = torch.relu(torch.einsum("tji,ci->tjc", q, keys))
        scores = torch.einsum("tj,tjc->tc", weight, products)
        for row, (first, visible) in enumerate(
            zip(reach.first_entry_T.tolist(), reach.visible_T.tolist(), strict=True)
        ):
            gaps.append((row, _gap(scores[row, first : first + visible].sort(descending=True).values, k)))
        return pick(q, weight, keys, reach, k)

    def watch_gate(gate: torch.nn.Module, _inputs: Any, route: Route) -> None:
        assert isinstance(gate, Gate)
        if gate.bias is not None:
            ranked = (route.scores_TE + gate.bias).sort(dim=-1, descending=True).values
            gaps.extend((row, _gap(values, gate.choices)) for row, values in enumerate(ranked))

    hooks = [module.register_forward_hook(watch_gate) for module in model.modules() if isinstance(module, Gate)]
    try:
        with mock.patch.object(indexer, "pick_entries", watched_pick):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture(scope="session")
def closest_choices() -> Callable[..., Tensor]:
    """closest_choices(model, tokens, with_mtp=False): per token, the smallest relative gap between what an indexer or
    router of any layer chose and what it left out, [T].

    The choice is discontinuous: where the gap is near the rounding error of FP32, two exact implementations may choose
    differently and then rightly differ in everything that follows. Tests that compare numbers need to know.
    """

    @torch.no_grad()
    def closest(model: Transformer, tokens: Tensor, with_mtp: bool = False) -> Tensor:
        gaps: list[tuple[int, float]] = []
        with watching_choices(model, gaps):
            output = model(Segment.of(tokens))
            if with_mtp:
                model.predict_second(output, tokens.roll(-1))
        smallest = torch.full((len(tokens),), float("inf"))
        for row, gap in gaps:
            smallest[row] = min(float(smallest[row]), gap)
        return smallest

    return closest
