"""The reference of the hyper-connections: gradients, layouts, and what is kept for the backward.

Values are compared with the report's formulas in tests/model/test_hyper_connections.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leadline.ops.hyper_connection import collapse, mix_head, mix_in, mix_out, projection
from leadline.ops.sinkhorn import sinkhorn

EPS = 1e-6


def mix_in_inputs(tokens: int, streams: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rows = (2 + streams) * streams
    shapes = (tokens, streams, width), (rows, streams * width), (rows,), (3,)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def mix_out_inputs(tokens: int, streams: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (tokens, streams, width), (tokens, width), (tokens, streams), (tokens, streams, streams)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def mix_head_inputs(tokens: int, streams: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (tokens, streams, width), (streams, streams * width), (streams,), (1,)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def into(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return mix_in(x, fn, base, scale, 4, EPS, EPS)


def head(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> Tensor:
    return mix_head(x, fn, base, scale, EPS, EPS)


OPS = [
    (into, mix_in_inputs),
    (mix_out, mix_out_inputs),
    (head, mix_head_inputs),
]


def by_autograd(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same written so that autograd finds the gradients."""
    s = x.shape[1]
    mixes = projection(x, fn, EPS)
    gates = torch.cat([scale[0].expand(s), scale[1].expand(s), scale[2].expand(s * s)])
    pre, post, comb = (mixes * gates + base).split([s, s, s * s], dim=-1)
    comb = sinkhorn(comb.unflatten(-1, (s, s)), 4, EPS)
    return x * 1, collapse(x, torch.sigmoid(pre) + EPS), 2 * torch.sigmoid(post), comb


@pytest.mark.parametrize("shape", [(1, 4, 3), (5, 4, 7), (3, 1, 2), (2, 3, 5)], ids=str)
def test_gradcheck(shape: tuple[int, int, int]) -> None:
    for op, make in OPS:
        inputs = [x.requires_grad_() for x in make(*shape, torch.float64)]
        assert torch.autograd.gradcheck(op, inputs)


@pytest.mark.parametrize("tokens", [0, 1, 130])
def test_mix_in_against_autograd(tokens: int) -> None:
    inputs = [x.requires_grad_() for x in mix_in_inputs(tokens, 4, 16)]
    found, wanted = into(*inputs), by_autograd(*inputs)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)
    gradients = [torch.randn_like(y) for y in found]
    ours, theirs = (torch.autograd.grad(results, inputs, gradients) for results in (found, wanted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_any_layout_in(scattered: Callable[[Tensor], Tensor]) -> None:
    for op, make in OPS:
        inputs, results = make(6, 4, 5), []
        for layout in (torch.clone, scattered):
            leaves = [layout(x).requires_grad_() for x in inputs]
            found = op(*leaves)
            outputs = [found] if isinstance(found, Tensor) else list(found)
            results.append([*outputs, *torch.autograd.grad(outputs, leaves, [y.detach() for y in outputs])])
        for plain, strided in zip(*results, strict=True):
            torch.testing.assert_close(plain, strided, rtol=1e-5, atol=1e-5)


def test_low_precision_streams_are_never_kept_in_float32() -> None:
    x, *parameters = mix_in_inputs(9, 4, 64)
    x = x.bfloat16().requires_grad_()
    streams, y, post, comb = into(x, *parameters)
    assert torch.equal(streams, x)
    mixed = mix_out(x, y, post, comb)
    for output in (y, mixed):
        assert output.dtype == torch.bfloat16
        assert output.grad_fn is not None
        for saved in output.grad_fn.saved_tensors:  # pyright: ignore[reportAttributeAccessIssue]
            assert saved.dtype == torch.bfloat16 or saved.numel() < x.numel() or saved is parameters[0]
    assert (post.dtype, comb.dtype) == (torch.float32, torch.float32)


def test_mix_in_keeps_little_beside_its_inputs() -> None:
    x, *parameters = mix_in_inputs(50, 4, 64)
    _, y, _, _ = into(x.requires_grad_(), *parameters)
    assert y.grad_fn is not None
    saved = y.grad_fn.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
    own = {tensor.data_ptr() for tensor in (x, *parameters)}
    assert sum(tensor.numel() for tensor in saved if tensor.data_ptr() not in own) == 50 * (24 + 1)
