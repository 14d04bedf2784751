"""Kernels under torch.compile and in CUDA graphs: traced whole, with the shapes that they really return."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from leadline.ops.cross_entropy import cross_entropy
from leadline.ops.dispatch import implementation
from leadline.ops.exact_linear import exact_linear, exact_linears
from leadline.ops.gated_pool import gated_pool
from leadline.ops.grouped_linear import grouped_linear
from leadline.ops.grouped_product import grouped_product
from leadline.ops.hyper_connection import mix_head, mix_in, mix_in_norm, mix_out
from leadline.ops.newton_schulz import newton_schulz
from leadline.ops.norm_rope import norm_rope
from leadline.ops.opaque import opaque
from leadline.ops.rms_norm import rms_norm
from leadline.ops.rope import rope
from leadline.ops.route import route
from leadline.ops.swiglu import swiglu
from leadline.ops.token_permutation import combine, dispatch, expert_order

EPS = 1e-6


def experts(x: Tensor, chosen: Tensor) -> Any:
    order = expert_order(chosen, 4)
    return combine(dispatch(x, order) * 2, order, x), order.counts_E


def routed(logits: Tensor, bias: Tensor) -> Any:
    experts, weights, scores, order = route(logits, bias, None, 2, 1.0)
    return weights, scores, experts, *order


def unrecorded(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor) -> Any:
    """Without gradients, but for the sum behind it."""
    x, fn, base, scale, weight, free = (*(part.detach() for part in (x, fn, base, scale, weight)), x)
    return *mix_in_norm(x, fn, base, scale, weight, 2, EPS, EPS, EPS)[1:], free.sum()


# op: (function, shapes or ready tensors of its inputs). Integers are the same in every call.
CASES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...] | Tensor]]] = {
    "rms_norm": (lambda x, weight: rms_norm(x, weight, EPS), [(5, 8), (8,)]),
    "rms_norm weightless": (lambda x: rms_norm(x, None, EPS), [(5, 2, 8)]),
    "rope": (lambda x, cos, sin: rope(x, cos, sin, inverse=True), [(5, 2, 8), (5, 2), (5, 2)]),
    "norm_rope of queries": (lambda x, cos, sin: norm_rope(x, cos, sin, eps=EPS), [(5, 2, 8), (5, 2), (5, 2)]),
    "norm_rope of keys": (
        lambda x, cos, sin, weight: norm_rope(x, cos, sin, weight=weight, eps=EPS, rounding="fp8"),
        [(5, 32), (5, 2), (5, 2), (32,)],
    ),
    "norm_rope of index queries": (
        lambda x, cos, sin: norm_rope(x, cos, sin, rounding="fp4"),
        [(5, 2, 32), (5, 2), (5, 2)],
    ),
    "swiglu": (lambda gate, up, scale: swiglu(gate, up, 1.0, scale), [(5, 8), (5, 8), (5,)]),
    "swiglu with weights elsewhere": (
        lambda gate, up, scale, place: swiglu(gate, up, 1.0, scale, place),
        [(5, 8), (5, 8), (5,), torch.tensor([3, 0, 4, 1, 2])],
    ),
    "route few": (routed, [(5, 8), torch.tensor([0.0, 1.0] * 4)]),
    "route many": (routed, [(11, 8), torch.tensor([0.0, 1.0] * 4)]),
    "exact_linear": (lambda x, weight: exact_linear(x.detach(), weight.detach()) + x.sum(), [(3, 8), (5, 8)]),
    "exact_linears": (
        lambda x, *weights: exact_linears(x.detach(), [weight.detach() for weight in weights])[1] + x.sum(),
        [(3, 8), (5, 8), (2, 8)],
    ),
    "grouped_product": (
        lambda x, weight: grouped_product(x.detach(), weight.detach()) + x.sum(),
        [(3, 2, 8), (2, 4, 8)],
    ),
    "swiglu without weights": (lambda gate, up: swiglu(gate, up, 1.0), [(5, 8), (5, 8)]),
    "mix_in": (lambda x, fn, base, scale: mix_in(x, fn, base, scale, 2, EPS, EPS), [(5, 4, 8), (24, 32), (24,), (3,)]),
    "mix_in_norm": (
        unrecorded,
        [(5, 4, 8), (24, 32), (24,), (3,), (8,)],
    ),
    "mix_out": (mix_out, [(5, 4, 8), (5, 8), (5, 4), (5, 4, 4)]),
    "mix_head": (lambda x, fn, base, scale: mix_head(x, fn, base, scale, EPS, EPS), [(5, 4, 8), (4, 32), (4,), (1,)]),
    "gated_pool": (
        lambda values, scores, rows: gated_pool(values, scores, rows, 4),
        [(8, 8), (8, 8), torch.arange(8).view(2, 4)],
    ),
    "cross_entropy": (cross_entropy, [(6, 16), (32, 16), torch.tensor([3, -1, 0, 31, 7, 7])]),
    "newton_schulz": (newton_schulz, [(2, 12, 8)]),
    "token_permutation": (experts, [(5, 8), torch.tensor([[0, 3], [1, 2], [3, 0], [0, 1], [2, 3]])]),
}


FORWARD_ONLY = ("newton_schulz", "exact_linear", "exact_linears", "grouped_product", "mix_in_norm")


def inputs_of(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    parts = CASES[name][1]
    return [
        part.to(device) if isinstance(part, Tensor) else torch.randn(part, device=device).to(dtype).requires_grad_()
        for part in parts
    ]


def outputs_and_gradients(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    outputs = [y for y in tree_leaves(function(*inputs)) if isinstance(y, Tensor)]
    reached = [y for y in outputs if y.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    if not reached:
        return outputs
    gradients = torch.autograd.grad(reached, wanted, [torch.ones_like(y) for y in reached], allow_unused=True)
    return [*outputs, *(gradient for gradient in gradients if gradient is not None)]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class FakesMatch(TorchDispatchMode):
    """Context manager: every opaque operation inside returns what its fake says; `seen` are their names."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.namespace == "leadline":
            self.seen.append(func.name())
            leaves = tree_map_only(Tensor, Tensor.detach, args)
            with FakeTensorMode() as mode:
                fake = func(*tree_map_only(Tensor, mode.from_tensor, leaves))
            assert [self.form(x) for x in tree_leaves(fake)] == [self.form(x) for x in tree_leaves(found)], func.name()
        return found

    @staticmethod
    def form(x: Tensor) -> tuple[Any, ...]:
        return x.dtype, x.shape, x.stride()


@pytest.mark.interpret
@pytest.mark.parametrize("name", CASES)
def test_fakes_look_like_the_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with implementation("kernel"), FakesMatch() as mode:
        outputs_and_gradients(CASES[name][0], inputs_of(name))
    assert len(mode.seen) >= (1 if name in FORWARD_ONLY else 2)


# torch's tracer makes an instance of each autograd function, against its own advice.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.interpret
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", CASES)
def test_compiled_whole_equals_eager(name: str) -> None:
    function, inputs = CASES[name][0], inputs_of(name)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with implementation("kernel"):
        pairs = zip(outputs_and_gradients(compiled, inputs), outputs_and_gradients(function, inputs), strict=True)
        assert all(torch.equal(ours, wanted) for ours, wanted in pairs)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.interpret
@pytest.mark.usefixtures("fresh_compiler")
def test_grouped_linear_compiled_whole_equals_eager() -> None:
    """The product of torch itself, which torch traces in bfloat16 alone."""
    shapes = (8, 16), (3, 8, 16)
    inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    inputs.append(torch.tensor([2, 0, 6]))
    compiled = torch.compile(grouped_linear, fullgraph=True, backend="aot_eager")
    with implementation("kernel"):
        pairs = zip(outputs_and_gradients(compiled, inputs), outputs_and_gradients(grouped_linear, inputs), strict=True)
        assert all(torch.equal(ours, wanted) for ours, wanted in pairs)


def test_outside_of_the_compiler_the_function_is_called_as_it_stands() -> None:
    calls: list[int] = []

    def plain(x: Tensor, number: int) -> Tensor:
        calls.append(number)
        return x + number

    plain.__module__ = "leadline.ops.test_opaque.kernel"
    wrapped = opaque(lambda x, number: torch.empty_like(x))(plain)
    with FakesMatch() as mode:
        assert wrapped(torch.ones(1), 2).item() == 3
    assert calls == [2]
    assert mode.seen == []
    assert wrapped.__name__ == "plain"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", CASES)
def test_compiled_whole_equals_eager_on_the_card(name: str) -> None:
    function, inputs = CASES[name][0], inputs_of(name, "cuda")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    pairs = zip(outputs_and_gradients(compiled, inputs), outputs_and_gradients(function, inputs), strict=True)
    assert all(torch.equal(ours, wanted) for ours, wanted in pairs)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_the_default_compiler_takes_a_chain_of_ops() -> None:
    def chain(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        x, y, post, comb = mix_in(x, fn, base, scale, 3, EPS, EPS)
        y = rms_norm(y, weight, EPS)
        return mix_out(x, swiglu(y * 2, y + 1, 10.0), post, comb)

    shapes = (65, 4, 128), (24, 512), (24,), (3,), (128,)
    inputs = [torch.randn(shape, device="cuda").requires_grad_() for shape in shapes]
    compiled = torch.compile(chain, fullgraph=True)
    for ours, wanted in zip(outputs_and_gradients(compiled, inputs), outputs_and_gradients(chain, inputs), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CASES, "grouped_linear"])
def test_a_captured_graph_computes_on_new_inputs(name: str) -> None:
    if name == "grouped_linear":
        counts = torch.tensor([2, 0, 6], device="cuda")
        function = lambda x, weight: grouped_linear(x, weight, counts)  # noqa: E731
        make = lambda: [torch.randn(shape, device="cuda").bfloat16() for shape in ((8, 16), (3, 8, 16))]  # noqa: E731
    else:
        function = CASES[name][0]
        make = lambda: [x.detach() for x in inputs_of(name, "cuda")]  # noqa: E731
    inputs, others = make(), make()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # kernels are compiled outside of the capture
        function(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = tree_leaves(function(*inputs))
    for old, new in zip(inputs, others, strict=True):
        old.copy_(new)
    graph.replay()
    for ours, wanted in zip(found, tree_leaves(function(*others)), strict=True):
        assert torch.equal(ours, wanted)
