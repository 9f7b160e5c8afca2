"""Bytes from file to file where files are larger than memory: in pieces, holes left out, under their final names only when they are whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PIECE = 1 << 24
"""Bytes in memory at once."""


@contextmanager
def new_files(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Names to write to. The files get their own when the block ends, the last one last; if it fails, nothing is left of them.

    Of several, an old file of the last name goes first: an index never stands beside the tokens of another pair.
    """
    parts = tuple(path.with_name(f"{path.name}.{os.getpid()}.part") for path in paths)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield parts
        for part in parts:
            with open(part, "rb") as file:
                os.fsync(file.fileno())
        if len(paths) > 1:
            paths[-1].unlink(missing_ok=True)
        for part, path in zip(parts, paths, strict=True):
            os.replace(part, path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def create(path: Path, num_bytes: int) -> None:
    """A file of that length without content: one hole, for `copy_range` to fill."""
    with open(path, "wb") as file:
        file.truncate(num_bytes)


def copy_range(source: Path, target: Path, *, start: int, length: int, to: int) -> None:
    """Copies ``length`` bytes from byte ``start`` of one file to byte ``to`` of another, which is long enough already.

    What is a hole in the source stays one.
    """
    with open(source, "rb", buffering=0) as reader, open(target, "r+b", buffering=0) as writer:
        for begin, end in _stretches(reader.fileno(), start, start + length):
            at = begin
            while at < end:
                piece = os.pread(reader.fileno(), min(PIECE, end - at), at)
                if not piece:
                    raise ValueError(f"{source} ended at byte {at} while it was read: is another program writing to it?")
                _write_at(writer.fileno(), piece, to + at - start)
                at += len(piece)


def check_space(folder: Path, sources: list[Path]) -> None:
    """Raises a sentence unless the disk of ``folder`` has room for copies of these files."""
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = sum(map(_stored_bytes, sources)), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder} has {free} bytes free, and {needed} are to be written there: make room, or give another folder.")


def _stretches(file: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """First byte and end of everything between two bytes of a file that is no hole. File systems without holes say that all is data."""
    at = start
    while at < end:
        try:
            begin = os.lseek(file, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: nothing but a hole follows
                raise
            if os.fstat(file).st_size < end:
                raise ValueError(f"The file to copy ends at byte {os.fstat(file).st_size}, and {end} bytes of it are wanted.") from error
            return
        if begin >= end:
            return
        at = min(os.lseek(file, begin, os.SEEK_HOLE), end)
        yield begin, at


def _write_at(file: int, data: bytes, place: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(file, data[written:], place + written)


def _stored_bytes(path: Path) -> int:
    """Bytes that a file takes on its disk, holes aside."""
    stat = path.stat()
    return min(stat.st_size, stat.st_blocks * 512)
