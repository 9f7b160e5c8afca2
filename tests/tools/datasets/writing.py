"""Files for the tests of the data tools: small pairs, and sparse ones that are gigabytes long and take kilobytes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from megatron.data.indexed import IndexedDatasetWriter, file_names, index_bytes


def write_pair(prefix: Path, rows: Sequence[Sequence[int]], dtype: DTypeLike = "u2") -> str:
    """A pair of one document a row; returns its prefix."""
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for row in rows:
            writer.add_document(row)
    return str(prefix)


def write_sparse_pair(prefix: Path, sizes: Sequence[int], dtype: DTypeLike = "u2") -> str:
    """A pair of sequences of zeros whose first and last token are their number and one; its .bin is a hole between them."""
    stored = np.dtype(dtype).newbyteorder("<")
    lengths = np.array(sizes, dtype=np.int64)
    offsets = (np.cumsum(lengths) - lengths) * stored.itemsize
    bin_path, idx_path = file_names(prefix)
    marks = {}
    for number, (offset, length) in enumerate(zip(offsets.tolist(), sizes, strict=True), start=1):
        marks[offset] = marks[offset + (length - 1) * stored.itemsize] = np.array(number, dtype=stored).tobytes()
    write_sparse(bin_path, int(lengths.sum()) * stored.itemsize, marks)
    idx_path.write_bytes(index_bytes(stored, sizes=lengths, offsets=offsets, doc_idx=np.arange(len(sizes) + 1)))
    return str(prefix)


def write_sparse(path: Path, num_bytes: int, marks: Mapping[int, bytes]) -> None:
    """A file of zeros with some bytes at some places."""
    with open(path, "wb") as file:
        file.truncate(num_bytes)
        for place, data in marks.items():
            os.pwrite(file.fileno(), data, place)


def read_at(path: Path, place: int, length: int) -> bytes:
    with open(path, "rb") as file:
        return os.pread(file.fileno(), length, place)


def stored_bytes(path: Path) -> int:
    """What a file takes on the disk."""
    return path.stat().st_blocks * 512
