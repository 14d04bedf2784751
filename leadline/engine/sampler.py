"""The sampler: from logits to tokens, for all sequences of a step at once.

A token is drawn with the Gumbel trick: id = argmax(log p + g) with g = -log(-log u) has the distribution p. The noise
of a token comes from its sequence's seed and its position alone. So a sequence says the same whatever else is in the
batch, a preempted one goes on as it would have, and speculation is lossless in the strictest sense: a draft is right
exactly when it is the token that would have been drawn. The draft is drawn with the same noise, which makes agreement
as likely as it can cheaply be made (`propose`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from leadline.engine.request import Sampling
from leadline.engine.sequence import Sequence, Token


@dataclass(frozen=True)
class Draw:
    """One token to draw.

    position: its place in the sequence. prompt, output: the ids so far, with how often the output holds each; needed by
    penalties only. allowed: bool [V], or None. forced: the token that comes whatever the logits.
    """

    sampling: Sampling
    position: int
    prompt: Iterable[int] = ()
    output: dict[int, int] | None = None
    allowed: Tensor | None = None
    forced: int | None = None


def draw_of(sequence: Sequence, place: int) -> Draw:
    """The draw of a sequence's next token, or of the one `place` behind it, for the case that its drafts up to there
    are right."""
    request, output = sequence.request, None
    if request.sampling.penalises:
        output = dict(sequence.output_counts + Counter(sequence.drafts[:place]))
    return Draw(
        request.sampling,
        len(sequence.tokens) + place,
        request.prompt if request.sampling.penalises else (),
        output,
        request.mask.allowed() if request.mask is not None else None,
        sequence.forced() if place == 0 else None,
    )


def draw(logits_NV: Tensor, draws: ListOf[Draw]) -> list[Token | None]:
    """One token for each row of FP32 logits [N, V], None for a row that holds NaN. The logits are not changed."""
    ids_N = _scores(logits_NV, draws).argmax(-1)
    finite_N = ~logits_NV.isnan().any(-1)
    drawn, finite = _lists(torch.stack([ids_N, finite_N.long()]))  # one wait for the device
    ids = [id_ if one.forced is None else one.forced for id_, one in zip(drawn, draws, strict=True)]
    return [token if fine else None for token, fine in zip(_tokens(ids, logits_NV, draws), finite, strict=True)]


def propose(
    logits_NBV: Tensor,
    draws: ListOf[ListOf[Draw]],
    previous_N: Tensor | None = None,
    bias: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Drafts of B tokens for each of N sequences, from left to right, each drawn as `draw` would draw it: ids [N, B],
    and whether their logits were free of NaN, bool [N, B]. The device is not waited for.

    logits_NBV: FP32. draws: B of each sequence. bias: what the token before each draft adds to its logits, FP32 [N, V];
    previous_N: the token before the first.
    """
    ids: list[Tensor] = []
    finite: list[Tensor] = []
    for place in range(logits_NBV.shape[1]):
        logits_NV = logits_NBV[:, place]
        if bias is not None and previous_N is not None:
            logits_NV = logits_NV + bias(previous_N)
        previous_N = _scores(logits_NV, [row[place] for row in draws]).argmax(-1)
        ids.append(previous_N)
        finite.append(~logits_NV.isnan().any(-1))
    return torch.stack(ids, dim=1), torch.stack(finite, dim=1)


def _scores(logits_NV: Tensor, draws: ListOf[Draw]) -> Tensor:
    """What the tokens are ranked by: the logits, shaped as the draws ask, with their noise."""
    scores_NV = logits_NV.clone()
    for row, one in enumerate(draws):
        _adjust(scores_NV[row], one)
    rows = [row for row, one in enumerate(draws) if one.sampling.truncates]
    if rows:
        scores_NV[rows] = _truncate(_tempered(scores_NV[rows], [draws[row].sampling for row in rows]), draws, rows)
    rest = [row for row, one in enumerate(draws) if not one.sampling.truncates and not one.sampling.greedy]
    if rest:
        scores_NV[rest] = _tempered(scores_NV[rest], [draws[row].sampling for row in rest])
    for row, one in enumerate(draws):
        if not one.sampling.greedy:
            scores_NV[row] += gumbel(one.sampling.seed, one.position, scores_NV.shape[1], scores_NV.device)
    return scores_NV


def gumbel(seed: int, position: int, size: int, device: torch.device) -> Tensor:
    """FP32 noise [size] of one token."""
    # Generators of neighbouring seeds are not independent in every implementation; the multiplication spreads them.
    mixed = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) % 2**63
    generator = torch.Generator(device).manual_seed(mixed)
    return torch.empty(size, device=device).exponential_(generator=generator).clamp_min_(1e-30).log_().neg_()


def _adjust(scores_V: Tensor, one: Draw) -> None:
    """Penalties, bias and grammar, in place."""
    s = one.sampling
    if s.penalises:
        output = one.output or {}
        if s.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*one.prompt, *output}), device=scores_V.device)
            found = scores_V[seen]
            scores_V[seen] = torch.where(found > 0, found / s.repetition_penalty, found * s.repetition_penalty)
        if output and (s.presence_penalty or s.frequency_penalty):
            ids = torch.tensor(list(output), device=scores_V.device)
            counts = torch.tensor(list(output.values()), dtype=torch.float32, device=scores_V.device)
            scores_V[ids] -= s.presence_penalty + s.frequency_penalty * counts
    if s.logit_bias:
        ids = torch.tensor(list(s.logit_bias), device=scores_V.device)
        scores_V[ids] += torch.tensor(list(s.logit_bias.values()), dtype=torch.float32, device=scores_V.device)
    if one.allowed is not None:
        scores_V.masked_fill_(~one.allowed.to(scores_V.device), -torch.inf)


def _tempered(scores_NV: Tensor, samplings: ListOf[Sampling]) -> Tensor:
    temperature_N1 = torch.tensor([[s.temperature] for s in samplings], device=scores_NV.device)
    return torch.log_softmax(scores_NV / temperature_N1, -1)


def _truncate(log_p_NV: Tensor, draws: ListOf[Draw], rows: ListOf[int]) -> Tensor:
    """-inf for the tokens that top-k, top-p or min-p leave out. Equal tokens are kept in the order of their ids."""
    samplings = [draws[row].sampling for row in rows]
    ranked_NV, ids_NV = log_p_NV.sort(dim=-1, descending=True, stable=True)
    p_NV = ranked_NV.exp()
    device, vocabulary = log_p_NV.device, log_p_NV.shape[1]
    top_p_N1 = torch.tensor([[s.top_p] for s in samplings], device=device)
    top_k_N1 = torch.tensor([[s.top_k or vocabulary] for s in samplings], device=device)
    min_p_N1 = torch.tensor([[s.min_p] for s in samplings], device=device)
    dropped_NV = (p_NV.cumsum(-1) - p_NV >= top_p_N1) & (top_p_N1 < 1.0)
    dropped_NV |= torch.arange(vocabulary, device=device) >= top_k_N1
    dropped_NV |= p_NV < min_p_N1 * p_NV[:, :1]
    dropped_NV[:, 0] = False
    return log_p_NV.masked_fill(torch.zeros_like(dropped_NV).scatter_(1, ids_NV, dropped_NV), -torch.inf)


def _lists(rows: Tensor) -> list[list[int]]:
    return cast("list[list[int]]", rows.tolist())  # pyright: ignore[reportUnknownMemberType]


def _tokens(ids: list[int], logits_NV: Tensor, draws: ListOf[Draw]) -> list[Token]:
    tokens = [Token(id_) for id_ in ids]
    rows = [row for row, one in enumerate(draws) if one.sampling.logprobs is not None]
    if not rows:
        return tokens
    log_p_NV = torch.log_softmax(logits_NV[rows], -1)
    most = min(max(draws[row].sampling.logprobs or 0 for row in rows), log_p_NV.shape[1])
    values, indices = log_p_NV.topk(most, dim=-1) if most else (log_p_NV[:, :0], log_p_NV[:, :0].long())
    for at, row in enumerate(rows):
        count = draws[row].sampling.logprobs or 0
        top = tuple((int(indices[at, place]), float(values[at, place])) for place in range(count))
        tokens[row] = Token(ids[row], float(log_p_NV[at, ids[row]]), top)
    return tokens
