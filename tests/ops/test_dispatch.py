"""The choice between reference and kernel, by device, by dtype and by demand."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from leadline.ops import dispatch
from leadline.ops.dispatch import KernelError, implementation, use_kernel


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "triton_installed", lambda: True)


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "triton_installed", lambda: True)


@pytest.mark.usefixtures("interpreter")
def test_cpu_runs_the_reference_unless_a_kernel_is_demanded() -> None:
    x = torch.zeros(1)
    assert not use_kernel("rope", x)
    with implementation("kernel"):
        assert use_kernel("rope", x)
        with implementation("reference"):
            assert not use_kernel("rope", x)
        assert use_kernel("rope", x)
    assert not use_kernel("rope", x)


@pytest.mark.usefixtures("interpreter")
def test_the_choice_ends_with_its_block_even_on_an_error() -> None:
    with pytest.raises(RuntimeError), implementation("kernel"):
        raise RuntimeError
    assert not use_kernel("rope", torch.zeros(1))


@pytest.mark.usefixtures("no_interpreter")
def test_a_kernel_that_cannot_run_is_refused_with_a_remedy() -> None:
    message = r"rope: no kernel for torch.float32 on cpu: move the tensors to a CUDA device, or set TRITON_INTERPRET=1"
    with implementation("kernel"), pytest.raises(KernelError, match=message):
        use_kernel("rope", torch.zeros(1))


@pytest.mark.usefixtures("interpreter")
def test_float64_belongs_to_the_reference() -> None:
    x = torch.zeros(1, dtype=torch.float64)
    assert not use_kernel("rope", x)
    with implementation("kernel"), pytest.raises(KernelError, match=r"rope: .*float64.*use implementation"):
        use_kernel("rope", x)


def test_without_triton_a_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)
    assert not use_kernel("rope", torch.zeros(1))
    with implementation("kernel"), pytest.raises(KernelError, match="install triton"):
        use_kernel("rope", torch.zeros(1))


def test_an_unknown_implementation_is_named() -> None:
    with pytest.raises(KernelError, match="'fast': expected 'reference' or 'kernel'"), implementation("fast"):  # pyright: ignore[reportArgumentType]
        pass


@pytest.mark.usefixtures("interpreter")
def test_another_thread_chooses_for_itself() -> None:
    found: list[bool] = []
    with implementation("kernel"):
        thread = threading.Thread(target=lambda: found.append(use_kernel("rope", torch.zeros(1))))
        thread.start()
        thread.join()
    assert found == [False]


@pytest.mark.gpu
def test_cuda_runs_kernels_and_recomputation_keeps_the_choice() -> None:
    choices: list[bool] = []

    def op(x: torch.Tensor) -> torch.Tensor:
        choices.append(use_kernel("rope", x))
        return x * x

    x = torch.ones(3, device="cuda", requires_grad=True)
    assert use_kernel("rope", x)
    with implementation("reference"):
        y = checkpoint(op, x, use_reentrant=False)
        y.sum().backward()
    assert choices == [False, False]
