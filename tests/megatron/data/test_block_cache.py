from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data import block_cache
from megatron.data.block_cache import BlockCache

BLOCK = 100


@pytest.fixture
def cache(tmp_path: Path) -> BlockCache:
    return BlockCache(folder=tmp_path / "cache", limit_bytes=10 * BLOCK, block_bytes=BLOCK)


def content(block: int) -> bytes:
    return bytes([block % 256]) * BLOCK


def read(cache: BlockCache, block: int, fetched: list[int]) -> bytes:
    def fetch() -> bytes:
        fetched.append(block)
        return content(block)

    return cache.read("file", block, num_bytes=BLOCK, start=3, stop=7, fetch=fetch)


def stored(cache: BlockCache) -> dict[int, Path]:
    return {int(path.name): path for path in (cache.folder / "blocks").glob("*/*/*") if path.name.isdigit()}


def test_a_block_is_fetched_once(cache: BlockCache) -> None:
    fetched: list[int] = []
    assert [read(cache, block, fetched) for block in (1, 2000, 1, 2000)] == [content(1)[3:7], content(2000)[3:7]] * 2
    assert fetched == [1, 2000]


@settings(max_examples=40, deadline=None)
@given(blocks=st.lists(st.integers(0, 30), max_size=60))
def test_the_bound_holds_and_the_bytes_are_right_whatever_is_read(blocks: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = BlockCache(folder=tmp_path_factory.mktemp("cache"), limit_bytes=5 * BLOCK + 50, block_bytes=BLOCK)
    for block in blocks:
        assert read(cache, block, []) == content(block)[3:7]
        sizes = [path.stat().st_size for path in stored(cache).values()]
        assert sum(sizes) <= cache.limit_bytes
        assert sum(sizes) == int((cache.folder / "bytes").read_text())


def test_the_blocks_not_read_for_longest_go_first(cache: BlockCache) -> None:
    for block in range(10):
        read(cache, block, [])
        age = 10_000 - block
        os.utime(stored(cache)[block], (time.time() - age, time.time() - age))
    read(cache, 0, [])  # is noted, because its last reading was long ago
    read(cache, 10, [])
    assert set(stored(cache)) == {0, *range(3, 11)}


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"x" * (BLOCK - 1)), lambda path: path.write_bytes(b""), Path.unlink])
def test_a_block_that_is_not_whole_is_fetched_again(damage: Callable[[Path], object], cache: BlockCache) -> None:
    read(cache, 4, [])
    damage(stored(cache)[4])
    fetched: list[int] = []
    assert [read(cache, 4, fetched) for _ in range(2)] == [content(4)[3:7]] * 2
    assert fetched == [4]


@pytest.mark.parametrize("noted", ["", "many", None])
def test_a_lost_sum_is_counted_again(noted: str | None, cache: BlockCache) -> None:
    for block in range(3):
        read(cache, block, [])
    (cache.folder / "bytes").unlink() if noted is None else (cache.folder / "bytes").write_text(noted)
    read(cache, 3, [])
    assert (cache.folder / "bytes").read_text() == str(4 * BLOCK)


def test_what_a_killed_process_half_wrote_goes_when_room_is_made(cache: BlockCache) -> None:
    for block in range(9):
        read(cache, block, [])
    old, young = (stored(cache)[0].with_name(f"{block}.someone.part") for block in (50, 51))
    for part in (old, young):
        part.write_bytes(b"half")
    os.utime(old, (0, 0))
    for block in range(9, 12):
        read(cache, block, [])
    assert not old.exists()
    assert young.exists()


def test_a_bound_of_nothing_keeps_nothing(tmp_path: Path) -> None:
    cache = BlockCache(folder=tmp_path / "cache", limit_bytes=0, block_bytes=BLOCK)
    assert read(cache, 1, []) == content(1)[3:7]
    assert not cache.folder.exists()


def test_a_copy_is_made_once_and_not_at_all_if_that_fails(cache: BlockCache) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise ValueError("the network")

    with pytest.raises(ValueError, match="the network"):
        cache.copy_of("index", fail)
    assert {path.suffix for path in (cache.folder / "whole").iterdir()} == {".lock"}
    for text in (b"first", b"second"):
        path = cache.copy_of("index", lambda place, text=text: place.write_bytes(text))  # type: ignore[misc]
        assert path.read_bytes() == b"first"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = BlockCache(folder=tmp_path / "file" / "cache", limit_bytes=1000, block_bytes=BLOCK)
    with pytest.raises(ValueError, match=r"cannot hold copies of remote data .* set XDG_CACHE_HOME"):
        read(cache, 0, [])


def test_a_full_disk_is_said(cache: BlockCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(block_cache.os, "replace", full)
    with pytest.raises(ValueError, match=r"No space left on device.* lower remote_cache_gb"):
        read(cache, 0, [])
    assert not list((cache.folder / "blocks").glob("*/*/*"))


def test_processes_that_read_the_same_blocks_share_them_and_keep_the_bound(cache: BlockCache) -> None:
    children = []
    for child in range(4):
        if (pid := os.fork()) == 0:
            try:
                wrong = sum(read(cache, (block * (child + 1)) % 23, []) != content((block * (child + 1)) % 23)[3:7] for block in range(80))
            except BaseException:
                wrong = 99
            os._exit(min(wrong, 99))
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
    sizes = [path.stat().st_size for path in stored(cache).values()]
    assert sum(sizes) == int((cache.folder / "bytes").read_text()) <= cache.limit_bytes
