"""Documents of files and streams, in two steps: cutting a source into records, and finding the texts inside a record.

The first step is little work, so that one process can do it for many that do the second (`preprocess`). A source is a .txt file (one
document), .jsonl or .json (one a line), .parquet (one a row), .tar (`archives`), `-` (JSON lines from standard input) or a data set of the
Hugging Face hub (`hub`). Text and archives may also be packed as .gz or .zst.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tools.datasets import archives, hub
from tools.datasets.packed import COMPRESSED, open_packed

STDIN = "-"
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".tar", ".tgz")
UNITS = {".parquet": "row", ".tar": "document", ".tgz": "document", ".txt": "document", hub.PREFIX: "row"}
"""What a number in a place counts; else lines."""
ROWS_AT_ONCE = 256
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Record(NamedTuple):
    number: int
    """In its source, from 1; a .jsonl's line."""
    content: bytes | str | Mapping[str, object]
    """A line of JSON, a text without fields, or fields."""
    read_bytes: int
    """Of the file as it is stored, so far."""

    @property
    def num_bytes(self) -> int:
        """About as much as it takes in memory."""
        if isinstance(self.content, Mapping):
            return sum(len(value) for value in self.content.values() if isinstance(value, bytes | str | list))
        return len(self.content)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    name: str
    """A file's path, `-`, or `hf:` and a name."""
    kind: str
    """The suffix that says how to read it, compression aside; `-`; `hf:`."""

    @property
    def path(self) -> Path | None:
        return None if self.kind in (STDIN, hub.PREFIX) else Path(self.name)

    def place(self, record: Record) -> str:
        """Where a record stands, for messages."""
        return f"{'Standard input' if self.kind == STDIN else self.name}, {UNITS.get(self.kind, 'line')} {record.number}"


def find_sources(names: Sequence[str]) -> list[Source]:
    """The sources that are named; of a folder every file of a known kind inside it, by name."""
    return [source for name in names for source in _sources(name)]


def read_records(source: Source, keys: Sequence[str]) -> Iterator[Record]:
    """The records of a source, in order. ``keys``: the fields that will be asked for."""
    if source.kind == STDIN:
        return _lines(sys.stdin.buffer, lambda: 0)
    if source.kind == hub.PREFIX:
        return (Record(number, row, 0) for number, row in enumerate(hub.rows(source.name), start=1))
    path = Path(source.name)
    return _parquet_rows(path, keys) if source.kind == ".parquet" else _file_records(path, source.kind)


def texts_of(source: Source, record: Record, keys: Sequence[str]) -> tuple[str, ...]:
    """The text of a record under each key. A text without fields answers to any single key."""
    content = _parsed(source, record)
    if isinstance(content, str):
        if len(keys) > 1:
            raise ValueError(f"{source.place(record)} is plain text and has no fields: leave --jsonl-keys out, or give JSON lines.")
        return (content,)
    fields = content if isinstance(content, Mapping) else {}
    for key in keys:
        if not isinstance(fields.get(key), str):
            raise _nothing_under(key, "text", source.place(record), content)
    return tuple(fields[key] for key in keys)


def lists_of(source: Source, record: Record, keys: Sequence[str]) -> tuple[list[object], ...]:
    """The list of a record under each key."""
    content = _parsed(source, record)
    fields = content if isinstance(content, Mapping) else {}
    for key in keys:
        if not isinstance(fields.get(key), list):
            raise _nothing_under(key, "list", source.place(record), content)
    return tuple(fields[key] for key in keys)


def read_documents(source: Source, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """For each document of a source, its text under each key."""
    for record in read_records(source, keys):
        texts = texts_of(source, record, keys)
        for text in texts:
            check_whole(text, source, record)
        yield texts


def check_whole(text: str, source: Source, record: Record) -> None:
    """ValueError for half a character, which JSON may hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as half:
        found = f"half a character (\\u{ord(text[half.start]):04x}, a surrogate without its other half)"
        raise ValueError(f"{source.place(record)} holds {found}: repair the text, or take the document out.") from half


def _sources(name: str) -> Iterator[Source]:
    path = Path(name)
    if name == STDIN:
        yield Source(name=name, kind=STDIN)
    elif name.startswith(hub.PREFIX):
        yield Source(name=name, kind=hub.PREFIX)
    elif path.is_dir():
        found = sorted(inner for inner in path.rglob("*") if inner.is_file() and _kind(inner))
        if not found:
            raise ValueError(f"--input {name} holds no file that ends in {_known()}.")
        yield from (Source(name=str(inner), kind=_kind(inner)) for inner in found)
    elif not path.exists():
        raise FileNotFoundError(f"--input {name} does not exist: check its spelling. A data set of the Hugging Face hub is given as hf:NAME.")
    elif not _kind(path):
        raise ValueError(f"{name} is of no known kind: give {_known()}.")
    else:
        yield Source(name=name, kind=_kind(path))


def _kind(path: Path) -> str:
    """Empty for a file that is not known."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_packed = bool(suffixes) and suffixes[-1] in COMPRESSED
    known = suffixes[-2:-1] if is_packed else suffixes[-1:]
    return known[0] if known and known[0] in SUFFIXES and not (is_packed and known[0] in (".parquet", ".tgz")) else ""


def _known() -> str:
    return f"{', '.join(SUFFIXES)} (text and tar also with {' or '.join(COMPRESSED)})"


def _file_records(path: Path, kind: str) -> Iterator[Record]:
    with _damage_named(path), open_packed(path) as (stream, position):
        if kind == ".txt":
            text = stream.read().decode("utf-8-sig")
            yield Record(1, text.replace("\r\n", "\n").replace("\r", "\n"), position())
        elif kind in (".tar", ".tgz"):
            yield from (Record(number, content, position()) for number, content in enumerate(archives.documents(stream), start=1))
        else:
            yield from _lines(stream, position)


def _lines(stream: BinaryIO, position: Callable[[], int]) -> Iterator[Record]:
    """The lines that are not blank."""
    for number, line in enumerate(stream, start=1):
        content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if not content.isspace():
            yield Record(number, content, position())


def _parquet_rows(path: Path, keys: Sequence[str]) -> Iterator[Record]:
    with _damage_named(path):
        from pyarrow import parquet

        table = parquet.ParquetFile(path)
    missing = [key for key in keys if key not in table.schema_arrow.names]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]}: name one of {', '.join(table.schema_arrow.names)} with --jsonl-keys.")
    size_bytes, number = path.stat().st_size, 0
    with _damage_named(path):
        for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(keys)):
            for fields in batch.to_pylist():
                number += 1
                yield Record(number, fields, size_bytes * number // table.metadata.num_rows)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turns what the decoders raise about a file, or for want of a package, into a ValueError that names it."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"Reading {path} needs the package {error.name}: pip install {error.name}") from error
    except Exception as error:  # UnicodeDecodeError, EOFError, zlib.error, ReadError, ArrowInvalid and ZstdError among them, which share no base
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk or the network has failed, and not the content
        reason = f"{path} cannot be read to its end ({error})"
        raise ValueError(f"{reason}: it was cut short, or is no UTF-8 or not what its name says; make it again.") from error


def _parsed(source: Source, record: Record) -> object:
    if not isinstance(record.content, bytes):
        return record.content
    place = source.place(record)
    try:
        return json.loads(record.content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 ({error}): write the file anew as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error}): give one object a line.") from error


def _nothing_under(key: str, wanted: str, place: str, content: object) -> ValueError:
    missing = f"{place} has no {wanted} under {key!r}"
    if not isinstance(content, Mapping):
        kind = "a JSON list" if isinstance(content, list) else f"a JSON {type(content).__name__}"
        return ValueError(f"{missing}, as it is {kind} and has no fields: write each object on a line of its own.")
    if key in content:
        return ValueError(f"{missing} but {json.dumps(content[key], default=str)[:40]}: give it a {wanted}, or take the document out.")
    return ValueError(f"{missing} (it has {', '.join(content) or 'no fields'}): name the field with --jsonl-keys.")
