"""`leadline plan`: what it prints, what it refuses."""

from __future__ import annotations

import json

import pytest

from leadline.__main__ import main
from leadline.model.config import PRESETS, TINY
from leadline.recipes import plan


def test_json_at_a_million_tokens(capsys):
    assert main(["plan", "flash", "--context", "1M", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["context"] == 1048576
    assert values["kv_cache_bytes"] == 3688172544
    assert f"{values['flops_ratio_v32']:.1%} {values['kv_cache_ratio_v32']:.1%}" == "10.1% 7.3%"
    assert f"{values['parameters_total'] / 1e9:.2f} {values['parameters_active'] / 1e9:.2f}" == "284.33 13.27"
    assert f"{values['flops_per_token'] / 1e9:.1f}" == "120.7"


@pytest.mark.parametrize("preset", PRESETS)
def test_parts_sum_to_their_totals(preset):
    values = plan.plan(PRESETS[preset], 100_000)
    assert sum(values["parameters"].values()) == values["parameters_total"]
    assert sum(values["flops"].values()) == pytest.approx(values["flops_per_token"])
    assert sum(values["kv_cache"].values()) == values["kv_cache_bytes"]
    memory = values["training_memory"]
    parts = ("weights", "gradients", "muon_momentum", "adamw_moments")
    assert sum(memory[part] for part in parts) == memory["total"]


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("pro", ("1573.00B", "48.85B", "319.4 GFLOP", "26.7%", "5.280 GB", "10.5%", "49.78B", "25.84B", "671.88B")),
        ("flash", ("284.33B", "13.27B", "120.7 GFLOP", "10.1%", "3.688 GB", "7.3%", "13.80B", "6.61B", "1.195 TFLOP")),
    ],
)
def test_page_shows_the_published_numbers(preset, expected, capsys):
    assert main(["plan", preset, "--context", "1M"]) == 0
    page = capsys.readouterr().out
    for text in expected:
        assert text in page
    assert max(map(len, page.splitlines())) <= 80


def test_folder_and_preset_give_the_same_plan(tmp_path, capsys):
    (tmp_path / "config.json").write_text(TINY.to_json(), encoding="utf8")
    for model in ("tiny", str(tmp_path), str(tmp_path / "config.json")):
        assert main(["plan", model, "--context=4K", "--json"]) == 0
    pages = capsys.readouterr().out.split("}\n{")
    assert len({page.strip("{}\n") for page in pages}) == 1


@pytest.mark.parametrize("arguments", [["--context", "128K"], ["--context=131072"], ["context=128k"]])
def test_spellings_of_the_context(arguments):
    assert plan.parse(["flash", *arguments]).context == 131072


def test_default_context_is_the_longest_the_model_is_made_for(capsys):
    assert main(["plan", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["context"] == TINY.max_position_embeddings


def test_longer_context_than_the_model_is_made_for_is_said(capsys):
    assert main(["plan", "tiny", "--context", "8K"]) == 0
    assert "made for at most 4,096 tokens" in capsys.readouterr().out


def test_override_and_show(capsys):
    assert main(["plan", "flash", "index_topk=1024", "--show"]) == 0
    assert "index_topk = 1024" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one preset or checkpoint folder, got none"),
        (["flash", "pro"], "expected one preset or checkpoint folder, got flash pro"),
        (["flsh"], "unknown preset or folder 'flsh': did you mean 'flash'?"),
        (["flash", "--context", "many"], "--context 'many': expected a positive number of tokens"),
        (["flash", "--context", "0"], "--context '0': expected a positive number of tokens"),
        (["flash", "--context", "-5"], "--context '-5': expected a positive number of tokens"),
        (["flash", "--context"], "--context '': expected a positive number of tokens"),
        (["flash", "--jsn"], "unknown option '--jsn'"),
        (["flash", "index_topkk=3"], "unknown key 'index_topkk': did you mean 'index_topk'?"),
        (["flash", "o_groups=7"], "config field 'o_groups' = 7: must divide num_attention_heads"),
    ],
)
def test_refusals_are_one_line(arguments, message, capsys):
    assert main(["plan", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_folder_without_a_config_is_named(tmp_path, capsys):
    assert main(["plan", str(tmp_path)]) == 1
    assert "no such file" in capsys.readouterr().err
