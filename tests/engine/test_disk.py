"""Records on disk: what was written is read, what is damaged is not, and no way of dying leaves half of anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import pytest
import torch
from torch import Tensor

from leadline.engine.disk import DiskCache, DiskCacheError, chain, root_key


def record(seed: int, size: int = 1000) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layers.0.entries": torch.randn(size, generator=generator).to(torch.bfloat16),
        "codes": torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8),
    }


def same(found: dict[str, Tensor] | None, wanted: dict[str, Tensor]) -> bool:
    return (
        found is not None
        and found.keys() == wanted.keys()
        and all(
            torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in wanted.items()
        )
    )


@pytest.fixture
def lines() -> list[str]:
    return []


def opened(folder: Path, lines: list[str], max_bytes: int = 10**6) -> DiskCache:
    return DiskCache(folder, "model", max_bytes, lines.append)


def key(number: int) -> bytes:
    return chain(root_key("model", ""), [number] * 128)


def test_records_outlive_the_process(tmp_path: Path, lines: list[str]) -> None:
    cache = opened(tmp_path, lines)
    cache.write({key(1): record(1)}, {key(1): record(2)})
    cache.close()
    again = opened(tmp_path, lines)
    assert again.has_page(key(1))
    assert again.has_block(key(1))
    assert not again.has_page(key(2))
    assert same(again.read_page(key(1)), record(1))
    assert same(again.read_block(key(1)), record(2))
    assert again.read_page(key(2)) is None
    assert (again.counts.hits, again.counts.misses) == (2, 1)
    assert not lines


def test_a_key_depends_on_everything_before_it() -> None:
    roots = [root_key("a", "b"), root_key("ab", ""), root_key("", "ab"), root_key("a", "c")]
    assert len(set(roots)) == 4
    first, other = chain(roots[0], [1, 2]), chain(roots[0], [2, 1])
    assert len({first, other, chain(first, [1, 2]), chain(other, [1, 2]), chain(roots[1], [1, 2])}) == 5


def test_the_records_used_longest_ago_go_first(tmp_path: Path, lines: list[str]) -> None:
    size = 3000 + 200
    cache = opened(tmp_path, lines, max_bytes=3 * size)
    for number in (1, 2, 3):
        cache.write({key(number): record(number)}, {})
    assert same(cache.read_page(key(1)), record(1))
    cache.write({key(4): record(4)}, {})
    assert [cache.has_page(key(number)) for number in (1, 2, 3, 4)] == [True, False, True, True]
    assert cache.num_bytes <= 3 * size
    assert cache.counts.evicted == 1


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_record_is_dropped_and_the_others_stay(tmp_path: Path, lines: list[str], damage: str) -> None:
    cache = opened(tmp_path, lines)
    cache.write({key(1): record(1), key(2): record(2)}, {})
    with cache._env.begin(write=True, db=cache._records) as change:  # pyright: ignore[reportPrivateUsage]
        value = bytearray(change.get(b"p" + key(1)) or b"")
        value[len(value) // 2] ^= 1
        change.put(b"p" + key(1), bytes(value if damage == "flip" else value[:100]))
    assert cache.read_page(key(1)) is None
    assert not cache.has_page(key(1))
    assert same(cache.read_page(key(2)), record(2))
    assert cache.counts.damaged == 1
    assert len(lines) == 1
    assert "damaged" in lines[0]
    cache.write({key(1): record(1)}, {})
    assert same(cache.read_page(key(1)), record(1))


@pytest.mark.parametrize("damage", ["cut", "head", "empty"])
def test_a_damaged_store_is_set_aside(tmp_path: Path, lines: list[str], damage: str) -> None:
    cache = opened(tmp_path, lines)
    cache.write({key(number): record(number) for number in range(20)}, {})
    cache.close()
    store = tmp_path / "data.mdb"
    content = store.read_bytes()
    store.write_bytes({"cut": content[:-5000], "head": b"x" * 8192 + content[8192:], "empty": b""}[damage])
    for round_ in (1, 2):
        again = opened(tmp_path, lines)
        assert same(again.read_page(key(1)), record(1)) is (round_ == 2)
        again.write({key(1): record(1)}, {})
        again.close()
    assert len(lines) == (damage != "empty")
    assert (tmp_path / "data.damaged").exists() is (damage != "empty")


def test_a_store_that_cannot_be_read_any_more_is_left_alone(
    tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = opened(tmp_path, lines)
    cache.write({key(1): record(1)}, {})

    def fail(write: bool = False) -> None:
        raise lmdb.CorruptedError("MDB_CORRUPTED")

    monkeypatch.setattr(cache, "_begin", fail)
    assert cache.read_page(key(1)) is None
    assert not cache.has_page(key(1))
    cache.write({key(2): record(2)}, {})
    assert len(lines) == 1
    assert "left alone: MDB_CORRUPTED" in lines[0]


def test_only_its_owner_can_read_it(tmp_path: Path, lines: list[str]) -> None:
    opened(tmp_path / "cache", lines).close()
    for path in (tmp_path / "cache", *(tmp_path / "cache").iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path


OTHER = """
import sys
import torch
from leadline.engine.disk import DiskCache, chain, root_key
keys = [chain(root_key("model", ""), [number] * 128) for number in (1, 2)]
cache = DiskCache(sys.argv[1], "model", 2 * 10**8, print)
assert cache.read_page(keys[0]) is not None
cache.write({keys[1]: {"large": torch.ones(10**8, dtype=torch.uint8)}}, {})
cache.close()
"""


def test_two_processes_share_a_folder(tmp_path: Path, lines: list[str]) -> None:
    """The other one allows the store to be larger, and makes it larger."""
    cache = opened(tmp_path, lines)
    cache.write({key(1): record(1)}, {})
    done = subprocess.run([sys.executable, "-c", OTHER, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert same(cache.read_page(key(2)), {"large": torch.ones(10**8, dtype=torch.uint8)})
    cache.write({key(3): record(3)}, {})
    assert same(cache.read_page(key(3)), record(3))
    assert cache.num_bytes < 10**6
    assert lines == []


def test_a_full_disk_ends_the_writing_and_nothing_else(tmp_path: Path, lines: list[str]) -> None:
    cache = opened(tmp_path, lines)
    cache.write({key(1): record(1)}, {})
    cache._env.set_mapsize(1)  # pyright: ignore[reportPrivateUsage]  # smaller than what is there: nothing more fits
    cache.write({key(number): record(number, 400_000) for number in range(2, 40)}, {})
    assert len(lines) == 1
    assert "stops writing" in lines[0]
    assert not cache.has_page(key(2))
    assert same(cache.read_page(key(1)), record(1))
    cache.write({key(50): record(50)}, {})
    assert len(lines) == 1


def test_a_folder_that_cannot_be_one_is_named(tmp_path: Path, lines: list[str]) -> None:
    (tmp_path / "file").write_text("text", encoding="utf8")
    with pytest.raises(DiskCacheError, match="file: cannot be opened"):
        opened(tmp_path / "file", lines)


WRITER = """
import sys, torch
from leadline.engine.disk import DiskCache
from tests.engine.test_disk import key, record
cache = DiskCache(sys.argv[1], "model", 10**8, print)
for number in range(10**6):
    cache.write({key(number): record(number), key(-number - 1): record(number)}, {})
    print(number, flush=True)
"""


@pytest.mark.parametrize("pause", [0.0, 0.03, 0.1])
def test_a_process_killed_while_writing_leaves_whole_records(tmp_path: Path, lines: list[str], pause: float) -> None:
    """kill -9 at any moment: both records of every write that was reported are there, and never one of the two."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    rest = process.communicate()[0].split()
    last = int(rest[-1]) if rest else 0
    cache = opened(tmp_path, lines, 10**8)
    for number in range(last + 3):
        pair = cache.has_page(key(number)), cache.has_page(key(-number - 1))
        assert pair in ((True, True), (False, False))
        if number <= last:
            assert same(cache.read_page(key(number)), record(number))
    assert not lines
