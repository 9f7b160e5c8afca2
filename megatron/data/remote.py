"""Files behind a protocol (`s3://`, `gs://`, `https://`, ...), read by ranges through fsspec and kept in a `BlockCache`.

Nothing is held open, and the file system is asked for anew at each request: fsspec keeps one per process, so that worker processes
may be forked at any time. Credentials and endpoints are fsspec's own business (its configuration files and environment variables).
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from megatron.data.block_cache import BlockCache

RETRY_AFTER_S = (1.0, 4.0, 15.0)
"""Waits before a request that failed is made again."""
COPY_BYTES = 32 << 20
"""Of one request, where a whole file is copied."""
VERSION_KEYS = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "mtime", "created", "generation", "md5Hash", "Content-MD5")
"""What file systems say of a file that changes with its content."""
log = logging.getLogger(__name__)


class _FileSystem(Protocol):
    def info(self, path: str) -> Mapping[str, object]: ...
    def cat_file(self, path: str, start: int, end: int) -> bytes: ...


def is_remote(name: str | Path) -> bool:
    """Whether a prefix or file is named by a protocol rather than a path."""
    return "://" in str(name)


def exists(url: str) -> bool:
    """Whether there is such a file. Asks over the network."""
    try:
        _info(url)
    except FileNotFoundError:
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """The bytes of a file as it was when it was opened. ``file[10:20]`` is a read-only array of bytes 10 to 19."""

    url: str
    num_bytes: int
    version: str
    """Names the file and its content, as far as the file system tells: fit for the name of a folder."""
    cache: BlockCache

    @classmethod
    def open(cls, url: str, cache: BlockCache) -> RemoteFile:
        info = _info(url)
        size = info.get("size")
        if not isinstance(size, int):
            raise ValueError(f"{url} has a length that its server does not tell: copy it to a disk and give that path.")
        if info.get("partial") is False:
            raise ValueError(f"{url} is on a server that sends whole files only: copy it to a disk and give that path.")
        facts = {key: str(info[key]) for key in VERSION_KEYS if key in info}
        version = hashlib.sha256(json.dumps([url, size, facts], sort_keys=True).encode()).hexdigest()[:24]
        return cls(url=url, num_bytes=size, version=version, cache=cache)

    def __len__(self) -> int:
        return self.num_bytes

    def __getitem__(self, part: slice) -> NDArray[np.uint8]:
        start, stop, _ = part.indices(self.num_bytes)
        width = self.cache.block_bytes
        blocks = range(start // width, -(-stop // width)) if start < stop else range(0)
        content = [self._of_block(block, max(start - block * width, 0), min(stop - block * width, width)) for block in blocks]
        return np.frombuffer(content[0] if len(content) == 1 else b"".join(content), dtype=np.uint8)

    def copied(self) -> Path:
        """The whole file on the local disk."""
        return self.cache.copy_of(self.version, self._copy_to)

    def _of_block(self, block: int, start: int, stop: int) -> bytes:
        first = block * self.cache.block_bytes
        last = min(first + self.cache.block_bytes, self.num_bytes)
        return self.cache.read(self.version, block, num_bytes=last - first, start=start, stop=stop, fetch=lambda: _range_of(self.url, first, last))

    def _copy_to(self, path: Path) -> None:
        log.info("Copying %s (%s bytes).", self.url, f"{self.num_bytes:,}")
        with open(path, "wb") as file:
            for first in range(0, self.num_bytes, COPY_BYTES):
                file.write(_range_of(self.url, first, min(first + COPY_BYTES, self.num_bytes)))


def _range_of(url: str, first: int, last: int) -> bytes:
    """Bytes ``first`` to ``last`` of a remote file, asked for again a few times where the network fails."""
    for wait_s in (*RETRY_AFTER_S, None):
        try:
            files, path = _filesystem(url)
            content = files.cat_file(path, start=first, end=last)
            break
        except (FileNotFoundError, PermissionError) as error:
            raise ValueError(f"{url} can no longer be read: {_reason(error)}. Put it back as it was, or start again with what is there.") from error
        except Exception as error:  # whatever the client of this protocol raises; they share no class
            if wait_s is None:
                attempts = len(RETRY_AFTER_S) + 1
                raise ValueError(f"Bytes {first} to {last} of {url} cannot be read, after {attempts} attempts: {_reason(error)}.") from error
            log.warning("Reading %s failed (%s); trying again in %g s.", url, _reason(error), wait_s)
            time.sleep(wait_s)
    if len(content) != last - first:
        raise ValueError(
            f"{url} sent {len(content)} bytes when asked for {last - first} (from byte {first}): it was changed meanwhile, or its server does not "
            "send parts of files. Start again, or copy it to a disk and give that path."
        )
    return content


def _info(url: str) -> Mapping[str, object]:
    """What the file system knows of a file. FileNotFoundError where there is none."""
    files, path = _filesystem(url)
    try:
        return files.info(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # as above
        raise ValueError(f"{url} cannot be looked at: {_reason(error)}. Check the address, the network, and your credentials.") from error


def _filesystem(url: str) -> tuple[_FileSystem, str]:
    import fsspec

    try:
        return cast(tuple[_FileSystem, str], fsspec.core.url_to_fs(url))
    except ImportError as error:
        raise ValueError(f"{url} needs a package that is not installed: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{url} names no protocol that fsspec knows ({error}): write for example s3://bucket/prefix, or a path.") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": .")
