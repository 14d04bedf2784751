"""Drawing tokens: the distribution, what shapes it, and that nobody else in the batch matters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from leadline.engine.request import RequestError, Sampling
from leadline.engine.sampler import Draw, draw, propose
from leadline.engine.sequence import Token

LOGITS_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def drawn(logits_NV: Tensor, draws: list[Draw]) -> list[Token]:
    tokens = draw(logits_NV, draws).tokens()
    assert None not in tokens
    return [token for token in tokens if token is not None]


def ids(logits_V: Tensor, sampling: Sampling, count: int = 400, **fields: object) -> list[int]:
    return [drawn(logits_V[None], [Draw(sampling, position, **fields)])[0].id for position in range(count)]  # pyright: ignore[reportArgumentType]


def test_tokens_come_as_often_as_their_probability_says() -> None:
    drawn = torch.tensor(ids(LOGITS_V, Sampling(seed=3), 4000))
    share_V = torch.bincount(drawn, minlength=4) / len(drawn)
    wanted_V = LOGITS_V.exp()
    assert ((share_V - wanted_V).abs() < 4 * (wanted_V * (1 - wanted_V) / len(drawn)).sqrt()).all()


def test_temperature_sharpens_and_zero_takes_the_best() -> None:
    assert set(ids(LOGITS_V, Sampling(temperature=0.0), 20)) == {0}
    cold = ids(LOGITS_V, Sampling(temperature=0.25))
    assert cold.count(0) > 300


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_p=0.79), {0, 1}),
        (Sampling(top_p=0.81), {0, 1, 2}),
        (Sampling(top_k=1), {0}),
        (Sampling(top_k=3), {0, 1, 2}),
        (Sampling(min_p=0.29), {0, 1, 2}),
        (Sampling(min_p=0.31), {0, 1}),
        (Sampling(top_p=0.99, top_k=3, min_p=0.5), {0, 1}),
        (Sampling(top_p=1e-6), {0}),
    ],
)
def test_truncation_keeps_exactly_the_likely_tokens(sampling: Sampling, kept: set[int]) -> None:
    assert set(ids(LOGITS_V, sampling, 800)) == kept


def test_penalties_and_bias() -> None:
    greedy = Sampling(temperature=0.0)
    logits_V = torch.tensor([2.0, 1.5, -1.0, -1.2])

    def best(sampling: Sampling, output: dict[int, int], prompt: tuple[int, ...] = ()) -> int:
        return drawn(logits_V[None], [Draw(sampling, 0, prompt, output)])[0].id

    assert best(greedy, {0: 9}) == 0
    assert best(Sampling(temperature=0.0, presence_penalty=0.6), {0: 1}) == 1
    assert best(Sampling(temperature=0.0, presence_penalty=0.4), {0: 9}) == 0
    assert best(Sampling(temperature=0.0, frequency_penalty=0.1), {0: 6}) == 1
    assert best(Sampling(temperature=0.0, frequency_penalty=0.1), {0: 4}) == 0
    assert best(Sampling(temperature=0.0, repetition_penalty=1.5), {}, (0,)) == 1  # of the prompt, too
    assert best(Sampling(temperature=0.0, logit_bias={3: 4.0}), {}) == 3
    # A negative logit becomes smaller, not larger.
    negative = drawn(torch.tensor([[-1.0, -1.2]]), [Draw(Sampling(temperature=0.0, repetition_penalty=1.5), 0, (0,))])
    assert negative[0].id == 1


def test_a_grammar_and_a_forced_token() -> None:
    allowed_V = torch.tensor([False, False, True, False])
    assert set(ids(LOGITS_V, Sampling(temperature=3.0), 50, allowed=allowed_V)) == {2}
    assert set(ids(LOGITS_V, Sampling(), 5, forced=3)) == {3}


def test_a_row_is_drawn_the_same_in_every_batch() -> None:
    torch.manual_seed(0)
    logits_NV = torch.randn(6, 50)
    kinds = [Sampling(seed=1), Sampling(temperature=0.0), Sampling(top_p=0.5, seed=2), Sampling(min_p=0.2, seed=1)]
    draws = [Draw(kinds[row % 4], position=row // 4) for row in range(6)]
    before_NV = logits_NV.clone()
    together = draw(logits_NV, draws).tokens()
    assert together == [draw(logits_NV[row : row + 1], [draws[row]]).tokens()[0] for row in range(6)]
    assert together[::-1] == draw(logits_NV.flip(0), draws[::-1]).tokens()
    assert torch.equal(logits_NV, before_NV)


def test_noise_depends_on_seed_and_position() -> None:
    flat_V = torch.zeros(1000)
    one, other = Sampling(seed=1), Sampling(seed=2)
    assert ids(flat_V, one, 20) == ids(flat_V, one, 20)
    assert ids(flat_V, one, 20) != ids(flat_V, other, 20)
    assert len(set(ids(flat_V, one, 50))) > 40


def test_logprobs_are_those_of_the_model_itself() -> None:
    sampling = Sampling(temperature=0.0, logit_bias={3: 100.0}, logprobs=2)
    plain = Sampling(temperature=0.0)
    token, other = drawn(torch.stack([LOGITS_V, LOGITS_V]), [Draw(sampling, 0), Draw(plain, 0)])
    assert token.id == 3
    assert token.logprob == pytest.approx(math.log(0.05), abs=1e-6)
    assert token.top is not None
    assert [id_ for id_, _ in token.top] == [0, 1]
    assert [value for _, value in token.top] == pytest.approx([math.log(0.5), math.log(0.3)], abs=1e-6)
    assert other.logprob is None


def test_nan_costs_its_own_row_only() -> None:
    logits_NV = torch.zeros(3, 4)
    logits_NV[0, 3] = logits_NV[2, 1] = 9.0
    logits_NV[1, 2] = math.nan
    greedy = Sampling(temperature=0.0)
    assert draw(logits_NV, [Draw(greedy, 0)] * 3).tokens() == [Token(3), None, Token(1)]


def test_drafts_are_drawn_as_tokens_are_from_left_to_right() -> None:
    """With penalties, truncation and noise: what `propose` says of logits is what `draw` says of them, one by one."""
    logits_NBV, bias_VV = torch.randn(3, 4, 50), torch.randn(50, 50)
    samplings = [Sampling(temperature=0.0), Sampling(seed=4, top_p=0.8), Sampling(seed=5, presence_penalty=2.0)]
    draws = [[Draw(s, 100 + place, (), {1: 2, 7: 1}) for place in range(4)] for s in samplings]
    previous_N = torch.tensor([3, 30, 9])
    ids_NB, finite_NB = propose(logits_NBV, draws, previous_N, lambda previous: bias_VV[previous])
    assert finite_NB.all()
    for n in range(3):
        previous = int(previous_N[n])
        for place in range(4):
            previous = drawn(logits_NBV[n, place, None] + bias_VV[previous], [draws[n][place]])[0].id
            assert int(ids_NB[n, place]) == previous


def test_drafts_say_where_their_logits_are_damaged() -> None:
    logits_NBV = torch.zeros(2, 3, 8)
    logits_NBV[1, 1, 4] = math.nan
    _, finite_NB = propose(logits_NBV, [[Draw(Sampling(), place) for place in range(3)]] * 2)
    assert finite_NB.tolist() == [[True, True, True], [True, False, True]]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"logprobs": 21},
    ],
)
def test_bad_sampling_is_refused_with_the_name_of_the_field(fields: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=next(iter(fields))):
        Sampling(**fields)  # pyright: ignore[reportArgumentType]
