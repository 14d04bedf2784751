"""The comparison of the engine with transformers: both sides compute the same, and the rows say what was measured."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from leadline.model.config import FLASH, ModelConfig

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark as a module; scripts lie outside of the package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("engine_peer")


def small(layers: int, experts: int) -> ModelConfig:
    return FLASH.replace(
        num_hidden_layers=layers,
        compress_ratios=FLASH.layer_ratios[2 : 2 + layers],
        num_nextn_predict_layers=0,
        n_routed_experts=experts,
        expert_dtype=None,
        quantization_config=None,
        vocab_size=256,
        hidden_size=128,
        num_attention_heads=4,
        head_dim=128,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=64,
        index_topk=128,
        index_n_heads=4,
        index_head_dim=128,
        moe_intermediate_size=64,
    )


@pytest.fixture
def sizes(peer: ModuleType) -> object:
    return peer.Sizes(prompt=150, new=3, repeats=1, gate=160, gate_rows=64)


def test_both_sides_give_the_same_logits(peer: ModuleType) -> None:
    config = small(4, 8).replace(torch_dtype="float32")
    model, prompt = peer.build(config, CPU), peer.random_prompt(config, 200)
    ours_TV = peer.our_logits(model, prompt, 64)
    tensors = model.state_dict()
    theirs_TV = peer.their_logits(peer.in_transformers(config, tensors, CPU), prompt, 64, CPU)
    assert not tensors
    assert peer.difference(ours_TV, theirs_TV) <= 1e-5


def test_a_model_is_drawn_twice_alike(peer: ModuleType) -> None:
    first, second = (peer.build(small(2, 8), CPU).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(x, x.to(torch.bfloat16).to(x.dtype)) for x in first.values() if x.is_floating_point())


def test_three_runs_in_bfloat16(peer: ModuleType, sizes: object) -> None:
    times, note = peer.compare(small(4, 8), sizes, CPU)
    assert list(times) == ["leadline bf16", "transformers", "leadline as served"]
    assert all(0 < found.decode < found.prefill for found in times.values())
    assert note.startswith("logits differ by ")


def test_the_gate_sees_a_wrong_weight(peer: ModuleType, sizes: object, monkeypatch: pytest.MonkeyPatch) -> None:
    right = peer.in_transformers

    def wrong(config: ModelConfig, ours: dict[str, torch.Tensor], device: torch.device) -> torch.nn.Module:
        ours["layers.1.attn.kv_norm.weight"] *= 1.3
        return right(config, ours, device)

    monkeypatch.setattr(peer, "in_transformers", wrong)
    with pytest.raises(peer.PeerError, match="nothing is reported"):
        peer.compare(small(2, 8), sizes, CPU)


def test_fewer_layers_where_the_first_choice_does_not_fit(
    peer: ModuleType, sizes: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def compare(config: ModelConfig, *_: object) -> object:
        tried.append(config.num_hidden_layers)
        if config.num_hidden_layers > 4:
            raise torch.OutOfMemoryError
        return dict.fromkeys(("leadline bf16", "transformers"), peer.Times(2.0, 0.5)), "note"

    monkeypatch.setattr(peer, "compare", compare)
    rows = peer.measure(8, sizes, CPU, small)
    assert tried == [12, 8, 4]
    assert [row["work"] for row in rows] == ["prefill", "decode"]
    assert rows[0]["note"] == "note; 12 layers did not fit; 8 layers did not fit"
    assert (rows[0]["layers"], rows[1]["leadline bf16 ms"], rows[1]["leadline bf16 faster"]) == ("4", "500.0", "1.0x")


def test_what_fits_on_an_80_gb_card(peer: ModuleType) -> None:
    fitting = peer.layers_that_fit(peer.config_of(12, 64), 8192, 79.1 * 2**30)
    assert 8 <= fitting < 12
    assert peer.layers_that_fit(peer.config_of(12, 64), 8192, 40 * 2**30) < 2


def test_rows_have_the_promised_form(peer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    readme, engine = importlib.import_module("readme"), importlib.import_module("engine_h100")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    times = {name: peer.Times(0.3, 0.01) for name in ("leadline bf16", "transformers", "leadline as served")}
    for row in peer.rows(times, 8, 8192, "note"):
        line = engine._peer_line(row, 64, "abc")
        assert set(line) >= readme.RESULT_KEYS
        assert set(readme.CASES["engine_peer"]) <= set(line["row"])
