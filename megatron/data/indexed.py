"""The memory-mapped pair of token files, `<prefix>.bin` and `<prefix>.idx`, byte for byte as GPT-NeoX writes it.

The .bin holds the tokens of all sequences back to back, little endian. The .idx is a header of 34 bytes and three arrays: sizes
in tokens (i32), byte offsets into the .bin (i64), and for each document one past its last sequence (i64, after a leading 0).
34 is odd on purpose of nobody: the arrays are not aligned, so what needs aligned memory takes a copy.

A file that breaks a rule is refused when it is opened; afterwards no read can leave the .bin. A prefix with a protocol
(`s3://bucket/data`) names a remote pair: its .idx is copied once, of its .bin those blocks that are read.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from megatron.data.block_cache import BlockCache
from megatron.data.remote import RemoteFile, is_remote

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
CODES: dict[int, np.dtype] = {
    code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f4", 7: "<f8", 8: "<u2"}.items()
}
"""dtype of the tokens by the code in the header. (Megatron-LM core exchanges 6 and 7.)"""
MAKE_ANEW = "make the pair anew with prepare_data.py, or copy it again."
_CHUNK = 1 << 20


def best_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype GPT-NeoX writes for this vocabulary: u16 below 65500 tokens, else i32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def file_names(prefix: str | Path) -> tuple[Path, Path]:
    """`(<prefix>.bin, <prefix>.idx)`. A prefix may hold dots itself."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


class IndexedDataset:
    """All sequences of a pair; item ``i`` is a read-only array of its tokens, mapped and not copied (if remote: of what was read).

    `sizes` i32: tokens of each sequence. `offsets` i64: its first byte in the .bin. `doc_idx` i64: document borders.

    >>> IndexedDataset("pile_0.87_deduped_text_document")[0]
    """

    def __init__(self, prefix: str | Path, *, warmup: bool = False, cache: BlockCache | None = None) -> None:
        """``warmup`` reads the whole .bin once, so that it lies in the page cache (`mmap_warmup`). ``cache``: of a remote pair;
        by default the user's."""
        self.prefix = str(prefix)
        self.cache = (cache or BlockCache.of_user()) if is_remote(self.prefix) else None
        bin_name, idx_name = (f"{self.prefix}.{kind}" for kind in ("bin", "idx"))
        self._tokens: NDArray[np.uint8] | RemoteFile
        index, self._tokens = (self._remote if self.is_remote else self._local)(idx_name, bin_name)
        self.dtype, self.sizes, self.offsets, self.doc_idx = _read_index(index, idx_name)
        _check_documents(self.doc_idx, len(self.sizes), idx_name)
        _check_places(self.sizes, self.offsets, self.dtype.itemsize, len(self._tokens), idx_name, bin_name)
        if warmup:
            self._warm_up(bin_name)

    def _local(self, idx_name: str, bin_name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        for name in (idx_name, bin_name):
            if not Path(name).is_file():
                raise FileNotFoundError(f"{name} does not exist: {_prefix_hint(self.prefix)}")
        return _map_bytes(Path(idx_name)), _map_bytes(Path(bin_name))

    def _remote(self, idx_name: str, bin_name: str) -> tuple[NDArray[np.uint8], RemoteFile]:
        assert self.cache is not None
        try:
            index, tokens = (RemoteFile.open(name, self.cache) for name in (idx_name, bin_name))
        except FileNotFoundError as error:
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            raise FileNotFoundError(f"{error.args[-1]} does not exist{cause}: {_prefix_hint(self.prefix)}") from error
        return _map_bytes(index.copied()), tokens

    def _warm_up(self, bin_name: str) -> None:
        if self.cache is not None:
            raise ValueError(f"mmap_warmup reads all of a file ahead, and {self.prefix} is remote: leave it out, or copy the pair to a disk.")
        with open(bin_name, "rb") as file:
            while file.read(64 * _CHUNK):
                pass

    def __reduce__(self) -> tuple[Callable[[str, BlockCache | None], IndexedDataset], tuple[str, BlockCache | None]]:
        return _reopened, (self.prefix, self.cache)

    @property
    def is_remote(self) -> bool:
        return self.cache is not None

    @property
    def index_prefix(self) -> str:
        """What the names of cached index arrays begin with: that of the pair, or a place in the cache if it is remote."""
        if self.cache is None:
            return self.prefix
        folder = self.cache.folder / "indices" / hashlib.sha256(self.prefix.encode()).hexdigest()[:24]
        return str(folder / self.prefix.rsplit("/", 1)[-1])

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, sequence: int) -> NDArray:
        return self.get(sequence)

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> NDArray:
        """``length`` tokens (all that follow, by default) of a sequence from its token ``offset`` on. Read-only, not copied."""
        if not 0 <= sequence < len(self.sizes):
            raise IndexError(f"Sequence {sequence} of {self.prefix} does not exist: it has {len(self.sizes)}, counted from 0.")
        size = int(self.sizes[sequence])
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(f"Tokens {offset} to {offset + length} of sequence {sequence} of {self.prefix} do not exist: it has {size} tokens.")
        start = int(self.offsets[sequence]) + offset * self.dtype.itemsize
        return self._tokens[start : start + length * self.dtype.itemsize].view(self.dtype)

    @property
    def num_tokens(self) -> int:
        return int(self.sizes.sum(dtype=np.int64))

    @property
    def num_documents(self) -> int:
        """Documents by `doc_idx`; merged files list none there, and then every sequence is one."""
        return len(self.doc_idx) - 1 if len(self.doc_idx) > 1 else len(self.sizes)


class IndexedDatasetWriter:
    """Writes a pair. It appears under its names when `close` has written all of it, and not at all if the ``with`` block fails.

    >>> with IndexedDatasetWriter("out/my_text_document", best_dtype(50277)) as writer:
    ...     writer.add_document([5, 6, 7, 0])
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES.values():
            raise ValueError(f"Tokens cannot be stored as {self.dtype}: use one of {', '.join(map(str, CODES.values()))}.")
        self._final = file_names(prefix)
        self._parts = tuple(path.with_name(f"{path.name}.{os.getpid()}.part") for path in self._final)
        self._final[0].parent.mkdir(parents=True, exist_ok=True)
        self._bin: BinaryIO = open(self._parts[0], "wb")  # noqa: SIM115 (open until `close`)
        self._sizes = array("i")
        self._doc_idx = array("q", [0])

    def add(self, tokens: ArrayLike) -> None:
        """Append one sequence to the current document."""
        given = np.asarray(tokens)
        if given.ndim != 1 or len(given) > np.iinfo(np.int32).max:
            raise ValueError(f"A sequence of shape {given.shape} cannot be stored: give one row of at most {np.iinfo(np.int32).max} tokens.")
        stored = given.astype(self.dtype)
        if given.dtype != self.dtype and not np.array_equal(stored, given):
            wrong = given[stored != given][0]
            raise ValueError(f"Token {wrong} does not fit {self.dtype}: open the writer with best_dtype(vocab_size) of the tokenizer in use.")
        self._bin.write(stored.tobytes())
        self._sizes.append(len(stored))

    def end_document(self) -> None:
        """The sequences added since the last call are one document."""
        self._doc_idx.append(len(self._sizes))

    def add_document(self, tokens: ArrayLike) -> None:
        """Append a document of one sequence."""
        self.add(tokens)
        self.end_document()

    def close(self) -> None:
        """Write the .idx and give both files their names. The .idx comes last: where it stands, the pair is complete."""
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        with open(self._parts[1], "wb") as file:
            file.write(self._index_bytes())
            file.flush()
            os.fsync(file.fileno())
        self._final[1].unlink(missing_ok=True)
        for part, final in zip(self._parts, self._final, strict=True):
            os.replace(part, final)

    def discard(self) -> None:
        """Leave nothing behind."""
        with suppress(OSError):  # what is still to be written may find the disk full
            self._bin.close()
        for part in self._parts:
            part.unlink(missing_ok=True)

    def _index_bytes(self) -> bytes:
        sizes = np.asarray(self._sizes, dtype="<i4")
        offsets = np.zeros(len(sizes), dtype="<i8")
        np.cumsum(sizes[:-1], dtype=np.int64, out=offsets[1:])
        return index_bytes(self.dtype, sizes=sizes, offsets=offsets * self.dtype.itemsize, doc_idx=np.asarray(self._doc_idx))

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.discard()


def index_bytes(dtype: np.dtype, *, sizes: NDArray[np.integer], offsets: NDArray[np.integer], doc_idx: NDArray[np.integer]) -> bytes:
    """The content of an .idx. ``sizes`` in tokens, ``offsets`` in bytes; ``doc_idx`` begins with 0."""
    code = next(code for code, known in CODES.items() if known == dtype)
    header = HEADER.pack(MAGIC, VERSION, code, len(sizes), len(doc_idx))
    return b"".join([header, sizes.astype("<i4").tobytes(), offsets.astype("<i8").tobytes(), doc_idx.astype("<i8").tobytes()])


def _reopened(prefix: str, cache: BlockCache | None) -> IndexedDataset:
    return IndexedDataset(prefix, cache=cache)


def _prefix_hint(prefix: str) -> str:
    if prefix.endswith((".bin", ".idx")) and Path(prefix).is_file():
        return f"data paths are prefixes, so give {prefix[:-4]}."
    return "a data path is the common prefix of a .bin and an .idx file; check its spelling, or make them with prepare_data.py."


def _map_bytes(path: Path) -> NDArray[np.uint8]:
    """The file as bytes, in a plain array: a slice of a `numpy.memmap` costs microseconds more. An empty file cannot be mapped."""
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r")) if path.stat().st_size else np.zeros(0, dtype=np.uint8)


def _read_index(raw: NDArray[np.uint8], path: str) -> tuple[np.dtype, NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    if bytes(raw[: len(LEGACY_MAGIC)]) == LEGACY_MAGIC:
        raise ValueError(f"{path} is of the old kind that data_impl lazy or cached wrote (TNTIDX): tokenize the text again with prepare_data.py.")
    if bytes(raw[: len(MAGIC)]) != MAGIC:
        raise ValueError(f"{path} does not begin with {MAGIC!r}, so it is not the index of a token file: check data_path, or {MAKE_ANEW}")
    if len(raw) < HEADER.size:
        raise ValueError(f"{path} has {len(raw)} bytes, fewer than its header of {HEADER.size}: {MAKE_ANEW}")
    _, version, code, num_sequences, num_borders = HEADER.unpack(bytes(raw[: HEADER.size]))
    if version != VERSION:
        raise ValueError(f"{path} has version {version}; only version {VERSION} exists: {MAKE_ANEW}")
    if code not in CODES:
        raise ValueError(f"{path} has dtype code {code}; known are {min(CODES)} to {max(CODES)}: {MAKE_ANEW}")
    expected = HEADER.size + 12 * num_sequences + 8 * num_borders
    if len(raw) != expected:
        counts = f"{num_sequences} sequences and {num_borders} document borders"
        raise ValueError(f"{path} has {len(raw)} bytes, but its header promises {counts}, which take {expected}: {MAKE_ANEW}")
    arrays = raw[HEADER.size :]
    sizes, offsets, borders = np.split(arrays, [4 * num_sequences, 12 * num_sequences])
    return CODES[code], sizes.view("<i4"), offsets.view("<i8"), borders.view("<i8")


def _check_documents(doc_idx: NDArray[np.int64], num_sequences: int, path: str) -> None:
    if len(doc_idx) == 0 or doc_idx[0] != 0:
        raise ValueError(f"{path} has no document border 0 at the start of its doc_idx: {MAKE_ANEW}")
    if len(doc_idx) > 1 and doc_idx[-1] != num_sequences:
        raise ValueError(f"{path} ends its last document at sequence {doc_idx[-1]}, but has {num_sequences} sequences: {MAKE_ANEW}")
    for start, stop in _chunks(len(doc_idx)):
        borders = doc_idx[start : stop + 1]
        if (borders[1:] < borders[:-1]).any():  # compared, because a difference of two borders can overflow
            raise ValueError(f"{path} has document borders that run backwards: {MAKE_ANEW}")


def _check_places(sizes: NDArray[np.int32], offsets: NDArray[np.int64], width: int, num_bytes: int, idx_path: str, bin_path: str) -> None:
    """Every sequence lies inside the .bin, on a token border. Compared without sums or products that could overflow."""
    for start, stop in _chunks(len(sizes)):
        size, offset = sizes[start:stop].astype(np.int64), offsets[start:stop]
        inside = (size >= 0) & (offset >= 0) & (offset <= num_bytes)
        wrong = ~inside | (size > (num_bytes - np.where(inside, offset, 0)) // width) | (offset % width != 0)
        if wrong.any():
            bad = int(wrong.argmax())
            place = f"sequence {start + bad} ({size[bad]} tokens of {width} bytes at byte {offset[bad]})"
            raise ValueError(f"{idx_path}: {place} does not lie in {bin_path}, which has {num_bytes} bytes: {MAKE_ANEW}")


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, _CHUNK):
        yield start, min(start + _CHUNK, count)
