"""Pairs of token files that grow, and outlive the process that writes them.

While they grow they are `<prefix>.bin.part`, the tokens, and `<prefix>.sizes.part`, an i32 for each document; nothing of either is kept in
memory. `mark` makes what there is durable and says how much it is; whoever wrote that down can go on from there after a kill. At the
end the .idx is written from the sizes, and both files get their names, the .idx last.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed import CODES, HEADER, MAGIC, VERSION, file_names
from tools.datasets.encoding import Rows

PIECE = 1 << 16
"""Documents whose entries of the .idx are in memory at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a pair holds."""

    prefix: str
    documents: int = 0
    tokens: int = 0
    end_tokens: int = 0
    """Tokens that end a document. Where it is 0, nothing in the file separates documents."""
    empty: int = 0
    """Documents without text, which were left out."""


class GrowingPair:
    """One process at a time: a second is refused with ValueError."""

    def __init__(self, written: Written, dtype: np.dtype) -> None:
        """Goes on after ``written``, what a `mark` said; with its counts 0, it begins anew."""
        self._dtype, self._final = dtype, file_names(written.prefix)
        self._parts = part_names(written.prefix)
        self._index_part = self._final[1].with_name(f"{self._final[1].name}.part")
        self._final[0].parent.mkdir(parents=True, exist_ok=True)
        self.written = written
        self._tokens, self._sizes = (_locked(path) for path in self._parts)
        self._tokens.truncate(self.written.tokens * dtype.itemsize)
        self._sizes.truncate(self.written.documents * 4)

    def add(self, rows: Rows) -> None:
        self._tokens.write(rows.tokens.tobytes())
        self._sizes.write(rows.sizes.astype("<i4").tobytes())
        self.written = Written(
            prefix=self.written.prefix,
            documents=self.written.documents + len(rows.sizes),
            tokens=self.written.tokens + len(rows.tokens),
            end_tokens=self.written.end_tokens + rows.end_tokens,
            empty=self.written.empty + rows.empty,
        )

    def mark(self) -> Written:
        """What there is, after it has reached the disk."""
        for file in (self._tokens, self._sizes):
            file.flush()
            os.fsync(file.fileno())
        return self.written

    def finish(self) -> None:
        """Write the .idx and give both files their names, while the lock is held."""
        self.mark()
        with open(self._index_part, "wb") as index:
            index.writelines(self._index())
            index.flush()
            os.fsync(index.fileno())
        self._final[1].unlink(missing_ok=True)
        os.replace(self._parts[0], self._final[0])
        os.replace(self._index_part, self._final[1])
        self._parts[1].unlink()
        self.close()

    def discard(self) -> None:
        """Leave nothing behind."""
        for path in (*self._parts, self._index_part):
            path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Stop, and leave the parts for who goes on."""
        self._tokens.close()
        self._sizes.close()

    def _index(self) -> Iterator[bytes]:
        """The content of the .idx; each document is one sequence."""
        documents = self.written.documents
        code = next(code for code, known in CODES.items() if known == self._dtype)
        yield HEADER.pack(MAGIC, VERSION, code, documents, documents + 1)
        for sizes in self._stored_sizes():
            yield sizes.tobytes()
        offset = 0
        for sizes in self._stored_sizes():
            ends = offset + np.cumsum(sizes, dtype="<i8") * self._dtype.itemsize
            yield (ends - sizes * np.int64(self._dtype.itemsize)).tobytes()
            offset = int(ends[-1])
        for start in range(0, documents + 1, PIECE):
            yield np.arange(start, min(start + PIECE, documents + 1), dtype="<i8").tobytes()

    def _stored_sizes(self) -> Iterator[NDArray[np.int32]]:
        with open(self._parts[1], "rb") as file:
            while raw := file.read(4 * PIECE):
                yield np.frombuffer(raw, dtype="<i4")


def part_names(prefix: str) -> tuple[Path, Path]:
    """Tokens and sizes of a pair that grows."""
    bin_path, _ = file_names(prefix)
    return bin_path.with_name(f"{bin_path.name}.part"), Path(f"{prefix}.sizes.part")


def holds(written: Written, dtype: np.dtype) -> bool:
    """Whether the parts are still there, with at least as much as ``written`` says."""
    wanted = (written.tokens * dtype.itemsize, written.documents * 4)
    return all(path.is_file() and path.stat().st_size >= num_bytes for path, num_bytes in zip(part_names(written.prefix), wanted, strict=True))


def _locked(path: Path) -> BinaryIO:
    file = open(path, "ab")  # noqa: SIM115 (open until `close`)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ValueError(f"{path} is being written by another process: wait for it, or give another --output-prefix.") from error
    return file
