"""Remote files through fsspec: in memory, and over HTTP from a server of this process that counts what it is asked for."""

from __future__ import annotations

import pickle
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest

from megatron.config.schema import DataConfig
from megatron.data import build, remote
from megatron.data.block_cache import BlockCache
from megatron.data.build import IndexBuilder, SampleCounts, build_datasets
from megatron.data.gpt_dataset import GPTDataset
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.loader import BatchLoader
from megatron.data.remote import RemoteFile, exists
from sepllm.pattern import AttentionPattern
from tools.datasets import head

ROWS = [list(range(first, first + 1 + first % 300)) for first in range(0, 2000, 17)]
PATTERN = AttentionPattern(initial_tokens=1, separator_ids=(5,), windows=(2,))


@dataclass
class Server:
    """Serves a folder over HTTP, parts included."""

    folder: Path
    address: str = ""
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    """What was asked for: name, first byte, one past the last."""
    failures: int = 0
    """So many of the next requests fail."""
    sends_parts: bool = True
    says_so: bool = True

    def bytes_of(self, kind: str) -> int:
        return sum(stop - start for name, start, stop in self.ranges if name.endswith(kind))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: apart, the second would wait for the first to be acknowledged

    def __init__(self, server: Server, *given: object) -> None:
        self.state = server
        super().__init__(*given)  # type: ignore[arg-type]

    def log_message(self, *given: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        path = self.state.folder / self.path.strip("/")
        if with_body and self.state.failures:
            self.state.failures -= 1
            return self.send_error(503)
        if not path.is_file():
            return self.send_error(404)
        content, asked = path.read_bytes(), self.headers.get("Range")
        start, stop = 0, len(content)
        if asked and self.state.sends_parts:
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
            assert found
            start, stop = int(found[1]), min(int(found[2]) + 1, len(content))
        self.send_response(206 if stop - start < len(content) else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", str(path.stat().st_mtime_ns))
        if not self.state.says_so:
            self.send_header("Accept-Ranges", "none")
        self.end_headers()
        if with_body:
            self.state.ranges.append((path.name, start, stop))
            self.wfile.write(content[start:stop])
        return None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    state = Server(folder=tmp_path / "served")
    state.folder.mkdir()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, state))
    state.address = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def cache(tmp_path: Path) -> BlockCache:
    return BlockCache(folder=tmp_path / "cache", limit_bytes=1 << 20, block_bytes=1000)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY_AFTER_S", (0.0, 0.0))


def write(prefix: Path, rows: list[list[int]] = ROWS) -> None:
    with IndexedDatasetWriter(prefix, "u2") as writer:
        for row in rows:
            writer.add_document(row)


def in_memory(folder: Path, rows: list[list[int]] = ROWS) -> str:
    """A pair in fsspec's memory; its prefix."""
    write(folder / "pair", rows)
    for kind in ("bin", "idx"):
        fsspec.filesystem("memory").pipe_file(f"/{folder.name}/pair.{kind}", (folder / f"pair.{kind}").read_bytes())
        (folder / f"pair.{kind}").unlink()
    return f"memory://{folder.name}/pair"


def test_a_remote_pair_reads_as_a_local_one(tmp_path: Path, cache: BlockCache) -> None:
    dataset = IndexedDataset(in_memory(tmp_path), cache=cache)
    assert [row.tolist() for row in dataset] == ROWS
    assert dataset.get(50, 3, 9).tolist() == ROWS[50][3:12]
    assert [row.tolist() for row in pickle.loads(pickle.dumps(dataset))] == ROWS
    with pytest.raises(ValueError, match="read-only"):
        dataset[50][0] = 1


def test_only_the_blocks_that_are_read_travel_and_only_once(server: Server, cache: BlockCache) -> None:
    write(server.folder / "pair")
    num_bytes = (server.folder / "pair.bin").stat().st_size
    dataset = IndexedDataset(f"{server.address}/pair", cache=cache)
    assert server.bytes_of(".bin") == 0
    for _ in range(3):
        assert dataset[100].tolist() == ROWS[100]
    assert 0 < server.bytes_of(".bin") <= 2 * cache.block_bytes < num_bytes
    assert [row.tolist() for row in dataset] == ROWS
    assert [row.tolist() for row in IndexedDataset(f"{server.address}/pair", cache=cache)] == ROWS
    assert server.bytes_of(".bin") == num_bytes
    assert server.bytes_of(".idx") == (server.folder / "pair.idx").stat().st_size


def test_a_pair_that_was_made_anew_is_read_anew(server: Server, cache: BlockCache) -> None:
    for rows in (ROWS, [[token + 1 for token in row] for row in ROWS]):
        write(server.folder / "pair", rows)
        assert [row.tolist() for row in IndexedDataset(f"{server.address}/pair", cache=cache)] == rows


def test_a_pair_larger_than_the_bound_is_read_within_it(server: Server, tmp_path: Path) -> None:
    write(server.folder / "pair")
    small = BlockCache(folder=tmp_path / "small", limit_bytes=5000, block_bytes=1000)
    dataset = IndexedDataset(f"{server.address}/pair", cache=small)
    for _ in range(2):
        assert [row.tolist() for row in dataset] == ROWS
        assert sum(path.stat().st_size for path in (small.folder / "blocks").glob("*/*/*")) <= 5000


def test_requests_that_fail_are_made_again_and_given_up_in_a_sentence(server: Server, cache: BlockCache) -> None:
    write(server.folder / "pair")
    dataset = IndexedDataset(f"{server.address}/pair", cache=cache)
    server.failures = 2
    assert dataset[100].tolist() == ROWS[100]
    server.failures = 99
    with pytest.raises(ValueError, match=r"Bytes 0 to 1000 of http.*/pair.bin cannot be read, after 3 attempts: .*503"):
        dataset[1]


def test_a_file_that_shrank_or_went_meanwhile_is_said(server: Server, cache: BlockCache) -> None:
    write(server.folder / "pair")
    dataset = IndexedDataset(f"{server.address}/pair", cache=cache)
    content = (server.folder / "pair.bin").read_bytes()
    (server.folder / "pair.bin").write_bytes(content[:500])
    with pytest.raises(ValueError, match=r"pair.bin sent 500 bytes when asked for 1000 \(from byte 0\)"):
        dataset[5]
    (server.folder / "pair.bin").unlink()
    with pytest.raises(ValueError, match="can no longer be read"):
        dataset[5]


def test_a_server_that_sends_whole_files_is_refused(server: Server, cache: BlockCache) -> None:
    write(server.folder / "pair")
    server.sends_parts = False
    with pytest.raises(ValueError, match="does not send parts of files"):
        IndexedDataset(f"{server.address}/pair", cache=cache)[5]
    server.says_so = False
    with pytest.raises(ValueError, match="sends whole files only: copy it to a disk"):
        IndexedDataset(f"{server.address}/pair", cache=cache)


def test_a_truncated_remote_pair_is_refused_by_its_address(server: Server, cache: BlockCache) -> None:
    write(server.folder / "pair")
    path = server.folder / "pair.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{server.address}/pair.idx: sequence {len(ROWS) - 1} .* does not lie in {server.address}/pair.bin"):
        IndexedDataset(f"{server.address}/pair", cache=cache)


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_a_missing_remote_file_is_named(kind: str, server: Server, cache: BlockCache) -> None:
    write(server.folder / "pair")
    (server.folder / f"pair.{kind}").unlink()
    assert [exists(f"{server.address}/pair.{each}") for each in ("bin", "idx")] == [kind != "bin", kind != "idx"]
    with pytest.raises(FileNotFoundError, match=rf"pair.{kind} does not exist \(404.*\): a data path is the common prefix"):
        IndexedDataset(f"{server.address}/pair", cache=cache)


def test_a_protocol_that_nobody_knows_is_refused(cache: BlockCache) -> None:
    with pytest.raises(ValueError, match=r"nowhere://x\.bin names no protocol that fsspec knows"):
        RemoteFile.open("nowhere://x.bin", cache)


def test_a_protocol_whose_package_is_missing_names_it(cache: BlockCache) -> None:
    fsspec.register_implementation("lostandfound", "no_such_package.Files", clobber=True, errtxt="Install no-such-package to read lostandfound")
    with pytest.raises(ValueError, match="needs a package that is not installed: Install no-such-package"):
        RemoteFile.open("lostandfound://x.bin", cache)


def test_nobody_listening_is_a_sentence(cache: BlockCache) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not exist \(Cannot connect to host 127\.0\.0\.1:9"):
        IndexedDataset("http://127.0.0.1:9/pair", cache=cache)


@pytest.mark.parametrize("place", [0, 1, 999, 1000, 1001, 2500])
@pytest.mark.parametrize("length", [0, 1, 999, 1000, 1001, 2000])
def test_any_part_of_a_file_is_its_bytes(place: int, length: int, cache: BlockCache) -> None:
    content = bytes(np.random.RandomState(0).randint(0, 256, 2600, dtype=np.uint8))
    fsspec.filesystem("memory").pipe_file("/any/bytes", content)
    assert RemoteFile.open("memory://any/bytes", cache)[place : place + length].tobytes() == content[place : place + length]


@pytest.fixture
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BlockCache:
    """Where `build_datasets` keeps remote data."""
    cache = BlockCache(folder=tmp_path / "user", limit_bytes=1 << 20, block_bytes=1000)
    monkeypatch.setattr(build.BlockCache, "of_user", lambda limit_gb=10.0: cache)
    return cache


def datasets(data: DataConfig, builder: IndexBuilder | None = None) -> build.Datasets:
    return build_datasets(data, seq_length=16, samples=SampleCounts(train=200, valid=8, test=0), seed=1, builder=builder)


def test_a_run_over_http_reads_what_a_local_one_reads(server: Server, user_cache: BlockCache) -> None:
    write(server.folder / "pair")
    here, there = (datasets(DataConfig(data_path=f"{place}/pair", split="9,1,0")).train for place in (server.folder, server.address))
    assert isinstance(there, GPTDataset)
    for loader in ([BatchLoader(part, PATTERN, micro_batch_size=4, num_workers=2) for part in (here, there) if part is not None],):
        for local, remote_batch in zip(*(islice(each, 50) for each in loader), strict=True):
            assert local.ids.tolist() == remote_batch.ids.tolist()
    arrays = [path.name for path in (user_cache.folder / "indices").rglob("*.npy")]
    assert sorted(arrays)[:3] == [f"pair_train_indexmap_200ns_16sl_1s_packedpi_ac_{array}.npy" for array in ("doc_idx", "sample_idx", "shuffle_idx")]
    assert isinstance(there.index.doc_idx, np.memmap)


def test_the_index_of_remote_data_is_built_once_on_each_node(tmp_path: Path, user_cache: BlockCache, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    data = DataConfig(train_data_paths=(in_memory(tmp_path),))
    for local_rank in (0, 1):
        builder = IndexBuilder.of_rank(rank=8 + local_rank, local_rank=local_rank, use_shared_fs=True, barrier=lambda: None)
        assert datasets(data, builder).train is not None
    assert caplog.text.count("Building the sample index") == 1


def test_reading_all_of_a_remote_file_ahead_is_refused(tmp_path: Path, cache: BlockCache) -> None:
    with pytest.raises(ValueError, match=r"mmap_warmup reads all of a file ahead, and memory://.* is remote"):
        IndexedDataset(in_memory(tmp_path), warmup=True, cache=cache)


def test_the_first_documents_of_a_remote_pair_are_shown(tmp_path: Path, user_cache: BlockCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert head.main([in_memory(tmp_path, [[7, 8, 9], [3]]), "-n", "1"]) == 0
    assert "7 8 9" in capsys.readouterr().out
    assert list(user_cache.folder.rglob("blocks/*/*/*"))
