"""Muon: the update rule against a direct transcription, batching, splits, and resuming."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leadline.ops.newton_schulz import newton_schulz
from leadline.optim import muon as muon_module
from leadline.optim.muon import Muon, logical_matrices

LR = 0.02


def parameters(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(tensors: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=generator)


def expected_matrix(weight: Tensor, gradients: list[Tensor], lr: float) -> Tensor:
    """Algorithm 1 of the report, one matrix, one step after the other, in float64."""
    weight, momentum = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in gradients:
        momentum = 0.95 * momentum + gradient.double()
        nesterov = 0.95 * momentum + gradient.double()
        direction = newton_schulz(nesterov[None])[0] * math.sqrt(max(weight.shape)) * 0.18
        weight = weight * (1 - lr * 0.1) - lr * direction
    return weight


def test_three_steps_follow_algorithm_1() -> None:
    weights = parameters((12, 20), (20, 12), (12, 20), (3, 8, 6))
    starts = [weight.detach().clone() for weight in weights]
    optimizer = Muon(weights, LR)
    gradients: list[list[Tensor]] = [[] for _ in weights]
    for step in range(3):
        set_gradients(weights, seed=step)
        for history, weight in zip(gradients, weights, strict=True):
            assert weight.grad is not None
            history.append(weight.grad.clone())
        optimizer.step()
    for weight, start, history in zip(weights[:3], starts[:3], gradients[:3], strict=True):
        assert (weight - expected_matrix(start, history, LR)).abs().max() < 1e-5
    for expert in range(3):
        history = [gradient[expert] for gradient in gradients[3]]
        assert (weights[3][expert] - expected_matrix(starts[3][expert], history, LR)).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (48, 48), (4, 24, 40)], ids=str)
def test_update_rms_is_018_lr(shape: tuple[int, ...]) -> None:
    (weight,) = parameters(shape)
    before = weight.detach().clone()
    set_gradients([weight], seed=1)
    Muon([weight], LR, weight_decay=0.0).step()
    update = (before - weight.detach()) / LR
    # RMS of a matrix with min(n, m) unit singular values, times sqrt(max(n, m))
    assert float(update.square().mean().sqrt()) == pytest.approx(0.18, rel=2e-3)


def test_gradient_scale_does_not_matter() -> None:
    first, second = parameters((16, 24)), parameters((16, 24))
    for weights, scale in ((first, 1.0), (second, 1e-12)):
        set_gradients(weights, seed=2)
        assert weights[0].grad is not None
        weights[0].grad *= scale
        Muon(weights, LR).step()
    assert (first[0] - second[0]).abs().max() < 1e-5


def test_zero_gradient_only_decays() -> None:
    (weight,) = parameters((6, 9))
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    Muon([weight], LR).step()
    assert torch.equal(weight.detach(), before * (1 - LR * 0.1))


def test_parameters_without_gradient_are_passed_over() -> None:
    used, unused = parameters((6, 9), (6, 9))
    before = unused.detach().clone()
    optimizer = Muon([used, unused], LR)
    set_gradients([used], seed=3)
    optimizer.step()
    assert torch.equal(unused, before)
    assert unused not in optimizer.state


@pytest.mark.parametrize(
    ("height", "rows", "blocks"), [(24, 8, [8, 8, 8]), (24, [4, 4, 16], [4, 4, 16]), (8, 8, [8])], ids=str
)
def test_rows_cut_a_tensor_into_independent_matrices(height: int, rows: Any, blocks: list[int]) -> None:
    (fused,) = parameters((height, 10))
    apart = [nn.Parameter(block.detach().clone()) for block in fused.split(blocks)]
    optimizers = Muon([{"params": [fused], "rows": rows}], LR), Muon(apart, LR)
    for step in range(2):
        set_gradients([fused], seed=step)
        assert fused.grad is not None
        for block, gradient in zip(apart, fused.grad.split(blocks), strict=True):
            block.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (fused - torch.cat(list(apart))).abs().max() < 1e-6


def test_logical_matrices_are_views_that_cover_the_tensor() -> None:
    for shape, rows in (((4, 6, 5), None), ((6, 5), None), ((6, 5), 2), ((6, 5), [1, 2, 3])):
        x = torch.zeros(shape)
        for view in logical_matrices(x, rows):
            assert view.ndim == 3
            view += 1
        assert torch.equal(x, torch.ones(shape))


@pytest.mark.parametrize("limit", [1, 500, 10**9])
def test_batch_limit_does_not_change_the_result(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((5, 8, 12), (8, 12), (16, 12), (8, 12), (12, 8))
    weights, reference = parameters(*shapes), parameters(*shapes)
    for tensors in (weights, reference):
        set_gradients(tensors, seed=4)
    for tensor in reference:
        Muon([tensor], LR).step()
    monkeypatch.setattr(muon_module, "MAX_BATCH_ELEMENTS", limit)
    Muon(weights, LR).step()
    for weight, expected in zip(weights, reference, strict=True):
        assert (weight - expected).abs().max() < 1e-6


def test_equal_shapes_share_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def recording(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return newton_schulz(x)

    monkeypatch.setattr(muon_module, "newton_schulz", recording)
    weights = parameters((5, 8, 12), (8, 12), (16, 12), (12, 8))
    set_gradients(weights, seed=5)
    Muon([{"params": weights[:2]}, {"params": weights[2:3], "rows": 8}, {"params": weights[3:]}], LR).step()
    assert sorted(shapes) == [(1, 12, 8), (8, 8, 12)]


def test_resume_is_bitwise(tmp_path: Any) -> None:
    shapes = ((3, 8, 12), (24, 12), (8, 12))

    def build() -> tuple[list[nn.Parameter], Muon]:
        weights = parameters(*shapes)
        named = list(zip("abc", weights, strict=True))
        return weights, Muon([{"params": named[:1]}, {"params": named[1:], "rows": 8}], LR)

    def train(weights: list[nn.Parameter], optimizer: Muon, steps: range) -> None:
        for step in steps:
            set_gradients(weights, seed=step)
            optimizer.param_groups[0]["lr"] = LR / (step + 1)
            optimizer.step()

    weights, optimizer = build()
    train(weights, optimizer, range(3))
    torch.save({"weights": weights, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(weights, optimizer, range(3, 6))

    resumed, second = build()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    with torch.no_grad():
        for weight, value in zip(resumed, saved["weights"], strict=True):
            weight.copy_(value)
    second.load_state_dict(saved["optimizer"])
    train(resumed, second, range(3, 6))
    for weight, expected in zip(resumed, weights, strict=True):
        assert torch.equal(weight, expected)


def test_learning_rate_belongs_to_the_group() -> None:
    moving, still = parameters((6, 9), (6, 9))
    before = still.detach().clone()
    set_gradients([moving, still], seed=6)
    Muon([{"params": [moving]}, {"params": [still], "lr": 0.0}], LR).step()
    assert torch.equal(still, before)
    assert not torch.equal(moving, before)


def test_layout_of_memory_does_not_matter() -> None:
    (plain,) = parameters((12, 20))
    strided = nn.Parameter(plain.detach().t().contiguous().t())
    assert not strided.is_contiguous()
    for weight in (plain, strided):
        set_gradients([weight], seed=7)
    Muon([{"params": [plain], "rows": 4}], LR).step()
    Muon([{"params": [strided], "rows": 4}], LR).step()
    assert (plain - strided).abs().max() < 1e-6


def test_float64_parameters_stay_float64() -> None:
    weight = nn.Parameter(torch.randn(6, 9, dtype=torch.float64))
    weight.grad = torch.randn_like(weight)
    before, gradient = weight.detach().clone(), weight.grad.clone()
    Muon([weight], LR).step()
    assert (weight - expected_matrix(before, [gradient], LR)).abs().max() < 1e-12


def test_closure_is_called_with_gradients_on() -> None:
    (weight,) = parameters((6, 9))
    optimizer = Muon([weight], LR)

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    before = weight.detach().clone()
    assert optimizer.step(closure) == pytest.approx(float(before.square().sum()))
    assert not torch.equal(weight, before)


@pytest.mark.parametrize(
    ("tensor", "rows", "message"),
    [
        (torch.zeros(5), None, r"matrices or stacks of matrices, not w \(5,\)"),
        (torch.zeros(2, 2, 2, 2), None, "matrices or stacks of matrices"),
        (torch.zeros(4, 4, dtype=torch.bfloat16), None, "float32"),
        (torch.zeros(10, 4), 4, r"cannot cut w \(10, 4\) into blocks of 4 rows"),
        (torch.zeros(10, 4), [4, 4], r"into blocks of \[4, 4\] rows"),
        (torch.zeros(2, 4, 4), 2, "a stack of matrices already"),
    ],
    ids=["vector", "4-D", "bfloat16", "uneven", "short", "stack"],
)
def test_what_muon_cannot_take_is_named(tensor: Tensor, rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([{"params": [("w", nn.Parameter(tensor))], "rows": rows}], LR)


@pytest.mark.parametrize("rows", [16, None])
def test_a_loud_head_drowns_the_others_only_when_not_cut(rows: int | None) -> None:
    """Why wq_b is cut by head: in one matrix, the update's size depends on how large the other heads' gradients are."""
    (weight,) = parameters((8 * 16, 64))
    before = weight.detach().clone()
    set_gradients([weight], seed=8)
    assert weight.grad is not None
    weight.grad[:16] *= 100
    Muon([{"params": [weight], "rows": rows}], LR, weight_decay=0.0).step()
    rms = ((before - weight.detach()) / LR).unflatten(0, (8, 16)).square().mean((1, 2)).sqrt()
    if rows is None:
        assert rms[0] > 1.3 * rms[1:].max()
    else:
        assert torch.allclose(rms, torch.full((8,), 0.18), rtol=5e-3)
