"""The hyper-connection kernels against the reference: interpreted in float32, compiled in bfloat16 and float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from leadline.ops.dispatch import implementation
from leadline.ops.hyper_connection import mix_head, mix_in, mix_in_norm, mix_out
from leadline.ops.rehearsal import rehearsal
from leadline.ops.rms_norm import rms_norm
from leadline.recipes.bench_ops.gate import results

# tokens, streams, width
SHAPES = [(1, 4, 6), (7, 4, 32), (19, 4, 4), (5, 3, 17), (3, 1, 8), (2, 2, 1030)]
# Each way that a number of tokens chooses, and few widths, since each width is compiled anew.
GPU_SHAPES = {
    torch.bfloat16: [(1, 4, 4096), (3, 4, 7168), (64, 4, 4096), (127, 4, 4096), (4001, 4, 4096), (300, 4, 384)],
    torch.float32: [(2, 4, 4096), (65, 4, 4096), (300, 4, 384)],
}
TOLERANCES = {torch.bfloat16: 4e-3, torch.float32: 1e-5}
GPU_CASES = [(shape, dtype) for dtype, shapes in GPU_SHAPES.items() for shape in shapes]
STEP_TOKENS = [1, 5, 16, 17, 64]


def mix_in_inputs(tokens: int, streams: int, width: int, device: str = "cpu") -> list[Tensor]:
    rows = (2 + streams) * streams
    x = torch.randn(tokens, streams, width, device=device)
    fn = torch.randn(rows, streams * width, device=device) * (streams * width) ** -0.5
    return [x, fn, torch.randn(rows, device=device), 1 + 0.3 * torch.randn(3, device=device)]


def mix_out_inputs(tokens: int, streams: int, width: int, device: str = "cpu") -> list[Tensor]:
    x, out = torch.randn(tokens, streams, width, device=device), torch.randn(tokens, width, device=device)
    return [x, out, torch.rand(tokens, streams, device=device), torch.rand(tokens, streams, streams, device=device)]


def mix_head_inputs(tokens: int, streams: int, width: int, device: str = "cpu") -> list[Tensor]:
    x, fn, base, scale = mix_in_inputs(tokens, streams, width, device)
    return [x, fn[:streams], base[:streams], scale[:1]]


def mix_in_norm_inputs(tokens: int, streams: int, width: int, device: str = "cpu") -> list[Tensor]:
    return [*mix_in_inputs(tokens, streams, width, device), torch.randn(width, device=device)]


def into(rounds: int = 20) -> Callable[..., tuple[Tensor, ...]]:
    return lambda x, fn, base, scale: mix_in(x, fn, base, scale, rounds, 1e-6, 1e-6)


def into_norm(rounds: int = 20, recorded: bool = False) -> Callable[..., tuple[Tensor, ...]]:
    """With a norm; in one pass, unless gradients are recorded."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        x, fn, base, scale, weight = inputs if recorded else [x.detach() for x in inputs]
        return mix_in_norm(x, fn, base, scale, weight, rounds, 1e-6, 1e-6, 1e-6)

    return run


def head(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> Tensor:
    return mix_head(x, fn, base, scale, 1e-6, 1e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mix_in_interpreted(shape: tuple[int, int, int], against_reference: Callable[..., None]) -> None:
    against_reference(into(5), mix_in_inputs(*shape), 1e-5)


@pytest.mark.interpret
@pytest.mark.parametrize("rounds", [1, 2, 20])
def test_rounds(rounds: int, against_reference: Callable[..., None]) -> None:
    against_reference(into(rounds), mix_in_inputs(3, 4, 8), 1e-5)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from leadline.ops.hyper_connection import kernel

    monkeypatch.setattr(kernel, "SLICE", 64)
    monkeypatch.setattr(kernel, "TOKENS_PER_SUM", 16)
    monkeypatch.setattr(kernel, "TOKENS_PER_GATE_SUM", 8)
    monkeypatch.setattr(kernel, "TOKENS_PER_COEFFICIENTS", 4)
    monkeypatch.setattr(kernel, "BLOCK_D", 32)
    monkeypatch.setattr(kernel, "SLICES_TOGETHER", 2)


@pytest.mark.interpret
@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("very_many", [1, 10**6])
def test_several_slices_and_sums(
    very_many: int, against_reference: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from leadline.ops.hyper_connection import kernel

    monkeypatch.setattr(kernel, "VERY_MANY_TOKENS", very_many)
    against_reference(into(2), mix_in_inputs(9, 4, 40), 1e-5)
    against_reference(head, mix_head_inputs(9, 4, 40), 1e-5)


@pytest.mark.interpret
@pytest.mark.parametrize("tokens", [1, 4, 5, 9])
@pytest.mark.parametrize(("step", "few"), [(0, 0), (0, 64), (4, 4), (16, 64)])
@pytest.mark.usefixtures("small_pieces")
def test_few_tokens(
    tokens: int, step: int, few: int, against_reference: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without the ways that are meant for a step's few tokens."""
    from leadline.ops.hyper_connection import kernel

    monkeypatch.setattr(kernel, "TOKENS_OF_A_STEP", step)
    monkeypatch.setattr(kernel, "FEW_TOKENS", few)
    against_reference(into(3), mix_in_inputs(tokens, 4, 40), 2e-5)
    against_reference(head, mix_head_inputs(tokens, 4, 40), 2e-5)
    against_reference(into_norm(3), mix_in_norm_inputs(tokens, 4, 40), 2e-5)


@pytest.mark.interpret
@pytest.mark.parametrize("shape", [*SHAPES, (0, 4, 8), (70, 4, 8)], ids=str)
def test_mix_in_norm_interpreted(shape: tuple[int, int, int], against_reference: Callable[..., None]) -> None:
    inputs = mix_in_norm_inputs(*shape)
    against_reference(into_norm(5), inputs, 1e-5)
    against_reference(into_norm(5, recorded=True), inputs, 2e-5)


@pytest.mark.interpret
@pytest.mark.usefixtures("small_pieces")
def test_slices_add_up_alike_in_one_program_and_in_many(monkeypatch: pytest.MonkeyPatch) -> None:
    from leadline.ops.hyper_connection import kernel

    monkeypatch.setattr(kernel, "TOKENS_OF_A_STEP", 0)
    results = []
    for very_many in (1, 10**6):
        monkeypatch.setattr(kernel, "VERY_MANY_TOKENS", very_many)
        torch.manual_seed(0)
        with implementation("kernel"):
            results.append(into(2)(*mix_in_inputs(5, 4, 70)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.interpret
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mix_out_interpreted(shape: tuple[int, int, int], against_reference: Callable[..., None]) -> None:
    against_reference(mix_out, mix_out_inputs(*shape), 2e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mix_head_interpreted(shape: tuple[int, int, int], against_reference: Callable[..., None]) -> None:
    against_reference(head, mix_head_inputs(*shape), 1e-5)


@pytest.mark.interpret
@pytest.mark.parametrize("op", ["in", "out", "head"])
def test_any_layout_in(op: str, scattered: Callable[[Tensor], Tensor], against_reference: Callable[..., None]) -> None:
    run, make = {
        "in": (into(3), mix_in_inputs),
        "out": (mix_out, mix_out_inputs),
        "head": (head, mix_head_inputs),
    }[op]
    against_reference(run, [scattered(x) for x in make(5, 4, 8)], 1e-5)


@pytest.mark.interpret
def test_no_tokens(against_reference: Callable[..., None]) -> None:
    against_reference(into(3), mix_in_inputs(0, 4, 8), 0.0)
    against_reference(mix_out, mix_out_inputs(0, 4, 8), 0.0)
    against_reference(head, mix_head_inputs(0, 4, 8), 0.0)


@pytest.mark.interpret
def test_a_token_does_not_depend_on_its_neighbours() -> None:
    """Among many, or among the few of a step."""
    x, *parameters = mix_in_inputs(75, 4, 8)
    with implementation("kernel"):
        for several, fewer in ((75, 70), (64, 20), (16, 1)):
            results = (into()(x[:tokens], *parameters) for tokens in (several, fewer))
            for one, other in zip(*results, strict=True):
                assert torch.equal(one[:fewer], other)


# name: the op, and what makes its inputs from tokens, streams and width
OPS: dict[str, tuple[Callable[..., Any], Callable[..., list[Tensor]]]] = {
    "in": (into(), mix_in_inputs),
    "in with a norm": (into_norm(), mix_in_norm_inputs),
    "out": (mix_out, mix_out_inputs),
    "head": (head, mix_head_inputs),
}


def gpu_inputs(op: str, shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """The streams, and what is multiplied with them number by number, in the dtype; the rest in FP32."""
    inputs = OPS[op][1](*shape, "cuda")
    places = {"out": (0, 1), "in with a norm": (0, 4)}.get(op, (0,))
    return [x.to(dtype) if place in places else x for place, x in enumerate(inputs)]


@pytest.fixture(scope="module")
def _compiled_ahead() -> None:
    """All kernels of the tests below, many at the same time."""
    with rehearsal():
        for shape, dtype in GPU_CASES:
            for op in OPS:
                results(OPS[op][0], gpu_inputs(op, shape, dtype), "kernel", ())
        for tokens in STEP_TOKENS:
            for dtype in GPU_SHAPES:
                for op in ("in", "in with a norm"):
                    OPS[op][0](*gpu_inputs(op, (tokens, 4, 4096), dtype))
        into()(*gpu_inputs("in", (5000, 4, 4096), torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.usefixtures("_compiled_ahead")
def test_a_token_on_the_card_does_not_depend_on_its_neighbours() -> None:
    """Among so many that slices are added up in one program, or a program does a row of columns; among few; in a
    step."""
    x, *parameters = gpu_inputs("in", (5000, 4, 4096), torch.bfloat16)
    for sizes in ((5000, 2000, 65), (64, 17), (16, 4, 1)):
        fewest = into()(x[: sizes[-1]], *parameters)
        for tokens in sizes[:-1]:
            for one, other in zip(into()(x[:tokens], *parameters), fewest, strict=True):
                assert torch.equal(one[: sizes[-1]], other)


@pytest.mark.gpu
@pytest.mark.usefixtures("_compiled_ahead")
@pytest.mark.parametrize("tokens", STEP_TOKENS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_norm_in_the_same_pass_has_the_same_bits(tokens: int, dtype: torch.dtype) -> None:
    *inputs, weight = gpu_inputs("in with a norm", (tokens, 4, 4096), dtype)
    _, y, *coefficients = into()(*inputs)
    _, normed, *others = into_norm()(*inputs, weight)
    assert torch.equal(normed, rms_norm(y, weight, 1e-6))
    assert all(torch.equal(one, other) for one, other in zip(coefficients, others, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("_compiled_ahead")
@pytest.mark.parametrize(("shape", "dtype"), GPU_CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_compiled(
    op: str, shape: tuple[int, int, int], dtype: torch.dtype, against_reference: Callable[..., None]
) -> None:
    roundings = 2 if op == "in with a norm" else 1
    against_reference(OPS[op][0], gpu_inputs(op, shape, dtype), roundings * TOLERANCES[dtype])


@pytest.mark.gpu
@pytest.mark.usefixtures("_compiled_ahead")
def test_coefficients_are_as_exact_as_float32() -> None:
    """bfloat16 streams: post and comb carry no more error than FP32 arithmetic would."""
    x, *parameters = mix_in_inputs(300, 4, 4096, "cuda")
    x = x.bfloat16()
    _, _, *exact = into()(x.double(), *(parameter.double() for parameter in parameters))
    with implementation("kernel"):
        _, _, *found = into()(x, *parameters)
    for ours, wanted in zip(found, exact, strict=True):
        assert (ours.double() - wanted).abs().max() < 2e-5
