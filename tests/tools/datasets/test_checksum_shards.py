from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tools.datasets.checksum_shards import main

CONTENTS = {"x-00000-of-00001.bin": b"first", "x-00001-of-00001.bin": b"second", "x.idx": b"index"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def hashes(*, name_first: bool) -> str:
    pairs = [(name, hashlib.sha256(content).hexdigest()) for name, content in CONTENTS.items()]
    return "".join(f"{name} {value}\n" if name_first else f"{value}  ./some/{name}\n" for name, value in pairs)


@pytest.mark.parametrize("name_first", [True, False], ids=["pythia", "sha256sum"])
def test_whole_files_pass(name_first: bool, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "shard_hashes.txt").write_text(hashes(name_first=name_first))
    assert main([str(folder)]) == 0
    assert "3 of 3 files are as" in capsys.readouterr().out


def test_a_changed_and_a_missing_file_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "list.txt").write_text(hashes(name_first=True))
    (folder / "x.idx").write_bytes(b"indeX")
    (folder / "x-00000-of-00001.bin").unlink()
    assert main([str(folder), "--hash_file", f"{folder}/list.txt"]) == 1
    out = capsys.readouterr().out
    assert "x-00000-of-00001.bin is missing" in out
    assert f"x.idx has sha256 {hashlib.sha256(b'indeX').hexdigest()} and should have" in out
    assert "1 of 3 files are as" in out


def test_a_list_that_it_writes_is_pythias(folder: Path) -> None:
    assert main([str(folder), "--write"]) == 0
    assert (folder / "shard_hashes.txt").read_text() == hashes(name_first=True)
    assert main([str(folder)]) == 0


@pytest.mark.parametrize(("text", "message"), [("", "is empty"), ("x.bin 123\n", "line 1 is not a name and a sha256"), (None, "does not exist")])
def test_a_list_that_is_none_is_refused(text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if text is not None:
        (tmp_path / "shard_hashes.txt").write_text(text)
    assert main([str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
