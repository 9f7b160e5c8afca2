"""Sources cut into chunks of records, and chunks tokenized in order by one process or several."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass

from tools.datasets.documents import Record, Source, read_records
from tools.datasets.encoding import Recipe, Rows, encoder_of

CHUNK_BYTES, CHUNK_RECORDS = 1 << 18, 1000
"""What one process tokenizes at a time: the first that is reached."""
CHUNKS_AHEAD = 3
"""Of each process, read before they are asked for."""
THREADS_OF_TOKENIZERS = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """How far the sources have been read."""

    source: int = 0
    records: int = 0
    """Of that source."""
    checksum: int = 0
    """Of the last of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    source: Source
    records: Sequence[Record]
    end: Position


class OtherSourceError(ValueError):
    """A source is not the one that was read before."""


def cut(sources: Sequence[Source], keys: Sequence[str], start: Position) -> Iterator[Chunk]:
    """All records after ``start``, in order."""
    for number, source in enumerate(sources[start.source :], start=start.source):
        records = read_records(source, keys)
        count = start.records if number == start.source else 0
        if count:
            _skip(records, source, start)
        for piece in _pieces(records):
            count += len(piece)
            yield Chunk(source=source, records=piece, end=Position(source=number, records=count, checksum=_checksum(piece[-1])))


def tokenized(chunks: Iterable[Chunk], recipe: Recipe, *, workers: int) -> Iterator[tuple[Chunk, list[Rows]]]:
    """Each chunk, in order, with what it adds to each pair of files. Every process computes on one core."""
    if workers == 1:
        with _one_thread():
            for chunk in chunks:
                yield chunk, encoder_of(recipe).encode(chunk.source, chunk.records)
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)
    waiting: deque[tuple[Chunk, Future[list[Rows]]]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_encode, recipe, chunk.source, chunk.records)))
            if len(waiting) > CHUNKS_AHEAD * workers:
                done, rows = waiting.popleft()
                yield done, rows.result()
        for done, rows in waiting:
            yield done, rows.result()
    except BrokenProcessPool as error:
        remedy = "give fewer --workers if memory was short, and run the same command again to go on"
        raise ChildProcessError(f"A process that tokenized was ended from outside: {remedy}.") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _skip(records: Iterator[Record], source: Source, start: Position) -> None:
    last = deque(itertools.islice(records, start.records), maxlen=1)
    if not last or _checksum(last[0]) != start.checksum:
        found = f"its record {start.records} is not the one that an interrupted run read last"
        raise OtherSourceError(f"{source.name} has changed, as {found}: give the same input, or another --output-prefix.")


def _pieces(records: Iterable[Record]) -> Iterator[list[Record]]:
    piece, num_bytes = list[Record](), 0
    for record in records:
        piece.append(record)
        num_bytes += record.num_bytes
        if num_bytes >= CHUNK_BYTES or len(piece) == CHUNK_RECORDS:
            yield piece
            piece, num_bytes = [], 0
    if piece:
        yield piece


def _checksum(record: Record) -> int:
    return zlib.crc32(record.content if isinstance(record.content, bytes) else repr(record.content).encode(errors="surrogatepass"))


def _encode(recipe: Recipe, source: Source, records: Sequence[Record]) -> list[Rows]:
    return encoder_of(recipe).encode(source, records)


def _begin() -> None:
    """Make a new process one that computes on one core, leaves Ctrl-C to its parent, and does not outlive it."""
    os.environ[THREADS_OF_TOKENIZERS] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "started by tokenized()"
    parent.join()
    os._exit(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps the tokenizers library, which asks the environment, from computing on every core."""
    before = os.environ.get(THREADS_OF_TOKENIZERS)
    os.environ[THREADS_OF_TOKENIZERS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[THREADS_OF_TOKENIZERS]
        else:
            os.environ[THREADS_OF_TOKENIZERS] = before
