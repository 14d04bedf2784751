"""Conversion: values survive what can be survived, bytes are those of an uninterrupted run, failure leaves nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from leadline.model.config import PRESETS, ModelConfig
from leadline.weights import convert as convert_module
from leadline.weights.compare import compare
from leadline.weights.contents import Contents
from leadline.weights.convert import Conversion, convert, prepare
from leadline.weights.files import ShardWriter
from leadline.weights.header import CheckpointError
from leadline.weights.names import NAMINGS
from leadline.weights.synthetic import few_layers, make_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
WIDE = PRESETS["tiny"].replace(moe_intermediate_size=128)
SHARD = 60_000


def converted(source: Path, target: Path, **options: object) -> Path:
    convert(prepare(source, Conversion(**options)), target)  # type: ignore[arg-type]
    return target


def all_equal(first: Path, second: Path) -> bool:
    return all(row.equal for row in compare(Contents(first), Contents(second)))


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def four(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "four", WIDE, "fp4")
    return tmp_path / "four"


def test_down_and_up_again_changes_no_value(tmp_path: Path, four: Path) -> None:
    eight = converted(four, tmp_path / "eight", format="fp8")
    plain = converted(eight, tmp_path / "plain", format="bf16", naming="transformers")
    again = converted(plain, tmp_path / "again", format="fp4", naming="official")
    for folder in (eight, plain, again):
        assert all_equal(folder, four), folder


def test_rounding_happens_once(tmp_path: Path) -> None:
    """A folder that was quantised once is not changed by being quantised again."""
    make_checkpoint(tmp_path / "plain", WIDE, "bf16")
    for format in ("fp8", "fp4"):
        once = converted(tmp_path / "plain", tmp_path / f"{format} once", format=format)
        assert not all_equal(once, tmp_path / "plain")
        there = converted(once, tmp_path / f"{format} there", format="bf16")
        assert all_equal(converted(there, tmp_path / f"{format} back", format=format), once)


@pytest.mark.parametrize("format", ["bf16", "fp8", "fp4"])
def test_the_result_is_what_saving_gives(tmp_path: Path, format: str) -> None:
    make_checkpoint(tmp_path / "source", WIDE, "bf16", naming="transformers", max_shard_bytes=SHARD)
    for naming in NAMINGS:
        make_checkpoint(tmp_path / naming, WIDE, "bf16", naming=naming)
        wanted = converted(tmp_path / naming, tmp_path / f"{naming} wanted", format=format)
        found = converted(tmp_path / "source", tmp_path / f"{naming} found", format=format, naming=naming)
        assert files_of(found) == files_of(wanted)


def test_without_a_format_bytes_are_copied(tmp_path: Path, four: Path) -> None:
    same = converted(four, tmp_path / "same")
    assert files_of(same) == files_of(four)
    stacked = converted(four, tmp_path / "stacked", naming="transformers", max_shard_bytes=SHARD)
    assert files_of(converted(stacked, tmp_path / "back", naming="official")) == files_of(four)


def test_scales_of_another_dtype(tmp_path: Path, four: Path) -> None:
    wide = converted(four, tmp_path / "wide", scales=torch.float32)
    tensors = load_file(wide / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for name, tensor in tensors.items() if name.endswith(".scale"))
    assert all_equal(wide, four)
    narrow = converted(wide, tmp_path / "narrow", format="fp4", scales=torch.float8_e8m0fnu)
    assert files_of(narrow) == files_of(four)


def test_the_golden_folder_of_another_program(tmp_path: Path) -> None:
    """Its scales follow another rule than ours; its values survive all the same."""
    source = GOLDEN / "served"
    for format in ("fp8", "bf16"):
        source = converted(source, tmp_path / format, format=format)
        assert all_equal(source, GOLDEN / "served")
    assert all_equal(converted(source, tmp_path / "fp4", format="fp4"), GOLDEN / "served")


def test_draft_stages_come_along(tmp_path: Path) -> None:
    config = few_layers(WIDE, 4, draft_stages=True)
    make_checkpoint(tmp_path / "source", config, "fp4")
    target = converted(tmp_path / "source", tmp_path / "target", format="fp8")
    tensors = load_file(target / "model.safetensors")
    assert tensors["mtp.0.main_proj.weight"].dtype == torch.float8_e4m3fn
    assert tensors["mtp.0.main_proj.scale"].dtype == torch.float32
    assert tensors["mtp.2.markov_head.markov_w2.weight"].dtype == torch.bfloat16
    assert tensors["mtp.1.ffn.experts.2.w3.weight"].dtype == torch.float8_e4m3fn
    assert ModelConfig.from_file(target).extra == config.extra
    assert all_equal(target, tmp_path / "source")


def test_config_says_what_the_weights_are(tmp_path: Path, four: Path) -> None:
    quantization = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }  # fmt: skip
    for format in ("bf16", "fp8", "fp4"):
        values = json.loads((converted(four, tmp_path / format, format=format) / "config.json").read_text())
        assert values["torch_dtype"] == "bfloat16"
        assert values.get("quantization_config") == (None if format == "bf16" else quantization)
        assert values.get("expert_dtype") == (None if format == "bf16" else format)
    named = converted(four, tmp_path / "named", naming="transformers")
    values = json.loads((named / "config.json").read_text())
    assert "layer_types" in values
    assert values["expert_dtype"] == "fp4"


def test_the_other_files_of_a_checkpoint_come_along(tmp_path: Path, four: Path) -> None:
    (four / "tokenizer.json").write_text("{}")
    (four / "generation_config.json").write_text('{"temperature": 0.6}')
    (four / "notes.txt").write_text("no part of it")
    target = converted(four, tmp_path / "target", format="fp8")
    assert set(files_of(target)) == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert files_of(target)["generation_config.json"] == b'{"temperature": 0.6}'


def test_progress_ends_at_the_total(tmp_path: Path, four: Path) -> None:
    written: list[int] = []
    job = prepare(four, Conversion(format="fp8"))
    convert(job, tmp_path / "target", written.append)
    assert sum(written) == job.total_bytes
    assert len(written) > 100


# -- interruptions --


KILLED = textwrap.dedent(
    """
    import os, sys, time
    from leadline.weights.convert import Conversion, convert, prepare
    source, target, runs = sys.argv[1], sys.argv[2], int(sys.argv[3])
    job = prepare(source, Conversion(format="fp8", max_shard_bytes=60_000))
    for _ in range(runs):
        child = os.fork()
        if child == 0:
            convert(job, target, lambda written: time.sleep(3e-3))
            os._exit(0)
        print(child, flush=True)
        os.waitpid(child, 0)
        sys.stdin.readline()
    """
)


def test_killed_at_random_points_it_still_gives_the_same_bytes(tmp_path: Path, four: Path) -> None:
    """A fresh process forks the conversion; this one kills it with SIGKILL, again and again."""
    straight = converted(four, tmp_path / "straight", format="fp8", max_shard_bytes=SHARD)
    target, runs = tmp_path / "killed", 8
    command = [sys.executable, "-c", KILLED, str(four), str(target), str(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    kept: list[int] = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(runs):
            child = int(process.stdout.readline())
            time.sleep(random.uniform(0.005, 0.1))
            os.kill(child, signal.SIGKILL)
            assert not target.exists(), "nothing half-written has the name"
            partial = list(tmp_path.glob(".killed.partial-*"))
            assert len(partial) <= 1
            kept.append(len(list(partial[0].glob("*.safetensors"))) if partial else 0)
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0
    assert kept == sorted(kept), "finished shards are kept"
    assert kept[-1] > 0
    converted(four, target, format="fp8", max_shard_bytes=SHARD)
    assert files_of(target) == files_of(straight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["four", "killed", "straight"]


def interrupted(four: Path, target: Path, after: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Convert with an error in the middle."""
    calls = 0
    append = ShardWriter.append

    def failing(self: ShardWriter, name: str, piece: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise error
        append(self, name, piece)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", failing)
        with pytest.raises(type(error)):
            converted(four, target, format="fp8", max_shard_bytes=SHARD)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["ctrl-c", "disk"])
def test_the_next_run_goes_on_where_the_last_one_stopped(
    tmp_path: Path, four: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    interrupted(four, tmp_path / "target", 150, monkeypatch, error)
    (partial,) = tmp_path.glob(".target.partial-*")
    finished = {file.name: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    assert finished
    converted(four, tmp_path / "target", format="fp8", max_shard_bytes=SHARD)
    for name, time_ns in finished.items():
        assert (tmp_path / "target" / name).stat().st_mtime_ns == time_ns, "not written again"
    straight = converted(four, tmp_path / "straight", format="fp8", max_shard_bytes=SHARD)
    assert files_of(tmp_path / "target") == files_of(straight)


@pytest.mark.parametrize("what", ["format", "source"])
def test_another_conversion_does_not_go_on_with_it(
    tmp_path: Path, four: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    interrupted(four, tmp_path / "target", 150, monkeypatch, KeyboardInterrupt())
    if what == "source":
        make_checkpoint(four, WIDE, "fp4", seed=1)
    options = {"format": "bf16" if what == "format" else "fp8", "max_shard_bytes": SHARD}
    converted(four, tmp_path / "target", **options)
    assert files_of(tmp_path / "target") == files_of(converted(four, tmp_path / "straight", **options))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("format", ["fp8", "bf16"])
def test_two_at_once_are_told_apart(tmp_path: Path, four: Path, format: str) -> None:
    """Whether the second one is at the same work, or at another for the same target."""
    job, other = (prepare(four, Conversion(format=wanted)) for wanted in ("fp8", format))
    tried = False

    def second(written: int) -> None:
        nonlocal tried
        if not tried:
            tried = True
            with pytest.raises(BlockingIOError, match=r"target is being written by another process"):
                convert(other, tmp_path / "target")

    convert(job, tmp_path / "target", second)
    assert tried
    assert all_equal(tmp_path / "target", four)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["four", "target"]


# -- what is refused --


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_damage_found_on_the_way_leaves_nothing_behind(tmp_path: Path, four: Path) -> None:
    name = "layers.3.ffn.experts.7.w2.scale"
    edit(four, lambda tensors: tensors[name].view(torch.uint8).fill_(255))
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: tensor layers\.3.*scale nan at \[0, 0\]: the file is"
    ):
        converted(four, tmp_path / "target", format="bf16", max_shard_bytes=SHARD)
    assert [path.name for path in tmp_path.iterdir()] == ["four"]


def test_a_target_that_exists_is_not_touched(tmp_path: Path, four: Path) -> None:
    before = files_of(four)
    with pytest.raises(FileExistsError, match="four exists already: remove it, or choose another name"):
        converted(four, four, format="bf16")
    assert files_of(four) == before


def test_experts_in_several_formats_need_one(tmp_path: Path, four: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["layers.1.ffn.experts.5.w1.scale"]
        tensors["layers.1.ffn.experts.5.w1.weight"] = torch.ones(128, 64)

    edit(four, change)
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1.* is FP4 .*experts\.5\.w1.* is F32 .*give a format"):
        prepare(four, Conversion(naming="transformers"))
    converted(four, tmp_path / "target", format="fp4")


def test_widths_that_a_format_cannot_hold(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "narrow", PRESETS["tiny"], "bf16")
    with pytest.raises(
        CheckpointError, match=r"gate_up_proj fuses two matrices of 32 rows, FP8 needs whole blocks of 128"
    ):
        prepare(tmp_path / "narrow", Conversion(format="fp8", naming="transformers"))
    make_checkpoint(tmp_path / "odd", PRESETS["tiny"].replace(moe_intermediate_size=48), "bf16")
    with pytest.raises(
        CheckpointError, match=r"experts\.0\.w2\.weight \[64, 48\]: FP4 needs rows of whole blocks of 32"
    ):
        prepare(tmp_path / "odd", Conversion(format="fp4"))


def test_too_little_room_is_noticed_before_the_work(
    tmp_path: Path, four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="bytes are needed, 1,000 are free"):
        converted(four, tmp_path / "target", format="bf16")
    assert not (tmp_path / "target").exists()


def test_unknown_options() -> None:
    with pytest.raises(ValueError, match="naming 'hf' is not one of official"):
        Conversion(naming="hf")
    with pytest.raises(ValueError, match=r"scales of torch\.float16 are not written"):
        Conversion(scales=torch.float16)


def anonymous_bytes() -> int:
    """Memory of this process that is no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon line")


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_memory_is_that_of_a_few_matrices(tmp_path: Path, format: str) -> None:
    config = WIDE.replace(hidden_size=256, n_routed_experts=64, moe_intermediate_size=256)
    make_checkpoint(tmp_path / "source", config, "fp4")
    job = prepare(tmp_path / "source", Conversion(format=format, naming="transformers"))
    samples: list[int] = []
    before = anonymous_bytes()
    convert(job, tmp_path / "target", lambda written: samples.append(anonymous_bytes()))
    assert job.total_bytes > 60e6
    assert max(samples) - before < 0.1 * job.total_bytes
