"""Hyper-connections: coefficients and mixing against their formulas, number by number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leadline.model.config import TINY
from leadline.model.hyper_connections import HyperConnection, StreamHead, spread
from leadline.model.linear import Norm
from leadline.ops.rms_norm import rms_norm

CONFIG = TINY.replace(hidden_size=6, hc_mult=4)
S, D = CONFIG.hc_mult, CONFIG.hidden_size


def random_connection() -> HyperConnection:
    connection = HyperConnection(CONFIG)
    for parameter in connection.parameters():
        torch.nn.init.normal_(parameter)
    return connection


def coefficients(connection: HyperConnection, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(pre, post, comb) of one token: the report's formulas in float64 with the published epsilons."""
    flat = streams.double().flatten()
    mixes = connection.fn.double() @ flat / (flat.square().mean() + CONFIG.rms_norm_eps).sqrt()
    base, scale = connection.base.double(), connection.scale.double()
    pre = torch.sigmoid(mixes[:S] * scale[0] + base[:S]) + 1e-6
    post = 2 * torch.sigmoid(mixes[S : 2 * S] * scale[1] + base[S : 2 * S])
    comb = torch.softmax((mixes[2 * S :] * scale[2] + base[2 * S :]).view(S, S), dim=1) + 1e-6
    comb = comb / (comb.sum(0, keepdim=True) + 1e-6)
    for _ in range(CONFIG.hc_sinkhorn_iters - 1):
        comb = comb / (comb.sum(1, keepdim=True) + 1e-6)
        comb = comb / (comb.sum(0, keepdim=True) + 1e-6)
    return pre, post, comb


@pytest.mark.parametrize("tokens", [1, 3, 128])
def test_mix_in_and_out(tokens: int) -> None:
    connection = random_connection()
    x, out = torch.randn(tokens, S, D), torch.randn(tokens, D)
    streams, y, post, comb = connection.mix_in(x)
    mixed = connection.mix_out(x, out, post, comb)
    assert torch.equal(streams, x)
    for t in range(tokens):
        pre_t, post_t, comb_t = coefficients(connection, x[t])
        torch.testing.assert_close(
            y[t].double(), sum(pre_t[j] * x[t, j].double() for j in range(S)), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(post[t].double(), post_t, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(comb[t].double(), comb_t, rtol=1e-3, atol=1e-4)
        for k in range(S):
            # the sum runs over the first index of comb
            expected = post_t[k] * out[t].double() + sum(comb_t[j, k] * x[t, j].double() for j in range(S))
            torch.testing.assert_close(mixed[t, k].double(), expected, rtol=1e-3, atol=1e-3)


def test_mix_in_with_a_norm() -> None:
    connection, norm, x = random_connection(), Norm(D), torch.randn(5, S, D)
    torch.nn.init.normal_(norm.weight)
    (_, y, *coefficients), (_, normed, *others) = connection.mix_in(x), connection.mix_in(x, norm)
    assert torch.equal(normed, rms_norm(y, norm.weight, CONFIG.rms_norm_eps))
    assert all(torch.equal(one, other) for one, other in zip(coefficients, others, strict=True))


def test_neutral_parameters() -> None:
    """base = fn = 0, whatever the gates: pre 0.5 + 1e-6, post 1, comb 1/S."""
    connection = random_connection()
    with torch.no_grad():
        connection.fn.zero_()
        connection.base.zero_()
    x = torch.randn(5, S, D)
    _, y, post, comb = connection.mix_in(x)
    torch.testing.assert_close(y, (0.5 + 1e-6) * x.sum(1))
    torch.testing.assert_close(post, torch.ones(5, S))
    torch.testing.assert_close(comb, torch.full((5, S, S), 1 / S), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [0.1, 1.0, 100.0])
def test_ranges(size: float) -> None:
    """pre in (0, 1], post in [0, 2], columns of comb sum to 1: mixing neither grows nor shrinks the streams' sum."""
    connection = random_connection()
    with torch.no_grad():
        connection.scale.mul_(size)
    x = torch.randn(300, S, D)
    _, _, post, comb = connection.mix_in(x)
    assert (post >= 0).all()
    assert (post <= 2).all()
    torch.testing.assert_close(comb.sum(1), torch.ones(300, S), rtol=0, atol=1e-5)
    constant = torch.ones(300, S, D)
    mixed = connection.mix_out(constant, torch.zeros(300, D), post, comb)
    torch.testing.assert_close(mixed, constant, rtol=0, atol=1e-4)


def test_the_scale_of_the_streams_does_not_change_the_coefficients() -> None:
    connection, x = random_connection(), torch.randn(9, S, D)
    (_, _, post, comb), (_, _, post_large, comb_large) = connection.mix_in(x), connection.mix_in(1000 * x)
    torch.testing.assert_close(post, post_large, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(comb, comb_large, rtol=1e-4, atol=1e-4)


def test_head_and_spread() -> None:
    head = StreamHead(CONFIG)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(7, S, D)
    flat = x.double().flatten(1)
    mixes = flat @ head.fn.double().T / (flat.square().mean(1, keepdim=True) + CONFIG.rms_norm_eps).sqrt()
    pre = torch.sigmoid(mixes * head.scale.double() + head.base.double()) + 1e-6
    torch.testing.assert_close(head(x).double(), (pre[..., None] * x.double()).sum(1), rtol=1e-4, atol=1e-4)
    embedding = torch.randn(3, D)
    assert torch.equal(spread(embedding, S), torch.stack([embedding] * S, dim=1))


def test_low_precision_streams_keep_float32_coefficients() -> None:
    connection, x = random_connection(), torch.randn(20, S, D).bfloat16()
    _, y, post, comb = connection.mix_in(x)
    assert (y.dtype, post.dtype, comb.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    _, _, post_wide, comb_wide = connection.mix_in(x.float())
    torch.testing.assert_close(post, post_wide)
    torch.testing.assert_close(comb, comb_wide)
    assert connection.mix_out(x, y, post, comb).dtype == torch.bfloat16
