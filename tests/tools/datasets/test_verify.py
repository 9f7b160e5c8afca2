from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.indexed import HEADER, LEGACY_MAGIC, MAGIC, IndexedDataset
from tests.tools.datasets.writing import write_pair, write_sparse_pair
from tools.datasets import verify as module
from tools.datasets.verify import main, verify

ROWS = [[1, 2, 3], [], [4], [5, 6]]
SIZES, OFFSETS, BORDERS = 34, 34 + 4 * 4, 34 + 12 * 4
"""First bytes of the arrays in the index of ROWS."""


def change(path: Path, place: int, kind: str, *values: int) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into(f"<{kind}", data, place, *values)
    path.write_bytes(data)


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


FAULTS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "no index": (lambda tokens, index: index.unlink(), "x.idx does not exist"),
    "no tokens": (lambda tokens, index: tokens.unlink(), "x.bin does not exist"),
    "an empty index": (lambda tokens, index: index.write_bytes(b""), "byte 0: begins with b''"),
    "the old kind": (lambda tokens, index: index.write_bytes(LEGACY_MAGIC + bytes(50)), "byte 0: TNTIDX"),
    "half a header": (lambda tokens, index: cut(index, 20), "byte 20: ends inside the header"),
    "a version": (lambda tokens, index: change(index, 9, "Q", 3), "byte 9: version 3"),
    "a dtype": (lambda tokens, index: change(index, 17, "B", 9), "byte 17: dtype code 9; known are 1 to 8"),
    "too many sequences": (lambda tokens, index: change(index, 18, "Q", 2**63), "bytes 18 and 26: 9223372036854775808 sequences"),
    "too many borders": (lambda tokens, index: change(index, 26, "Q", 6), "it ends inside the document borders, 8 bytes too early"),
    "no room for sizes": (lambda tokens, index: cut(index, 43), "it ends where the size of sequence 2 of 4 should be"),
    "no room for offsets": (lambda tokens, index: cut(index, 60), "it ends where the offset of sequence 1 of 4 should be"),
    "a padded header": (
        lambda tokens, index: index.write_bytes(index.read_bytes()[:34] + bytes(6) + index.read_bytes()[34:]),
        "6 bytes too many, as if a header padded to 40 bytes",
    ),
    "a negative size": (
        lambda tokens, index: change(index, SIZES + 4, "i", -5),
        "1 of 4 sequences have a size below 0; the first is sequence 1, -5 tokens of 2 bytes at byte 6 (bytes 38 and 58 of the index)",
    ),
    "offsets outside": (
        lambda tokens, index: change(index, OFFSETS + 8, "qq", -2, 2**63 - 2),
        "2 of 4 sequences begin outside",
    ),
    "an offset in a token": (
        lambda tokens, index: change(index, OFFSETS + 16, "q", 7),
        "1 of 4 sequences begin inside a token; the first is sequence 2",
    ),
    "lost tokens": (
        lambda tokens, index: cut(tokens, 5),
        "1 of 4 sequences reach behind the end of",
    ),
    "one lost byte": (lambda tokens, index: cut(tokens, 11), "if the .bin was cut, it lost 1 bytes"),
    "a late first document": (lambda tokens, index: change(index, BORDERS, "q", 1), "byte 82: doc_idx begins with 1 and not with 0"),
    "documents backwards": (
        lambda tokens, index: change(index, BORDERS + 8, "q", 3),
        "byte 90: 1 document borders are followed by a smaller one; the first, border 1 is 3, the next 2",
    ),
    "borders whose difference overflows": (
        lambda tokens, index: change(index, BORDERS + 8, "qq", 2**63 - 1, -2),
        "byte 90: 1 document borders are followed by a smaller one",
    ),
    "lost documents": (
        lambda tokens, index: change(index, BORDERS + 32, "q", 9),
        "byte 114: the last document ends at sequence 9, and there are 4 sequences",
    ),
}


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_pair(tmp_path / "x", ROWS)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named_with_its_place(fault: str, prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = FAULTS[fault]
    damage(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))
    assert main([prefix]) == 1
    assert message in capsys.readouterr().out


def test_several_faults_are_all_named(prefix: str) -> None:
    change(Path(f"{prefix}.idx"), 9, "QB", 2, 0)
    assert len(verify(prefix).errors) == 2


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_faults_are_counted_over_all_pieces_of_the_arrays(at_once: int, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEQUENCES", at_once)
    change(Path(f"{prefix}.idx"), SIZES, "iiii", 3, -1, -1, 50)
    change(Path(f"{prefix}.idx"), BORDERS, "qqqq", 0, 3, 2, 1)
    negative, reaching, backwards = verify(prefix).errors
    assert "2 of 4 sequences have a size below 0; the first is sequence 1" in negative
    assert "1 of 4 sequences reach behind" in reaching
    assert "it lost 96 bytes" in reaching
    assert "2 document borders are followed by a smaller one; the first, border 1 is 3, the next 2" in backwards


def test_a_sound_pair_is_sound_and_its_oddities_are_remarks(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    with open(f"{prefix}.bin", "ab") as file:
        file.write(b"123")
    assert main([prefix]) == 0
    out = capsys.readouterr().out
    assert f"{prefix}: sound" in out
    assert "remark: 1 sequences have no tokens, the first is sequence 1" in out
    assert "remark: 3 bytes of the .bin belong to no sequence" in out


def test_overlaps_missing_documents_and_floats_are_remarks(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "x", [[1, 2], [3]], "f4")
    index = HEADER.pack(MAGIC, 1, 6, 2, 1) + struct.pack("<iiqqq", 2, 1, 0, 4, 0)
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(bytes(8))
    found = verify(prefix)
    assert not found.errors
    assert [remark.split(":")[0] for remark in found.remarks] == [
        "the index names no documents, as GPT-NeoX merges files",
        "it holds float32",
        "sequences overlap",
    ]


def test_ids_outside_the_vocabulary_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write_pair(tmp_path / "x", [[1, 2], [], [3, 9, -4]], "i4")
    assert main([prefix, "--vocab-size", "10"]) == 1
    assert "1 tokens are no ids of a vocabulary of 10; the first is -4, at byte 16, in sequence 2" in capsys.readouterr().out
    assert verify(prefix).errors == ()
    assert "3 tokens are no ids of a vocabulary of 3; the first is 3, at byte 8" in verify(prefix, vocab_size=3).errors[0]


def test_gigabytes_are_checked_without_reading_the_tokens(tmp_path: Path) -> None:
    prefix = write_sparse_pair(tmp_path / "x", [2_147_483_647] * 3, "u2")
    assert verify(prefix).errors == ()
    with open(f"{prefix}.bin", "r+b") as file:
        file.truncate(8_589_934_589)
    (error,) = verify(prefix).errors
    assert "1 of 3 sequences reach behind the end" in error
    assert "sequence 2, 2147483647 tokens of 2 bytes at byte 8589934588" in error
    assert "it lost 4294967293 bytes" in error


def test_json_tells_the_same(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([prefix, "--json"]) == 0
    remark = "1 sequences have no tokens, the first is sequence 1"
    assert json.loads(capsys.readouterr().out) == [{"prefix": prefix, "errors": [], "remarks": [remark]}]


@settings(max_examples=250, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 125), st.binary(min_size=1, max_size=9)), max_size=3),
    index_bytes=st.one_of(st.none(), st.integers(0, 130)),
    bin_bytes=st.one_of(st.none(), st.integers(0, 14)),
)
def test_it_finds_errors_exactly_where_training_refuses_and_never_stumbles(
    changes: list[tuple[int, bytes]], index_bytes: int | None, bin_bytes: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    prefix = write_pair(tmp_path_factory.mktemp("hostile") / "x", ROWS)
    index = Path(f"{prefix}.idx")
    data = bytearray(index.read_bytes())
    for place, content in changes:
        data[place : place + len(content)] = content
    index.write_bytes(data[:index_bytes])
    cut(Path(f"{prefix}.bin"), 12 if bin_bytes is None else bin_bytes)
    found = verify(prefix, vocab_size=None)
    try:
        dataset = IndexedDataset(prefix)
    except ValueError:
        assert found.errors
        return
    assert not found.errors
    assert sum(len(row) for row in dataset) == dataset.num_tokens
    verify(prefix, vocab_size=7)
