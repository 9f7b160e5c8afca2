"""Blocks of remote files on a local disk: bounded, written under their names when they are whole, shared by all processes of a machine.

A block is a file of its own. Blocks that were not read for longest go first when room is needed; a process that still reads one of
them is not disturbed, since the system keeps the bytes of an open file.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sepllm.ops.extension import cache_dir, locked

BLOCK_BYTES = 256 << 10
"""A sample is a few kilobytes at a random place, and a request takes tens of milliseconds: more would mostly carry what nobody asked for."""
FILL = 0.9
"""Of the bound, after blocks have been thrown away."""
TOUCH_AFTER_S = 60.0
"""A read is noted at most this often."""
LOST_AFTER_S = 3600.0
"""A file that is still being written after this long belongs to a process that was killed."""
_PART = ".part"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCache:
    folder: Path
    limit_bytes: int
    """Of all blocks together. What several processes are writing at this moment comes on top."""
    block_bytes: int = BLOCK_BYTES

    @classmethod
    def of_user(cls, *, limit_gb: float = 10.0) -> BlockCache:
        """In the user's cache folder, `~/.cache/sepllm/remote` unless `XDG_CACHE_HOME` says otherwise."""
        return cls(folder=cache_dir() / "remote", limit_bytes=int(limit_gb * 1e9))

    def read(self, file: str, block: int, *, num_bytes: int, start: int, stop: int, fetch: Callable[[], bytes]) -> bytes:
        """Bytes ``start`` to ``stop`` of a block that has ``num_bytes``, from the disk or, if it is not there whole, from ``fetch``.

        ``file``: what names the file it belongs to, fit for the name of a folder.
        """
        path = self.folder / "blocks" / file / str(block // 1024) / str(block)
        if (found := _read_part(path, num_bytes=num_bytes, start=start, stop=stop)) is not None:
            return found
        content = fetch()
        self._put(path, content)
        return content[start:stop]

    def copy_of(self, file: str, fill: Callable[[Path], None]) -> Path:
        """A whole file, made by ``fill`` where it is not there yet; one process makes it while the others wait. It does not count."""
        path = self.folder / "whole" / file
        self._checked(path.parent)
        with locked(path.with_name(f"{file}.lock")):
            if not path.is_file():
                _write(path, fill)
        return path

    def _put(self, path: Path, content: bytes) -> None:
        if len(content) > self.limit_bytes:
            return
        self._checked(path.parent)
        part = _part_of(path)
        try:
            _fill(part, lambda place: place.write_bytes(content))
            with locked(self.folder / "lock"):
                used = self._used() - (path.stat().st_size if path.is_file() else 0)
                if used + len(content) > self.limit_bytes:
                    used = self._thrown_away(down_to=int(FILL * self.limit_bytes) - len(content))
                os.replace(part, path)
                (self.folder / "bytes").write_text(str(used + len(content)))
        except OSError as error:
            raise ValueError(f"{self.folder} cannot hold a block of remote data ({error}): make room in it, or lower remote_cache_gb.") from error
        finally:
            part.unlink(missing_ok=True)

    def _used(self) -> int:
        """Bytes of all blocks: what was noted last, or counted where nothing was."""
        try:
            return int((self.folder / "bytes").read_text())
        except (FileNotFoundError, ValueError):
            return sum(status.st_size for _, status in self._blocks())

    def _thrown_away(self, *, down_to: int) -> int:
        """Bytes of the blocks that are left when the oldest were deleted until at most ``down_to`` are."""
        blocks = sorted(self._blocks(), key=lambda found: found[1].st_mtime)
        used = sum(status.st_size for _, status in blocks)
        for path, status in blocks:
            if used <= max(down_to, 0):
                break
            path.unlink(missing_ok=True)
            used -= status.st_size
        return used

    def _blocks(self) -> Iterator[tuple[Path, os.stat_result]]:
        """All blocks. What killed processes left half written goes, on the way."""
        for path in (self.folder / "blocks").glob("*/*/*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                if not path.name.endswith(_PART):
                    yield path, status
                elif time.time() - status.st_mtime > LOST_AFTER_S:
                    path.unlink()

    def _checked(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.folder} cannot hold copies of remote data ({error}): make it writable, or set XDG_CACHE_HOME.") from error


def _read_part(path: Path, *, num_bytes: int, start: int, stop: int) -> bytes | None:
    """Bytes of a block, or None where it is not there whole."""
    try:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if status.st_size != num_bytes:
                return None
            found = os.pread(file.fileno(), stop - start, start)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if time.time() - status.st_mtime > TOUCH_AFTER_S:
        with suppress(OSError):
            os.utime(path)
    return found


def _write(path: Path, fill: Callable[[Path], object]) -> None:
    """A file that appears under its name when it is whole."""
    part = _part_of(path)
    try:
        _fill(part, fill)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _part_of(path: Path) -> Path:
    """A name that no other process uses, on this machine or another that shares the folder."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}{_PART}")


def _fill(part: Path, fill: Callable[[Path], object]) -> None:
    fill(part)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
