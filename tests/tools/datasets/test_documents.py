from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tools.datasets.documents import COMPRESSED, SUFFIXES, read_documents

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
    "no zstd": ("x.txt.zst", b"plain text", "cannot be read to its end"),
    "no UTF-8": ("x.txt", b"caf\xe9", "cannot be read to its end"),
    "no parquet": ("x.parquet", b"PAR1 plain text PAR1", "cannot be read to its end"),
    "an empty parquet": ("x.parquet", b"", "cannot be read to its end"),
    "a number of many digits": ("x.jsonl", b'{"text": %s}' % (b"9" * 5000), "line 1 is not JSON"),
    "brackets in brackets": ("x.jsonl", b"[" * 200_000, "line 1 is not JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_named_in_a_sentence(fault: str, tmp_path: Path) -> None:
    name, content, message = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refusal:
        list(read_documents(tmp_path / name, ["text"]))
    assert str(tmp_path / name) in str(refusal.value)


def test_a_damaged_row_group_of_a_parquet_file_is_a_sentence(tmp_path: Path) -> None:
    content = bytearray(parquet_bytes(tmp_path))
    content[4:40] = b"\xff" * 36
    (tmp_path / "x.parquet").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"x\.parquet cannot be read to its end"):
        list(read_documents(tmp_path / "x.parquet", ["text"]))


@settings(max_examples=80, deadline=None)
@given(
    content=st.one_of(st.binary(max_size=60), st.text(max_size=40).map(str.encode)),
    kind=st.sampled_from([f"{suffix}{packed}" for suffix in SUFFIXES[:-1] for packed in ("", *COMPRESSED)] + [".parquet"]),
    is_packed=st.booleans(),
)
def test_any_bytes_are_documents_or_a_sentence(content: bytes, kind: str, is_packed: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / f"x{kind}"
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix)
    path.write_bytes(pack(content) if pack is not None and is_packed else content)
    try:
        documents = list(read_documents(path, ["text"]))
    except ValueError as mistake:
        documents = []
        if str(path) not in str(mistake):
            raise
    assert all(isinstance(text, str) for (text,) in documents)
