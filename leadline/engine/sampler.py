"""The sampler: from logits to tokens, for all sequences of a step at once.

A token is drawn with the Gumbel trick: id = argmax(log p + g) with g = -log(-log u) has the distribution p. The noise
of a token comes from its sequence's seed and its position alone. So a sequence says the same whatever else is in the
batch, a preempted one goes on as it would have, and speculation is lossless in the strictest sense: a draft is right
exactly when it is the token that would have been drawn. The draft is drawn with the same noise, which makes agreement
as likely as it can cheaply be made (`propose`).

Drawing only queues work on the device. The host waits when it asks for the tokens (`Drawn.tokens`), and until then the
device may go on with them: what follows is fed from where they lie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from leadline.engine.request import Sampling
from leadline.engine.sequence import Sequence, Token
from leadline.ops.transfer import Arrival, send


class Draw(NamedTuple):
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


@dataclass(frozen=True)
class Drawn:
    """Tokens that have been drawn on the device. ids_N: int64 [N], there. known: ids, and whether the logits were free
    of NaN, int64 [2, N]. reported: FP64 [rows with logprobs, 1 + 2 most], see `_report`."""

    ids_N: Tensor
    draws: ListOf[Draw]
    known: Arrival
    reported: Arrival | None

    def tokens(self) -> list[Token | None]:
        """One token for each row, None for a row that holds NaN. Waits until they are drawn."""
        ids, finite = _lists(self.known.wait())
        tokens = [Token(id_) for id_ in ids]
        if self.reported is not None:
            for row, report in zip(_reporting(self.draws), _lists(self.reported.wait()), strict=True):
                most = len(report) // 2
                alternatives = zip(map(int, report[1 + most :]), report[1 : 1 + most], strict=True)
                top = tuple(alternatives)[: self.draws[row].sampling.logprobs]
                tokens[row] = Token(ids[row], report[0], top)
        return [token if fine else None for token, fine in zip(tokens, finite, strict=True)]


def draw(logits_NV: Tensor, draws: ListOf[Draw]) -> Drawn:
    """One token for each row of FP32 logits [N, V]. The device is not waited for; the logits are not changed, and may
    be overwritten by what is queued behind this."""
    ids_N = _scores(logits_NV, draws).argmax(-1)
    for row, one in enumerate(draws):
        if one.forced is not None:
            ids_N[row] = one.forced
    finite_N = ~logits_NV.isnan().any(-1)
    rows = _reporting(draws)
    reported = Arrival(_report(logits_NV, ids_N, draws, rows)) if rows else None
    return Drawn(ids_N, draws, Arrival(torch.stack([ids_N, finite_N.long()])), reported)


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
    """What the tokens are ranked by: the logits, shaped as the draws ask, with their noise; the logits themselves where
    nobody asks for anything."""
    if all(one.sampling.greedy and not _is_adjusted(one) for one in draws):
        return logits_NV
    scores_NV = logits_NV.clone()
    for row, one in enumerate(draws):
        if _is_adjusted(one):
            _adjust(scores_NV[row], one)
    rows = [row for row, one in enumerate(draws) if one.sampling.truncates]
    if rows:
        rows_X = _on(logits_NV, rows)
        scores_NV[rows_X] = _truncate(_tempered(scores_NV[rows_X], [draws[row].sampling for row in rows]), draws, rows)
    rest = [row for row, one in enumerate(draws) if not one.sampling.truncates and not one.sampling.greedy]
    if rest:
        rest_X = _on(logits_NV, rest)
        scores_NV[rest_X] = _tempered(scores_NV[rest_X], [draws[row].sampling for row in rest])
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


def _is_adjusted(one: Draw) -> bool:
    return one.allowed is not None or one.sampling.penalises or bool(one.sampling.logit_bias)


def _adjust(scores_V: Tensor, one: Draw) -> None:
    """Penalties, bias and grammar, in place."""
    s = one.sampling
    if s.penalises:
        output = one.output or {}
        if s.repetition_penalty != 1.0:
            seen = _on(scores_V, sorted({*one.prompt, *output}))
            found = scores_V[seen]
            scores_V[seen] = torch.where(found > 0, found / s.repetition_penalty, found * s.repetition_penalty)
        if output and (s.presence_penalty or s.frequency_penalty):
            ids = _on(scores_V, list(output))
            counts = _on(scores_V, list(map(float, output.values())))
            scores_V[ids] -= s.presence_penalty + s.frequency_penalty * counts
    if s.logit_bias:
        scores_V[_on(scores_V, list(s.logit_bias))] += _on(scores_V, list(map(float, s.logit_bias.values())))
    if one.allowed is not None:
        scores_V.masked_fill_(~send(one.allowed, scores_V.device), -torch.inf)


def _tempered(scores_NV: Tensor, samplings: ListOf[Sampling]) -> Tensor:
    temperature_N = _on(scores_NV, [float(s.temperature) for s in samplings])
    return torch.log_softmax(scores_NV / temperature_N[:, None], -1)


def _truncate(log_p_NV: Tensor, draws: ListOf[Draw], rows: ListOf[int]) -> Tensor:
    """-inf for the tokens that top-k, top-p or min-p leave out. Equal tokens are kept in the order of their ids."""
    samplings = [draws[row].sampling for row in rows]
    ranked_NV, ids_NV = log_p_NV.sort(dim=-1, descending=True, stable=True)
    p_NV = ranked_NV.exp()
    device, vocabulary = log_p_NV.device, log_p_NV.shape[1]
    top_p_N1 = _on(log_p_NV, [float(s.top_p) for s in samplings])[:, None]
    top_k_N1 = _on(log_p_NV, [s.top_k or vocabulary for s in samplings])[:, None]
    min_p_N1 = _on(log_p_NV, [float(s.min_p) for s in samplings])[:, None]
    dropped_NV = (p_NV.cumsum(-1) - p_NV >= top_p_N1) & (top_p_N1 < 1.0)
    dropped_NV |= torch.arange(vocabulary, device=device) >= top_k_N1
    dropped_NV |= p_NV < min_p_N1 * p_NV[:, :1]
    dropped_NV[:, 0] = False
    return log_p_NV.masked_fill(torch.zeros_like(dropped_NV).scatter_(1, ids_NV, dropped_NV), -torch.inf)


def _reporting(draws: ListOf[Draw]) -> list[int]:
    """The rows whose tokens come with logprobs."""
    return [row for row, one in enumerate(draws) if one.sampling.logprobs is not None]


def _report(logits_NV: Tensor, ids_N: Tensor, draws: ListOf[Draw], rows: ListOf[int]) -> Tensor:
    """The logprobs of some rows, FP64: that of the token, those of the most likely tokens, and the ids of these."""
    rows_X = _on(logits_NV, rows)
    log_p_XV = torch.log_softmax(logits_NV[rows_X], -1)
    own_X1 = log_p_XV.gather(1, ids_N[rows_X][:, None])
    most = min(max(draws[row].sampling.logprobs or 0 for row in rows), log_p_XV.shape[1])
    values, ids = log_p_XV.topk(most, dim=-1) if most else (log_p_XV[:, :0], log_p_XV[:, :0])
    return torch.cat([own_X1.double(), values.double(), ids.double()], dim=1)


def _on(where: Tensor, values: ListOf[int] | ListOf[float]) -> Tensor:
    """Numbers of the host on a tensor's device, int64 or FP32."""
    return send(torch.tensor(values, dtype=torch.float32 if isinstance(values[0], float) else None), where.device)


def _lists(rows: Tensor) -> list[list[Any]]:
    return cast("list[list[Any]]", rows.tolist())  # pyright: ignore[reportUnknownMemberType]
