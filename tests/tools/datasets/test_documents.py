from __future__ import annotations

import errno
import gzip
import io
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tools.datasets import documents as module
from tools.datasets.documents import STDIN, Source, find_sources, read_documents
from tools.datasets.packed import COMPRESSED


def texts(path: Path | str, *keys: str) -> list[str]:
    """All of them, one after the other."""
    return [text for source in find_sources([str(path)]) for document in read_documents(source, keys or ["text"]) for text in document]


def tar_bytes(members: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


TEXT = b'{"text": "%s"}\n' % (b"some words " * 5000)


def parquet_bytes(folder: Path) -> bytes:
    parquet.write_table(pyarrow.table({"text": ["some words"] * 3000}), folder / "sound")
    return (folder / "sound").read_bytes()


FAULTS = {
    "gzip cut short": ("x.jsonl.gz", gzip.compress(TEXT)[:-9], "cannot be read to its end"),
    "gzip with a wrong byte": ("x.jsonl.gz", gzip.compress(TEXT)[:20] + b"\xff\xff" + gzip.compress(TEXT)[22:], "cannot be read to its end"),
    "no gzip": ("x.txt.gz", b"plain text", "cannot be read to its end"),
    "zstd with a wrong byte": (
        "x.jsonl.zst",
        zstandard.compress(TEXT)[:9] + b"\xff\xff\xff" + zstandard.compress(TEXT)[12:],
        "cannot be read to its end",
    ),
    "zstd cut short": ("x.jsonl.zst", zstandard.compress(TEXT)[:-3], "cannot be read to its end"),
    "zstd cut short inside its second frame": ("x.txt.zst", zstandard.compress(b"a") + zstandard.compress(b"b")[:-1], "cannot be read to its end"),
    "no zstd": ("x.txt.zst", b"plain text", "cannot be read to its end"),
    "no UTF-8": ("x.txt", b"caf\xe9", "cannot be read to its end"),
    "no parquet": ("x.parquet", b"PAR1 plain text PAR1", "cannot be read to its end"),
    "an empty parquet": ("x.parquet", b"", "cannot be read to its end"),
    "a number of many digits": ("x.jsonl", b'{"text": %s}' % (b"9" * 5000), "line 1 is not JSON"),
    "an empty tar": ("x.tar", b"", "cannot be read to its end"),
    "a tar cut short": ("x.tar", tar_bytes({"a.txt": b"some words" * 1000})[:3000], "cannot be read to its end"),
    "a tar of pictures": ("x.tar", tar_bytes({"a.png": b"\x89PNG"}), r"holds no member that ends in .txt, .json or .jsonl"),
    "a tar of other bytes than UTF-8": ("x.tar", tar_bytes({"a.txt": b"caf\xe9"}), "cannot be read to its end"),
    "brackets in brackets": ("x.jsonl", b"[" * 200_000, "line 1 is not JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_named_in_a_sentence(fault: str, tmp_path: Path) -> None:
    name, content, message = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refusal:
        texts(tmp_path / name)
    assert str(tmp_path / name) in str(refusal.value)


def test_a_disk_that_fails_is_no_damage_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was prepared before it is kept, which a ValueError would throw away."""
    (tmp_path / "x.jsonl").write_bytes(TEXT)

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(module, "open_packed", fail)
    with pytest.raises(OSError, match="Input/output error"):
        texts(tmp_path / "x.jsonl")


def test_a_damaged_row_group_of_a_parquet_file_is_a_sentence(tmp_path: Path) -> None:
    content = bytearray(parquet_bytes(tmp_path))
    content[4:40] = b"\xff" * 36
    (tmp_path / "x.parquet").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"x\.parquet cannot be read to its end"):
        texts(tmp_path / "x.parquet")


@settings(max_examples=80, deadline=None)
@given(
    content=st.one_of(st.binary(max_size=60), st.text(max_size=40).map(str.encode)),
    kind=st.sampled_from(
        [f"{suffix}{packed}" for suffix in (".txt", ".jsonl", ".json", ".tar") for packed in ("", *COMPRESSED)] + [".parquet", ".tgz"]
    ),
    is_packed=st.booleans(),
)
def test_any_bytes_are_documents_or_a_sentence(content: bytes, kind: str, is_packed: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / f"x{kind}"
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix)
    path.write_bytes(pack(content) if pack is not None and is_packed else content)
    try:
        documents = texts(path)
    except ValueError as mistake:
        documents = []
        if str(path) not in str(mistake):
            raise
    assert all(isinstance(text, str) for text in documents)


def test_plain_text_of_a_windows_editor_has_no_mark_and_no_carriage_return(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    assert texts(tmp_path / "x.txt") == ["one\ntwo"]
    assert texts(tmp_path / "x.jsonl") == ["one", "two"]


def test_a_line_that_is_a_text_and_no_object_is_the_text(tmp_path: Path) -> None:
    """As in the oldest lm_dataformat archives."""
    (tmp_path / "x.jsonl").write_bytes(b'"one"\n{"text": "two"}\n')
    assert texts(tmp_path / "x.jsonl") == ["one", "two"]


MEMBERS = {
    "a/one.txt": b"one",
    "a/one.png": b"\x89PNG",
    "lines.jsonl": b'{"text": "two"}\n\n{"text": "three"}\n',
    "lines2.jsonl.gz": gzip.compress(b'{"text": "four"}'),
    "0001.json": b'{\n "text": "five"\n}',
    "0002.txt": b"six",
    "0002.json": b'{"caption": "not this"}',
    "0003.json": b'{"text": "seven"}',
    "0003.txt": b"not this",
    "b.one.txt": b"eight",
    "b.two.txt": b"nine",
}
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.mark.parametrize(
    ("name", "pack"),
    [("x.tar", bytes), ("x.tar.gz", gzip.compress), ("x.tgz", gzip.compress), ("x.tar.zst", zstandard.compress)],
)
def test_members_of_an_archive_are_documents_by_their_kind_and_name(name: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pack(tar_bytes(MEMBERS)))
    assert texts(tmp_path / name) == WORDS


def test_fields_of_a_webdataset_sample_come_from_its_json_and_its_text(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes({"1.txt": b"words", "1.json": b'{"caption": "a title"}', "2.json": b'{"caption": "b", "txt": "c"}'}))
    assert texts(tmp_path / "x.tar", "caption", "txt") == ["a title", "words", "b", "c"]


def test_the_same_member_twice_is_two_documents(tmp_path: Path) -> None:
    first, second = tar_bytes({"a.txt": b"one"}), tar_bytes({"a.txt": b"two"})
    (tmp_path / "x.tar").write_bytes(first[:1024] + second)
    assert texts(tmp_path / "x.tar") == ["one", "two"]


def test_lines_of_standard_input_are_documents_and_a_bad_one_is_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b'{"text": "one"}\n\n{"text": "two"}\n{}')))
    documents = read_documents(Source(name=STDIN, kind=STDIN), ["text"])
    assert [next(documents), next(documents)] == [("one",), ("two",)]
    with pytest.raises(ValueError, match="Standard input, line 4 has no text under 'text'"):
        next(documents)


@pytest.mark.parametrize(("name", "package"), [("x.parquet", "pyarrow"), ("x.txt.zst", "zstandard")])
def test_without_a_package_its_installation_is_named(name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"Reading .*{name} needs the package {package}: pip install {package}"):
        texts(tmp_path / name)


def test_a_folder_without_text_and_a_name_that_is_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no file that ends in \.txt"):
        find_sources([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="given as hf:NAME"):
        find_sources(["allenai/c4"])
