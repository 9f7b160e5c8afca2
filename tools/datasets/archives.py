"""Documents of a tar archive, read from its first byte to its last without unpacking it.

A .txt member is a document, and so is each line of a .jsonl (also packed). Members of one name with different endings, one after the other,
are one document, as in WebDataset's shards: its fields are those of the .json, and the text of the .txt under ``txt`` and, unless the .json
has one, under ``text``. Other members are left out.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import BinaryIO, cast

from tools.datasets.packed import COMPRESSED, unpacked

TEXT, OBJECT, LINES = ".txt", ".json", ".jsonl"
LARGEST_BYTES = 1 << 31
"""Of a member that is one document: a sequence has fewer tokens."""
Document = bytes | str | Mapping[str, object]
"""A line or file of JSON, a text, or fields."""


def documents(stream: BinaryIO) -> Iterator[Document]:
    """The documents in the order of the archive."""
    stem, parts, is_empty = "", dict[str, bytes](), True
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            name, kind, packing = _split(member.name)
            if not member.isfile() or not kind:
                continue
            is_empty = False
            if parts and (name != stem or kind == LINES or kind in parts):
                yield _document(parts)
                parts = {}
            content = archive.extractfile(member)
            assert content is not None, "regular files have content"
            opened = unpacked(cast(BinaryIO, content), packing)
            if kind == LINES:
                yield from (line for line in opened if not line.isspace())
                continue
            stem, parts[kind] = name, opened.read(LARGEST_BYTES)
            if len(parts[kind]) == LARGEST_BYTES:
                raise ValueError(f"{member.name} in it has {LARGEST_BYTES} bytes or more, which is too long for one document")
    if parts:
        yield _document(parts)
    if is_empty:
        raise ValueError(f"it holds no member that ends in {TEXT}, {OBJECT} or {LINES}")


def _split(name: str) -> tuple[str, str, str]:
    """``a/b.txt.gz`` as ``a/b``, ``.txt``, ``.gz``. The kind is empty for members that are left out."""
    path = PurePosixPath(name)
    packing = path.suffix.lower() if path.suffix.lower() in COMPRESSED else ""
    path = path.with_suffix("") if packing else path
    kind = path.suffix.lower()
    return str(path.with_suffix("")) if kind else name, kind if kind in (TEXT, OBJECT, LINES) else "", packing


def _document(parts: Mapping[str, bytes]) -> Document:
    if OBJECT not in parts:
        return parts[TEXT].decode()
    if TEXT not in parts:
        return parts[OBJECT]
    text = parts[TEXT].decode()
    return {"text": text, **json.loads(parts[OBJECT]), "txt": text}
