from __future__ import annotations

from pathlib import Path

import pytest

from megatron.data.indexed import IndexedDataset
from tests.tools.datasets.writing import read_at, stored_bytes, write_pair, write_sparse, write_sparse_pair
from tools.datasets.shard_memmap import piece_name, shard
from tools.datasets.unshard_memmap import main, unshard


def pieces_of(folder: Path, contents: list[bytes]) -> Path:
    """Writes pieces and returns the first."""
    for place, content in enumerate(contents):
        (folder / piece_name("x", place, last=len(contents) - 1)).write_bytes(content)
    return folder / piece_name("x", 0, last=len(contents) - 1)


def test_pieces_of_5_gigabytes_come_to_lie_where_they_were(tmp_path: Path) -> None:
    sizes = [5_000_000_000, 5_000_000_000, 2_345_678_901]
    for place, size in enumerate(sizes):
        write_sparse(tmp_path / piece_name("pile", place, last=2), size, {0: b"<%d" % place, size - 2: b"%d>" % place})
    first = tmp_path / piece_name("pile", 0, last=2)
    assert main(["--input_file", str(first), "--num_shards", "3", "--output_dir", f"{tmp_path}/out"]) == 0
    joined = tmp_path / "out" / "pile.bin"
    assert joined.stat().st_size == 12_345_678_901
    assert [read_at(joined, at, 2) for at in (0, 5_000_000_000, 10_000_000_000)] == [b"<0", b"<1", b"<2"]
    assert [read_at(joined, at - 2, 2) for at in (5_000_000_000, 10_000_000_000, 12_345_678_901)] == [b"0>", b"1>", b"2>"]
    assert stored_bytes(joined) < 2**20


def test_a_pair_of_gigabytes_is_the_same_after_both_ways(tmp_path: Path) -> None:
    prefix = write_sparse_pair(tmp_path / "my.text_document", [2_147_483_647, 1_100_000_000, 3], "u2")
    pieces = shard(Path(f"{prefix}.bin"), tmp_path, shard_bytes=5_000_000_000)
    joined = unshard(pieces[0], tmp_path / "again")
    dataset = IndexedDataset(str(joined)[:-4])
    assert dataset.offsets.tolist() == [0, 4_294_967_294, 6_494_967_294]
    assert [dataset.get(number, 0, 1)[0] for number in range(3)] == [1, 2, 3]
    assert [dataset.get(number, int(dataset.sizes[number]) - 1)[0] for number in range(3)] == [1, 2, 3]
    assert dataset.get(1, 1_000_000_000, 4).tolist() == [0] * 4


def test_the_index_beside_the_pieces_travels_along(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "x", [[1, 2, 3], [4], [5, 6]])
    pieces = shard(Path(f"{prefix}.bin"), tmp_path, shard_bytes=5)
    unshard(pieces[0], tmp_path / "again", num_shards=3)
    assert [row.tolist() for row in IndexedDataset(tmp_path / "again" / "x")] == [[1, 2, 3], [4], [5, 6]]
    (tmp_path / "again" / "x.idx").write_bytes(b"another")
    unshard(pieces[0], tmp_path / "again")
    assert (tmp_path / "again" / "x.idx").read_bytes() == b"another"


def test_pythias_empty_last_piece_is_read(tmp_path: Path) -> None:
    assert unshard(pieces_of(tmp_path, [b"12345", b"67890", b""]), tmp_path / "out").read_bytes() == b"1234567890"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([b"12345", b"123", b"1"], "x-00001-of-00002.bin has 3 bytes, and another piece 5"),
        ([b"123", b"12345"], "x-00000-of-00001.bin has 3 bytes, and another piece 5"),
        ([b"12345", b"version https://git-lfs.github.com/spec/v1\n"], "x-00001-of-00001.bin is a pointer of git-lfs"),
    ],
)
def test_a_damaged_piece_is_named_and_nothing_is_written(contents: list[bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        unshard(pieces_of(tmp_path, contents), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_piece_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = pieces_of(tmp_path, [b"1", b"1", b"1"])
    (tmp_path / piece_name("x", 1, last=2)).unlink()
    assert main(["--input_file", str(first), "--output_dir", f"{tmp_path}/out"]) == 2
    assert "1 of 3 pieces are missing, the first is" in capsys.readouterr().err


def test_a_wrong_number_of_pieces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--num_shards is 2, but pieces 0 to 2, as the name says, are 3"):
        unshard(pieces_of(tmp_path, [b"1", b"1", b"1"]), tmp_path / "out", num_shards=2)
    with pytest.raises(ValueError, match="is not named like a piece"):
        unshard(tmp_path / "x.bin", tmp_path / "out")
