"""The V3.2 layer of the comparison computes what a plain dense one does, by its reference and by its kernels, and the
result file has the promised form."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from leadline.formats import fp8
from leadline.model.config import FLASH
from leadline.ops.dispatch import implementation

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def v32(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark as a module; scripts lie outside of the package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("v32_layer_h100")


@pytest.fixture
def shape(v32: ModuleType) -> object:
    """Of a layer that a CPU computes in no time."""
    return v32.Shape(
        hidden_size=64,
        num_attention_heads=32,
        q_lora_rank=32,
        kv_lora_rank=256,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        index_n_heads=16,
        index_head_dim=32,
        index_topk=100,
    )


@pytest.fixture
def side(v32: ModuleType, shape: object) -> object:
    return v32.V32Side(shape, torch.float32, CPU)


@pytest.mark.parametrize("positions", [(0,), (127, 99), (100, 128, 300)])
def test_the_layer_is_the_dense_one(v32: ModuleType, side: object, positions: tuple[int, ...]) -> None:
    assert v32.gate(side, positions) <= 1e-5


@pytest.mark.interpret
@pytest.mark.parametrize("positions", [(0,), (99, 511), (130, 70, 300)])
def test_the_kernels_are_the_dense_layer(
    v32: ModuleType, shape: object, monkeypatch: pytest.MonkeyPatch, positions: tuple[int, ...]
) -> None:
    monkeypatch.setattr(v32, "serve_in_fp8", lambda module: None)  # interpreting FP8 products takes half a minute
    side = v32.V32Side(shape, torch.float32, CPU)
    with implementation("kernel"):
        assert v32.gate(side, positions) <= 1e-4


@pytest.mark.gpu
def test_on_a_gpu(v32: ModuleType) -> None:
    device = torch.device("cuda")
    assert v32.gate(v32.V32Side(v32.Shape(), torch.bfloat16, device), (2500, 1)) <= v32.GATE_TOLERANCE


@pytest.mark.parametrize("part", ["attend", "pick", "write"])
def test_the_gate_sees_what_is_wrong(v32: ModuleType, side: object, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    layer = v32.LatentAttention
    right = getattr(layer, part)
    wrong = {
        "attend": lambda *arguments: 1.1 * right(*arguments),
        "pick": lambda *arguments: (right(*arguments) - 5).clamp_min(0),
        "write": lambda self, x, step, cache: right(self, x.roll(1, -1), step, cache),
    }
    monkeypatch.setattr(layer, part, wrong[part])
    assert v32.gate(side, (300,)) > v32.GATE_TOLERANCE


def test_bytes_of_a_token_are_the_published_ones(v32: ModuleType) -> None:
    cache = v32.LatentCache(v32.Shape(), 2, 300, torch.bfloat16, torch.device("meta"))
    assert cache.capacity == 512
    assert cache.num_bytes == 2 * 512 * (656 + 132)


def test_layers_of_both_models_decode(v32: ModuleType) -> None:
    small = FLASH.replace(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=128,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=16,
        index_topk=8,
        index_n_heads=4,
        index_head_dim=64,
        torch_dtype="float32",
    )
    for ratio, entries in ((0, 0), (4, 128 // 4 * (192 + 8 + 32 + 2)), (128, 192 + 8)):
        ready = v32.V4Side(small, ratio, CPU).at(2, 256)
        assert ready.work().isfinite().all()
        assert ready.work().shape == (2, 64)
        assert ready.cache_bytes >= 2 * (2 * entries + 128 * (192 + 8))


def test_models_have_all_their_layers(v32: ModuleType) -> None:
    counts = {model: sum(v32.layers_of(model).values()) for model in ("V3.2", "V4-Pro", "V4-Flash")}
    assert counts == {"V3.2": 61, "V4-Pro": 61, "V4-Flash": 43}


def test_lines_have_the_promised_form(v32: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    readme = importlib.import_module("readme")
    shared = {"machine": "a card", "time": "2026-11-24T12:00:00+00:00", "commit": "abc", "versions": {"torch": "2"}}
    names = [name for model in ("V3.2", "V4-Pro", "V4-Flash") for name in v32.layers_of(model)]
    first = {name: v32.Measured(1e-4, 5e-5, 1e6) for name in names}
    found = {name: v32.Measured(3e-4 if name == "V3.2" else 2e-4, 1e-4, 1e8) for name in names}
    lines = v32.lines_at(found, 1, 2**20, first, shared)
    assert all(set(line) >= readme.RESULT_KEYS for line in lines)
    shown = [line for line in lines if line["benchmark"] not in readme.STORED_ONLY]
    assert {line["benchmark"] for line in shown} == {"v32_model"}
    for line in shown:
        assert set(readme.CASES[line["benchmark"]]) <= set(line["row"])
    rows = {line["row"]["attention of"]: line["row"] for line in lines if line["benchmark"] == "v32_model"}
    assert rows["V4-Pro"]["of V3.2's"] == "67%"
    assert rows["V4-Pro"]["of V3.2's ms since"] == "50%"
    assert (rows["V4-Pro"]["published work"], rows["V4-Flash"]["published cache"]) == ("27%", "7%")
    assert rows["V4-Flash"]["of V3.2's cache"] == f"{43 / 61:.1%}"
    assert {row["published work"] for row in rows.values()} == {"", "27%", "10%"}
    shortest = v32.lines_at(first, 1, 4096, first, shared)[-1]["row"]
    assert shortest["ms since the shortest"] == shortest["published work"] == ""


def test_without_a_gpu_it_says_so(
    v32: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert v32.main([]) == 1
    assert capsys.readouterr().err == "v32_layer_h100: no CUDA device found: this benchmark decodes on a GPU\n"


@pytest.mark.interpret
def test_rows_are_rounded_as_the_format_says(v32: ModuleType) -> None:
    kernels = importlib.import_module("v32_kernels")
    magnitude = torch.logspace(-9, 9, 5 * 256).view(5, 256)
    x_XK = torch.where(torch.rand(5, 256) < 0.5, -magnitude, magnitude)
    x_XK[2, :128] = 0.0
    codes, scales = torch.zeros(9, 256, dtype=torch.uint8), torch.zeros(9, 2)
    kernels.quantize_rows(x_XK, torch.tensor([8, 0, 3, 5, 2]), codes, scales, 128)
    right, scale = fp8.quantize(x_XK, 128)
    assert torch.equal(codes[[8, 0, 3, 5, 2]], right.view(torch.uint8))
    assert torch.equal(scales[[8, 0, 3, 5, 2]], scale)
    assert not codes[[1, 4, 6, 7]].any()
