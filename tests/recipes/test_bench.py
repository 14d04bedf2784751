"""The kernel benchmark: no time without a green gate, and rows that the README can be made from."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from leadline.cli import UsageError
from leadline.ops.dispatch import use_kernel
from leadline.recipes import bench
from leadline.recipes.bench import BenchError, Options, Result, Run
from leadline.recipes.bench_ops import CASES
from leadline.recipes.bench_ops.case import Case, Cost
from leadline.recipes.bench_ops.clock import Ceilings
from leadline.recipes.bench_ops.gate import difference, double, gate, gradients_of, outputs_of, results

CPU = torch.device("cpu")
RUN = Run("NVIDIA H100 80GB HBM3", "2026-01-01T00:00:00+00:00", "0123abc", {"torch": "2"}, Ceilings(2e12, 8e14))


class Square(torch.autograd.Function):
    """x^2, with the mistakes that a kernel can make."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mistake: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.mistake = mistake
        if mistake == "unwritten":
            y = torch.empty_like(x)
            y[:-1] = x[:-1].square()
            return y
        if mistake == "race":
            return x.square() * (1 + 1e-6 * torch.rand(()))
        return x.square() * (1.001 if mistake == "value" else 1.0)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return (2.001 if ctx.mistake == "gradient" else 2.0) * x * dy[0], None


def square(mistake: str) -> Callable[[Tensor], Tensor]:
    return lambda x: Square.apply(x, mistake if use_kernel("square", x) else "")


def case(mistake: str = "") -> Case:
    return Case(
        "square",
        "any",
        lambda tokens, device: [torch.randn(tokens, 3, device=device)],
        square(mistake),
        Cost(1, 1e9),
        Cost(2, 2e9),
        gate_tokens=(1, 7),
    )


@pytest.mark.interpret
@pytest.mark.parametrize("mistake", ["", "value", "gradient", "unwritten", "race"])
def test_a_red_gate_gets_no_time(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Case] = []
    for clock in ("time_forward", "time_backward"):
        monkeypatch.setattr(bench, clock, lambda case, device: timed.append(case) or 0.5)
    results = list(bench.measure(case(mistake), CPU))
    assert [result.seconds for result in results] == ([None, None] if mistake else [0.5, 0.5])
    assert len(timed) == (0 if mistake else 2)
    assert [result.direction for result in results] == ["forward", "backward"]


@pytest.mark.interpret
def test_a_red_case_has_its_row_and_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first case is wrong, the second cannot be run, the third is fine."""
    for clock in ("time_forward", "time_backward"):
        monkeypatch.setattr(bench, clock, lambda case, device: 0.5)

    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    cases = [case("value"), dataclasses.replace(case(), op="broken", run=fails, backward=None), case()]
    path = tmp_path / "ops.jsonl"
    lines = bench.measure_all(cases, CPU, RUN, path, Console(quiet=True))
    assert [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()] == lines
    rows = [line["row"] for line in lines]
    assert [(row["op"], row["direction"], row["ms"]) for row in rows] == [
        ("square", "forward", "red"),
        ("square", "backward", "red"),
        ("broken", "forward", "red"),
        ("square", "forward", "500.000"),
        ("square", "backward", "500.000"),
    ]


@pytest.mark.interpret
def test_finished_cases_are_kept_when_a_run_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for clock in ("time_forward", "time_backward"):
        monkeypatch.setattr(bench, clock, lambda case, device: 0.5)

    def stopped(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    path = tmp_path / "ops.jsonl"
    with pytest.raises(KeyboardInterrupt):
        bench.measure_all([case(), dataclasses.replace(case(), run=stopped)], CPU, RUN, path, Console(quiet=True))
    assert len(path.read_text(encoding="utf8").splitlines()) == 2


@pytest.mark.interpret
def test_the_rehearsal_goes_through_every_length_and_direction() -> None:
    seen: list[tuple[int, bool]] = []

    def note(x: Tensor) -> Tensor:
        seen.append((len(x), torch.is_grad_enabled()))
        return x.square()

    bench.rehearse(dataclasses.replace(case(), run=note, tokens=9), CPU)
    assert seen == [(1, True), (7, True), (9, False), (9, True)]


@pytest.mark.interpret
def test_an_op_without_a_gradient_is_timed_forward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "time_forward", lambda case, device: 0.5)
    forward_only = dataclasses.replace(case(), run=lambda x: square("")(x).detach(), backward=None)
    assert [result.direction for result in bench.measure(forward_only, CPU)] == ["forward"]


@pytest.mark.interpret
def test_the_gate_names_the_worst_difference() -> None:
    assert max(d.relative for d in gate(case(), CPU)) < 1e-6
    assert max(d.relative for d in gate(case("value"), CPU)) == pytest.approx(1e-3, rel=0.01)
    assert any(math.isnan(d.relative) for d in gate(case("unwritten"), CPU))
    assert any(math.isinf(d.relative) for d in gate(case("race"), CPU))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: f"{CASES[index].op}-{index}")
def test_every_case_makes_inputs_that_its_op_takes(index: int) -> None:
    """The reference with the dtypes of the card: the gate's tolerances leave room for rounding."""
    chosen = CASES[index]
    inputs = (chosen.gate_inputs or chosen.inputs)(2, CPU)
    rounded = results(chosen.run, inputs, "reference", ())
    exact = results(chosen.run, [double(x) for x in inputs], "reference", rounded)
    for ours, wanted in zip(rounded, exact, strict=True):
        assert chosen.accepts(difference(ours, ours, wanted))


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: f"{CASES[index].op}-{index}")
def test_no_kernel_waits_for_the_host(index: int) -> None:
    device = torch.device("cuda")
    chosen = CASES[index]
    inputs = (chosen.gate_inputs or chosen.inputs)(127, device)
    leaves = [x.requires_grad_(x.is_floating_point()) if x is not None else None for x in inputs]
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = outputs_of(chosen.run(*leaves))
        gradients_of(outputs, leaves, [torch.ones_like(y) for y in outputs])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rows_fit_the_readme(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks" / "results" / "h100" / "ops.jsonl"
    lines = [bench.record(Result(case(), way, Cost(1, 1e9), 1e-3, 1e-3), RUN) for way in ("forward", "backward")]
    bench.append(path, lines[:1])
    bench.append(path, lines[1:])
    assert [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()] == lines
    readme = runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools" / "readme.py"))
    table = readme["result_tables"](tmp_path)
    assert "| square | any | forward | 1.000 | 1,000 GB/s | 2,000 GB/s copy | 50% | 1.0e-03 |" in table
    assert "`leadline bench ops` on NVIDIA H100 80GB HBM3, 2026-01-01, commit 0123abc" in table


def test_speed_is_a_share_of_the_measured_ceiling() -> None:
    matmul = Case("square", "any", lambda tokens, device: [], square(""), Cost(4e11, 1), Cost(1, 1), ceiling="matmul")
    assert bench.speed(Result(matmul, "forward", matmul.forward, 0.0, 1e-3), RUN.ceilings) == ("400 TFLOP/s", "50%")
    assert bench.speed(Result(matmul, "forward", matmul.forward, 1.0, None), RUN.ceilings) == ("", "")


@pytest.mark.parametrize("words", [["--only", "rope,swiglu"], ["--only=rope,swiglu"], ["only=rope,swiglu"]])
def test_only(words: list[str]) -> None:
    assert bench.parse(["ops", *words, "out=x.jsonl"]) == Options(("rope", "swiglu"), Path("x.jsonl"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected 'leadline bench ops'"),
        (["op"], "expected 'leadline bench ops'"),
        (["ops", "--only", "ropes"], "unknown op 'ropes': did you mean 'rope'"),
        (["ops", "--only"], "--only: expected names of ops"),
        (["ops", "--fast"], "'fast' is not understood"),
    ],
)
def test_wrong_command_lines_are_named(words: list[str], message: str) -> None:
    with pytest.raises((BenchError, UsageError), match=message):
        bench.parse(words)


def test_slug() -> None:
    assert bench.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert bench.slug("Tesla T4 (x2)") == "tesla-t4-x2"


@pytest.mark.interpret
def test_without_a_card_nothing_is_measured() -> None:
    with pytest.raises(BenchError, match="needs a CUDA device"):
        bench.main(["ops"])
