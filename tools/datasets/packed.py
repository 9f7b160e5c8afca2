"""Files as they are or packed by gzip or Zstandard, as streams of their content."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    from typing_extensions import Buffer
    from zstandard import ZstdDecompressionObj

COMPRESSED = (".gz", ".zst")
PIECE = 1 << 18
"""Packed bytes that are read at once."""


@contextmanager
def open_packed(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """The content of a file, and a function that says how many bytes of the file itself have been read."""
    with open(path, "rb") as raw, unpacked(raw, path.suffix) as stream:
        yield stream, raw.tell


def unpacked(raw: BinaryIO, suffix: str) -> BinaryIO:
    """The content of a packed stream; ``suffix``: of its name. A stream that is not packed is returned as it is."""
    if suffix.lower() in (".gz", ".tgz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if suffix.lower() == ".zst":
        return io.BufferedReader(_ZstandardFrames(raw), PIECE)
    return raw


class _ZstandardFrames(io.RawIOBase):
    """The content of all frames of a stream. Other than the library's own reader, it notices a last frame that is cut short."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: ZstdDecompressionObj | None = None
        self._packed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        target = memoryview(buffer).cast("B")
        while not self._content:
            self._packed = self._packed or self._raw.read(PIECE)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("a Zstandard frame ends before its end")
                return 0
            frame = self._frame or self._new_frame()
            self._content = memoryview(frame.decompress(self._packed))
            self._packed = frame.unused_data
            self._frame = None if frame.eof else frame
        length = min(len(target), len(self._content))
        target[:length] = self._content[:length]
        self._content = self._content[length:]
        return length
