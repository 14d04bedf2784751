"""The model against numbers of the published code: every way of feeding it, every layer, the MTP block."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from leadline.model.segment import Segment
from leadline.model.state import State
from leadline.model.transformer import Transformer
from leadline.weights.load import load_checkpoint

FOLDER = Path(__file__).parents[1] / "golden" / "exact"
TOLERANCE = 5e-5
PROMPT = 300
STREAMS_EVERY = 7


@dataclass(frozen=True)
class Golden:
    model: Transformer
    stored: dict[str, Tensor]

    @property
    def tokens(self) -> Tensor:
        return self.stored["tokens"][0].long()

    def logits(self, start: int, stop: int, state: State | None) -> Tensor:
        """Logits of tokens[start:stop] behind what the state holds."""
        segment = Segment.of(self.tokens[start:stop], past=[start])
        return self.model.logits(self.model.hidden(self.model(segment, state).streams_TSD))

    def mtp_logits(self, start: int, stop: int, state: State | None) -> Tensor:
        output = self.model(Segment.of(self.tokens[start:stop], past=[start]), state)
        return self.model.logits(self.model.predict_second(output, self.tokens[start + 1 : stop + 1], state)[0])


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden(load_checkpoint(FOLDER, dtype=torch.float32), load_file(FOLDER / "io.safetensors"))


def assert_equal(found: Tensor, stored: Tensor) -> None:
    torch.testing.assert_close(found, stored, rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("with_state", [False, True], ids=["no state", "state"])
def test_prefill_in_one_piece(golden: Golden, with_state: bool) -> None:
    state = State(golden.model.config, 1) if with_state else None
    assert_equal(golden.logits(0, PROMPT, state), golden.stored["logits_prefill"][0])


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3, 4, 5, 64, 127, 128, 129])
def test_prefill_in_chunks(golden: Golden, size: int) -> None:
    state = State(golden.model.config, 1)
    parts = [golden.logits(start, min(start + size, PROMPT), state) for start in range(0, PROMPT, size)]
    assert_equal(torch.cat(parts), golden.stored["logits_prefill"][0])


@torch.no_grad()
def test_decode(golden: Golden) -> None:
    state = State(golden.model.config, 1)
    golden.logits(0, PROMPT, state)
    parts = [golden.logits(place, place + 1, state) for place in range(PROMPT, len(golden.tokens))]
    assert_equal(torch.cat(parts), golden.stored["logits_decode"][0])


@torch.no_grad()
def test_decode_beside_another_sequence(golden: Golden) -> None:
    """Two slots in one segment: the golden sequence, and the same tokens a hundred places further back."""
    state, late = State(golden.model.config, 2), 100
    golden.model(Segment.of(golden.tokens[:PROMPT], golden.tokens[: PROMPT - late], slots=[1, 0]), state)
    for step, stored in enumerate(golden.stored["logits_decode"][0]):
        places = [PROMPT + step, PROMPT - late + step]
        segment = Segment.of(*(golden.tokens[place : place + 1] for place in places), past=places, slots=[1, 0])
        logits = golden.model.logits(golden.model.hidden(golden.model(segment, state).streams_TSD))
        assert_equal(logits[0], stored)
        assert_equal(logits[1], golden.stored["logits_prefill"][0, places[1]])


@torch.no_grad()
@pytest.mark.parametrize("size", [3, 50, 299])
def test_mtp(golden: Golden, size: int) -> None:
    state = State(golden.model.config, 1) if size < PROMPT - 1 else None
    parts = [golden.mtp_logits(start, min(start + size, PROMPT - 1), state) for start in range(0, PROMPT - 1, size)]
    assert_equal(torch.cat(parts), golden.stored["mtp_logits"][0])


@torch.no_grad()
def test_streams_after_every_layer(golden: Golden) -> None:
    found: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _b, _i, output: found.append(output[0])) for block in golden.model.layers
    ]
    golden.model(Segment.of(golden.tokens[:PROMPT]))
    for hook in hooks:
        hook.remove()
    assert len(found) == golden.model.config.num_hidden_layers
    for layer, streams in enumerate(found):
        assert_equal(streams[::STREAMS_EVERY], golden.stored[f"streams_after_layer_{layer}"])
