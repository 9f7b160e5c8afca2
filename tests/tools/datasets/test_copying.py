from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.datasets.writing import read_at, stored_bytes, write_sparse
from tools.datasets.copying import check_space, copy_range, create, new_files


def test_a_range_beyond_32_bits_is_copied_and_holes_stay_holes(tmp_path: Path) -> None:
    write_sparse(tmp_path / "source", 7_000_000_000, {0: b"no", 2_500_000_000: b"first", 5_999_999_996: b"last", 6_000_000_000: b"no"})
    create(tmp_path / "target", 9_000_000_000)
    copy_range(tmp_path / "source", tmp_path / "target", start=2_500_000_000, length=3_500_000_000, to=5_000_000_000)
    assert read_at(tmp_path / "target", 5_000_000_000, 5) == b"first"
    assert read_at(tmp_path / "target", 8_499_999_996, 8) == b"last\0\0\0\0"
    assert (tmp_path / "target").stat().st_size == 9_000_000_000
    assert stored_bytes(tmp_path / "target") < 2**20


def test_a_source_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"12345")
    create(tmp_path / "target", 10)
    with pytest.raises(ValueError, match="ends at byte 5, and 10 bytes of it are wanted"):
        copy_range(tmp_path / "source", tmp_path / "target", start=0, length=10, to=0)


def test_new_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    tokens, index = tmp_path / "deep" / "x.bin", tmp_path / "deep" / "x.idx"
    with new_files(tokens, index) as parts:
        for part in parts:
            part.write_bytes(b"new")
        assert not tokens.exists()
    assert [path.read_bytes() for path in (tokens, index)] == [b"new", b"new"]
    with pytest.raises(FileNotFoundError), new_files(tokens, index) as parts:
        parts[0].write_bytes(b"half, and no index")
    assert sorted(path.name for path in tokens.parent.iterdir()) == ["x.bin", "x.idx"]
    assert tokens.read_bytes() == b"new"


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"1" * 100_000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match="has 1000 bytes free, and 100000 are to be written"):
        check_space(tmp_path / "out", [tmp_path / "source"])
