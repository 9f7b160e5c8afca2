"""Documents of text files: .txt (one document), .jsonl and .json (one a line), .parquet (one a row); the first three also as .gz or .zst."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from pyarrow import parquet

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSED = (".gz", ".zst")


def input_files(names: Sequence[str]) -> list[Path]:
    """The files themselves; of a folder every file of a known kind inside it, by name."""
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if not path.exists():
            raise FileNotFoundError(f"--input {name} does not exist: check its spelling.")
        found = sorted(inner for inner in path.rglob("*") if inner.is_file() and _kind(inner)) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"--input {name} holds no file that ends in {', '.join(SUFFIXES)} (or these with {' or '.join(COMPRESSED)}).")
        files += found
    return files


def read_documents(path: Path, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """For each document of a file, its text under each key. A .txt file has one document, under any single key."""
    kind = _kind(path)
    if kind == ".txt":
        if len(keys) > 1:
            raise ValueError(f"{path} is plain text and has no fields: leave --jsonl-keys out, or give JSON lines.")
        yield ("".join(_lines(path)),)
    elif kind in (".jsonl", ".json"):
        yield from _json_lines(path, keys)
    elif kind == ".parquet":
        yield from _parquet_rows(path, keys)
    else:
        raise ValueError(f"{path} is of no known kind: give {', '.join(SUFFIXES)} (text also with {' or '.join(COMPRESSED)}).")


def _kind(path: Path) -> str | None:
    """The suffix that says how to read it, compression aside."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES[:-1] else None
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def _open(path: Path) -> TextIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(f"Reading {path} needs the package zstandard: pip install zstandard") from error
        raw = open(path, "rb")  # noqa: SIM115 (closed with the text around it)
        return io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), encoding="utf-8")
    return open(path, encoding="utf-8")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file. Where it is damaged, a ValueError that names it."""
    with _open(path) as file:
        try:
            yield from file
        except Exception as error:  # of the decoders, UnicodeDecodeError, EOFError, zlib.error and ZstdError among them, which share no base
            raise _damage(path, error) from error


def _damage(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read to its end ({error}): it was cut short, or is no UTF-8 or not what its name says; make it again.")


def _json_lines(path: Path, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}): give one object a line.") from error
        fields = record if isinstance(record, dict) else {}
        yield tuple(_text(fields.get(key), key, f"{path}, line {number}", fields) for key in keys)


def _parquet_rows(path: Path, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"Reading {path} needs the package pyarrow: pip install pyarrow") from error
    try:
        table = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow raises several kinds, OSError and ArrowInvalid among them
        raise _damage(path, error) from error
    missing = [key for key in keys if key not in table.schema_arrow.names]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]}: name one of {', '.join(table.schema_arrow.names)} with --jsonl-keys.")
    for row, fields in enumerate(_rows(table, path, keys), start=1):
        yield tuple(_text(fields[key], key, f"{path}, row {row}", fields) for key in keys)


def _rows(table: parquet.ParquetFile, path: Path, keys: Sequence[str]) -> Iterator[dict[str, object]]:
    try:
        for batch in table.iter_batches(batch_size=1024, columns=list(keys)):
            yield from batch.to_pylist()
    except Exception as error:
        raise _damage(path, error) from error


def _text(value: object, key: str, place: str, fields: dict[str, object]) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place} has no text under {key!r} (it has {', '.join(fields) or 'no fields'}): name the field with --jsonl-keys.")
    return value
