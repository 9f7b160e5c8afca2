from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.datasets.writing import read_at, stored_bytes, write_sparse
from tools.datasets.shard_memmap import main, shard


def test_pieces_have_pythias_length_and_names_and_only_their_holes_are_left_out(tmp_path: Path) -> None:
    marks = {0: b"a", 4_999_999_999: b"b", 5_000_000_000: b"c", 9_999_999_999: b"d", 10_000_000_000: b"e", 10_000_000_122: b"f"}
    write_sparse(tmp_path / "pile.text_document.bin", 10_000_000_123, marks)
    assert main(["--input_file", f"{tmp_path}/pile.text_document.bin", "--output_dir", f"{tmp_path}/out"]) == 0
    pieces = [tmp_path / "out" / f"pile.text_document-{place:05}-of-00002.bin" for place in range(3)]
    assert sorted((tmp_path / "out").iterdir()) == pieces
    assert [piece.stat().st_size for piece in pieces] == [5_000_000_000, 5_000_000_000, 123]
    assert [read_at(piece, 0, 1) + read_at(piece, piece.stat().st_size - 1, 1) for piece in pieces] == [b"ab", b"cd", b"ef"]
    assert sum(map(stored_bytes, pieces)) < 2**20


@pytest.mark.parametrize(("size", "lengths"), [(1, [1]), (9, [9]), (10, [10]), (11, [10, 1]), (20, [10, 10]), (21, [10, 10, 1])])
def test_an_exact_multiple_leaves_no_empty_piece(size: int, lengths: list[int], tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(range(size)))
    pieces = shard(tmp_path / "x.bin", tmp_path / "out", shard_bytes=10)
    assert [piece.stat().st_size for piece in pieces] == lengths
    assert b"".join(piece.read_bytes() for piece in pieces) == bytes(range(size))
    assert pieces[-1].name == f"x-{len(lengths) - 1:05}-of-{len(lengths) - 1:05}.bin"


@pytest.mark.parametrize(
    ("name", "content", "flags", "message"),
    [
        ("x.idx", b"1", [], "is no .bin file"),
        ("x.bin", b"", [], "is empty"),
        ("x.bin", None, [], "does not exist"),
        ("x.bin", b"1", ["--shard_size", "0"], "at least 1 byte"),
    ],
)
def test_what_cannot_be_cut_is_a_sentence(
    name: str, content: bytes | None, flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["--input_file", f"{tmp_path}/{name}", "--output_dir", f"{tmp_path}/out", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
