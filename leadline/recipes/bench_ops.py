"""What `leadline bench ops` measures: each op at the width of V4-Flash, its gate, and what it must cost at least.

The gate comes before the clock. Fresh random inputs at awkward lengths go through the kernel and through the reference
in float64; every output and every gradient is compared, in memory that was filled with NaN before it was handed out,
and the kernel runs twice and must give the same bits. A case whose gate is red gets no time.

The cost of a case is that of its purpose, not of its kernel: operations that the mathematics asks for, and every tensor
of it moved once. What a kernel does beyond that, such as reading the streams a second time, counts against it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from leadline.ops.cross_entropy import cross_entropy
from leadline.ops.dispatch import Implementation, implementation
from leadline.ops.gated_pool import gated_pool
from leadline.ops.grouped_linear import grouped_linear
from leadline.ops.hyper_connection import mix_in, mix_out
from leadline.ops.reach import Reach
from leadline.ops.rms_norm import rms_norm
from leadline.ops.rope import rope, rotations
from leadline.ops.sparse_attention import sparse_attention
from leadline.ops.swiglu import swiglu

D, S, H, K, R, F, E, A, V = 4096, 4, 64, 512, 64, 2048, 256, 6, 129280  # V4-Flash
TOKENS = 8192
BF16, FP32 = 2, 4  # bytes

Inputs = list[Tensor | None]


@dataclass(frozen=True)
class Cost:
    """The least that one call can do. bytes: read from and written to the memory of the card."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Difference:
    """|kernel - reference| / |reference| of one result in the Euclidean norm, and the result's dtype. Infinite when two
    runs of the kernel differ in any bit."""

    relative: float
    dtype: torch.dtype


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    inputs: makes fresh inputs for a number of tokens on a device. forward, backward: costs at `tokens`. ceiling: which
    of the card's two measured limits the result is compared with. tolerance, fp32_tolerance: bounds on |difference| /
    |reference| for results in bfloat16, which rounding alone moves by 1.7e-3, and for results in FP32. gate_inputs:
    other inputs for the gate, where the reference in float64 would not fit on the card.
    """

    op: str
    shape: str
    inputs: Callable[[int, torch.device], Inputs]
    run: Callable[..., Any]
    forward: Cost
    backward: Cost
    ceiling: Literal["copy", "matmul"] = "copy"
    tokens: int = TOKENS
    gate_tokens: tuple[int, ...] = (1, 127, 4001)
    gate_inputs: Callable[[int, torch.device], Inputs] | None = None
    tolerance: float = 4e-3
    fp32_tolerance: float = 1e-4

    def accepts(self, difference: Difference) -> bool:
        """Whether a result is as close to the reference as its dtype allows; NaN is not."""
        allowed = self.fp32_tolerance if difference.dtype == torch.float32 else self.tolerance
        return difference.relative <= allowed


# -- the cases -----------------------------------------------------------------------------------------------------


def _random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).bfloat16()


def _moved(flops: float, forward_values: int, backward_values: int, fp32_values: int = 0) -> tuple[Cost, Cost]:
    """Costs of forward and backward of a case that moves bfloat16 values, and as many FP32 values in both."""
    extra = fp32_values * FP32
    return Cost(flops, forward_values * BF16 + extra), Cost(2 * flops, backward_values * BF16 + extra)


def _rms_norm() -> Case:
    values = TOKENS * D
    return Case(
        "rms_norm",
        f"{TOKENS:,} x {D}",
        lambda tokens, device: [_random(tokens, D, device=device), torch.randn(D, device=device)],
        lambda x, weight: rms_norm(x, weight, 1e-6),
        *_moved(4 * values, 2 * values, 3 * values),
    )


def _query_norm() -> Case:
    values = TOKENS * H * K
    return Case(
        "rms_norm",
        f"{TOKENS:,} x {H} x {K}, weightless",
        lambda tokens, device: [_random(tokens, H, K, device=device)],
        lambda x: rms_norm(x, None, 1e-6),
        *_moved(3 * values, 2 * values, 3 * values),
    )


def _rope() -> Case:
    def inputs(tokens: int, device: torch.device) -> Inputs:
        positions = torch.randint(0, 2**20, (tokens,), device=device)
        return [_random(tokens, H, K, device=device), *rotations(positions, torch.rand(R // 2, device=device))]

    values = TOKENS * H * K
    return Case(
        "rope",
        f"{TOKENS:,} x {H} x {K}, last {R} rotated",
        inputs,
        rope,
        *_moved(3 * TOKENS * H * R, 2 * values, 2 * values, TOKENS * R),
    )


def _swiglu() -> Case:
    values = TOKENS * A * F
    return Case(
        "swiglu",
        f"{TOKENS * A:,} x {F}, gate weights",
        lambda tokens, device: [
            _random(tokens * A, F, device=device) * 4,
            _random(tokens * A, F, device=device) * 4,
            torch.rand(tokens * A, device=device),
        ],
        lambda gate, up, scale: swiglu(gate, up, 10.0, scale),
        *_moved(10 * values, 3 * values, 5 * values, TOKENS * A),
    )


def _streams(tokens: int, device: torch.device) -> Inputs:
    rows, width = (2 + S) * S, S * D
    return [
        _random(tokens, S, D, device=device),
        torch.randn(rows, width, device=device) * width**-0.5,
        torch.randn(rows, device=device),
        1 + 0.3 * torch.randn(3, device=device),
    ]


def _mix_in() -> Case:
    stream, tokens = TOKENS * S * D, TOKENS * D
    projection = 2 * stream * (2 + S) * S
    return Case(
        "hyper_connection",
        f"into a sublayer, {TOKENS:,} x {S} x {D}",
        _streams,
        lambda x, fn, base, scale: mix_in(x, fn, base, scale, 20, 1e-6, 1e-6),
        *_moved(projection, stream + tokens, 2 * stream + tokens),
    )


def _mix_out() -> Case:
    stream, tokens = TOKENS * S * D, TOKENS * D
    return Case(
        "hyper_connection",
        f"out of a sublayer, {TOKENS:,} x {S} x {D}",
        lambda tokens, device: [
            _random(tokens, S, D, device=device),
            _random(tokens, D, device=device),
            2 * torch.rand(tokens, S, device=device),
            torch.rand(tokens, S, S, device=device),
        ],
        mix_out,
        *_moved(2 * stream * (S + 1), 2 * stream + tokens, 3 * stream + 2 * tokens),
    )


def _both_sublayers() -> Case:
    """All four stages of a block, each around a sublayer that hands its input back."""

    def run(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> Tensor:
        for _ in range(2):
            y, post, comb = mix_in(x, fn, base, scale, 20, 1e-6, 1e-6)
            x = mix_out(x, y, post, comb)
        return x

    stream, tokens = TOKENS * S * D, TOKENS * D
    return Case(
        "hyper_connection",
        f"both sublayers of a block, {TOKENS:,} x {S} x {D}",
        _streams,
        run,
        *_moved(4 * stream * ((2 + S) * S + S + 1), 2 * (3 * stream + 2 * tokens), 2 * (5 * stream + 3 * tokens)),
        # The streams are rounded in between, which moves everything behind.
        tolerance=1e-2,
        fp32_tolerance=1e-2,
    )


def _gated_pool(ratio: int, overlap: bool) -> Case:
    columns = 2 * K if overlap else K

    def inputs(tokens: int, device: torch.device) -> Inputs:
        entries = max(1, tokens // ratio)
        first_C1 = ratio * torch.arange(entries, device=device)[:, None]
        rows_CG = first_C1 + torch.arange(-ratio if overlap else 0, ratio, device=device)
        rows_CG = rows_CG.clamp_min(-1)  # the first entry has no window before its own
        return [*(torch.randn(entries * ratio, columns, device=device) for _ in range(2)), rows_CG]

    values, entries = TOKENS * columns, TOKENS // ratio * K
    return Case(
        "gated_pool",
        f"{TOKENS:,} tokens to {TOKENS // ratio:,} entries",
        inputs,
        lambda values, scores, rows: gated_pool(values, scores, rows, K),
        Cost(8 * values, (2 * values + entries) * FP32),
        Cost(16 * values, (4 * values + entries) * FP32),
        gate_tokens=(1, 127 * ratio, 4001),
    )


def _grouped_linear() -> Case:
    def inputs(tokens: int, device: torch.device, width: int = D, hidden: int = F) -> Inputs:
        weight_EFD = _random(E, hidden, width, device=device) * width**-0.5
        # Random routing: every expert is as likely as any other.
        counts_E = torch.bincount(torch.randint(0, E, (tokens * A,), device=device), minlength=E)
        return [_random(tokens * A, width, device=device), weight_EFD, counts_E]

    flops, rows = 2 * TOKENS * A * D * F, TOKENS * A * (D + F)
    return Case(
        "grouped_linear",
        f"{TOKENS:,} x {A} rows, {E} experts, {D} to {F}",
        inputs,
        grouped_linear,
        *_moved(flops, rows + E * D * F, 2 * rows + 2 * E * D * F),
        ceiling="matmul",
        gate_inputs=lambda tokens, device: inputs(tokens, device, 512, 256),
    )


def _cross_entropy() -> Case:
    def inputs(tokens: int, device: torch.device, width: int = D, vocabulary: int = V) -> Inputs:
        targets_T = torch.randint(-1, vocabulary, (tokens,), device=device)
        weight_VD = _random(vocabulary, width, device=device) * width**-0.5
        return [_random(tokens, width, device=device), weight_VD, targets_T]

    return Case(
        "cross_entropy",
        f"{TOKENS:,} x {D}, vocabulary of {V:,}",
        inputs,
        cross_entropy,
        *_moved(2 * TOKENS * D * V, D * (TOKENS + V), 2 * D * (TOKENS + V)),
        ceiling="matmul",
        gate_inputs=lambda tokens, device: inputs(tokens, device, 512, 20000),
    )


def _attention(tokens: int, ratio: int, picks: int, gate: bool = True) -> Case:
    """One sequence at V4-Flash's width: window 128, 64 heads of 512, and picked entries (CSA) or all of them (HCA)."""

    def inputs(count: int, device: torch.device, heads: int = H) -> Inputs:
        position_T = torch.arange(count, device=device)
        visible_T = (position_T + 1) // ratio
        vectors = [_random(count, heads, K, device=device), _random(count, K, device=device)]
        vectors.append(_random(max(1, count // ratio), K, device=device))
        runs = (position_T - 127).clamp_min(0), position_T, torch.zeros_like(position_T), visible_T
        return [*vectors, torch.randn(heads, device=device), *runs, _spread_picks(visible_T, picks) if picks else None]

    def run(q: Tensor, keys: Tensor, entries: Tensor, sink: Tensor, *rest: Any) -> Tensor:
        *runs, picked_TM = rest
        return sparse_attention(q, keys, entries, sink, Reach((len(q),), *runs), picked_TM)[0]

    seen = sum(min(t + 1, 128) + min((t + 1) // ratio, picks or tokens) for t in range(tokens))
    flops = 4 * H * K * seen
    return Case(
        "sparse_attention",
        f"{'CSA' if picks else 'HCA'}, {tokens:,} tokens, {H} heads of {K}",
        inputs,
        run,
        Cost(flops, 2 * tokens * H * K * BF16),
        Cost(2.5 * flops, 4 * tokens * H * K * BF16),
        ceiling="matmul",
        tokens=tokens,
        gate_tokens=(1, 127, 4001) if gate else (257,),
        gate_inputs=lambda count, device: inputs(count, device, 16 if count > 1000 else H),
        fp32_tolerance=4e-3,  # of the sink: a sum over gradients in bfloat16
    )


def _spread_picks(visible_T: Tensor, picks: int) -> Tensor:
    """Entries spread evenly over what each query sees, all of them while they are few: ascending, -1 behind."""
    place = torch.arange(picks, device=visible_T.device)
    few = torch.where(place < visible_T[:, None], place, -1)
    return torch.where(visible_T[:, None] > picks, place * visible_T[:, None] // picks, few)


CASES: tuple[Case, ...] = (
    _attention(8192, 4, 512), _attention(8192, 128, 0),
    _attention(32768, 4, 512, gate=False), _attention(32768, 128, 0, gate=False),
    _rms_norm(), _query_norm(), _rope(), _swiglu(), _mix_in(), _mix_out(), _both_sublayers(),
    _gated_pool(4, overlap=True), _gated_pool(128, overlap=False), _grouped_linear(), _cross_entropy(),
)  # fmt: skip


# -- the gate ------------------------------------------------------------------------------------------------------


def gate(case: Case, device: torch.device) -> list[Difference]:
    """Every result at every awkward length."""
    with _poisoned_memory():
        return [
            difference
            for tokens in case.gate_tokens
            for difference in differences(case.run, (case.gate_inputs or case.inputs)(tokens, device))
        ]


def differences(run: Callable[..., Any], inputs: Sequence[Tensor | None]) -> list[Difference]:
    """Of every output of run(*inputs), and of the gradient of every floating input for random output gradients: as a
    kernel against the reference in float64."""
    first, second = (_results(run, inputs, "kernel", ()) for _ in range(2))
    exact = _results(run, [_double(x) for x in inputs], "reference", first)
    return [_difference(*results) for results in zip(first, second, exact, strict=True)]


def _difference(ours: Tensor, again: Tensor, exact: Tensor) -> Difference:
    if ours.shape != exact.shape or not torch.equal(ours.nan_to_num(), again.nan_to_num()):
        return Difference(math.inf, ours.dtype)
    difference, size = float((ours.double() - exact).norm()), float(exact.norm())
    return Difference(difference / size if size else difference, ours.dtype)


def _results(
    run: Callable[..., Any], inputs: Sequence[Tensor | None], name: Implementation, like: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs and gradients, for output gradients that are the same in every call and, where `like` gives other
    results, rounded to their dtypes."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) if x is not None else None for x in inputs]
    with implementation(name):
        outputs = _outputs(run(*leaves))
        generator = torch.Generator(outputs[0].device).manual_seed(1)
        gradients = []
        for output, other in zip(outputs, like or outputs, strict=False):
            gradient = torch.randn(output.shape, generator=generator, device=output.device)
            gradients.append(gradient.to(other.dtype).to(output.dtype))
        return [*(output.detach() for output in outputs), *_backward(outputs, leaves, gradients)]


def _outputs(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _backward(outputs: list[Tensor], leaves: Inputs, gradients: list[Tensor], again: bool = False) -> list[Tensor]:
    """Gradients of the leaves that have one; the graph stays for another call when `again`."""
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    found = torch.autograd.grad(outputs, wanted, gradients, retain_graph=again, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def _double(x: Tensor | None) -> Tensor | None:
    return x.double() if x is not None and x.is_floating_point() else x


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN, as torch arranges while deterministic algorithms are asked for."""
    before, only_warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    with warnings.catch_warnings():
        # Of references that have no deterministic form: here they only have to be right.
        warnings.filterwarnings("ignore", message=".*deterministic")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=only_warns)


# -- the clock -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """What the card reaches in this run: bytes/s of a device copy, read and write counted, and bfloat16 FLOP/s."""

    copy: float
    matmul: float


def measure_ceilings(device: torch.device) -> Ceilings:
    """A copy of 1 GiB, and a product of two random 8192 x 8192 matrices."""
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size() / seconds(lambda: target.copy_(source))
    del source, target
    a, b = (_random(8192, 8192, device=device) for _ in range(2))
    return Ceilings(copied, 2 * 8192**3 / seconds(lambda: a @ b))


def seconds(work: Callable[[], Any]) -> float:
    """Median time of one call on the card, caches cold."""
    from triton.testing import do_bench

    milliseconds = do_bench(work, warmup=25, rep=100, return_mode="median")
    assert isinstance(milliseconds, float)
    return milliseconds / 1000


def time_forward(case: Case, device: torch.device) -> float:
    """Seconds of the kernel alone, without what a backward needs."""
    inputs = case.inputs(case.tokens, device)
    with torch.no_grad(), implementation("kernel"):
        return seconds(lambda: case.run(*inputs))


def time_backward(case: Case, device: torch.device) -> float:
    """Seconds from output gradients to the gradients of all floating inputs."""
    leaves = case.inputs(case.tokens, device)
    for leaf in leaves:
        if leaf is not None:
            leaf.requires_grad_(leaf.is_floating_point())
    with implementation("kernel"):
        outputs = _outputs(case.run(*leaves))
        gradients = [torch.randn_like(output) for output in outputs]
        return seconds(lambda: _backward(outputs, leaves, gradients, again=True))
