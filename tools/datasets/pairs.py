"""What the commands about `.bin/.idx` pairs share: names, documents, text, and all tokens in long pieces."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed import IndexedDataset, file_names
from megatron.data.tokenizer import Tokenizer

SEQUENCES = 1 << 20
"""Sequences whose places are in memory at once."""
TOKENS = 1 << 23
"""Tokens of one piece."""


def prefix_of(name: str) -> str:
    """The prefix of a pair, which the name of one of its files also tells."""
    return name[:-4] if name.endswith((".bin", ".idx")) and Path(name).is_file() else name


def open_pair(name: str) -> IndexedDataset:
    return IndexedDataset(prefix_of(name))


def prefixes(names: list[str]) -> list[str]:
    """The pairs themselves, and of a folder all that are in it, by name."""
    found: list[str] = []
    for name in names:
        inside = sorted(str(path)[:-4] for path in Path(name).glob("*.idx")) if Path(name).is_dir() else [prefix_of(name)]
        if not inside:
            raise ValueError(f"The folder {name} holds no .idx file: give prefixes of token files, or a folder with some.")
        found += inside
    return found


def document_borders(dataset: IndexedDataset) -> NDArray[np.int64]:
    """First sequence of each document, then the number of sequences. Where a merged file lists no documents, every sequence is one."""
    return dataset.doc_idx if len(dataset.doc_idx) > 1 else np.arange(len(dataset) + 1, dtype=np.int64)


def document_of(dataset: IndexedDataset, sequence: int) -> int:
    """The document that holds a sequence."""
    if len(dataset.doc_idx) == 1:
        return sequence
    return bisect.bisect_right(dataset.doc_idx, sequence) - 1  # numpy's searchsorted would first copy all borders, which are not aligned


def document_tokens(dataset: IndexedDataset, document: int) -> NDArray:
    """All tokens of a document."""
    if not 0 <= document < dataset.num_documents:
        raise ValueError(f"Document {document} of {dataset.prefix} does not exist: it has {dataset.num_documents}, counted from 0.")
    first, last = (document, document + 1) if len(dataset.doc_idx) == 1 else map(int, dataset.doc_idx[document : document + 2])
    return np.concatenate([np.zeros(0, dtype=dataset.dtype), *(dataset[sequence] for sequence in range(first, last))])


def token_runs(dataset: IndexedDataset) -> Iterator[tuple[int, NDArray]]:
    """All tokens in the order of the sequences, in pieces of up to `TOKENS`, each after its place (in tokens) in the .bin.

    Mapped and not copied. Sequences that lie back to back come together.
    """
    path, _ = file_names(dataset.prefix)
    width = dataset.dtype.itemsize
    count = path.stat().st_size // width
    if count == 0:
        return
    tokens = np.memmap(path, dtype=dataset.dtype, mode="r", shape=(count,))
    for start in range(0, len(dataset), SEQUENCES):
        begins = dataset.offsets[start : start + SEQUENCES] // width
        ends = begins + dataset.sizes[start : start + SEQUENCES]
        breaks = np.flatnonzero(begins[1:] != ends[:-1]) + 1
        for first, last in itertools.pairwise([0, *breaks.tolist(), len(begins)]):
            for at in range(int(begins[first]), int(ends[last - 1]), TOKENS):
                yield at, tokens[at : min(at + TOKENS, int(ends[last - 1]))]


def text_of(ids: NDArray, tokenizer: Tokenizer) -> str:
    """The text of these tokens, which must be the tokenizer's."""
    strange = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
    if len(strange):
        raise ValueError(f"Token {strange[0]} is none of the tokenizer's {tokenizer.vocab_size}: give the tokenizer that made the file.")
    return tokenizer.decode(ids.tolist())


def ids_text(ids: NDArray) -> str:
    """The numbers, for reading."""
    return " ".join(map(str, ids.tolist()))
