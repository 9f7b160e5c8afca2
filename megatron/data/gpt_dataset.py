"""Samples of ``seq_length + 1`` tokens cut from a token file, in GPT-NeoX's order (`packing` says which, this module reads them)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.data.index_cache import open_index
from megatron.data.indexed import IndexedDataset
from megatron.data.packing import SampleIndex, SampleRequest

IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    text: NDArray[np.int64]
    """``[B, seq_length + 1]`` token ids: each is the input of its place and the label of the one before."""
    label: NDArray[np.int64] | None
    """The same shape; below 0 where the token must not be learned. None: everything is learned."""


class Piece(NamedTuple):
    """A stretch of a sequence, in tokens."""

    sequence: int
    offset: int
    length: int


class SampleDataset(Protocol):
    def __len__(self) -> int:
        """Samples of one pass."""
        ...

    @property
    def num_readable(self) -> int:
        """Samples that can be read from the first on without one being repeated."""
        ...

    @property
    def seq_length(self) -> int: ...

    @property
    def is_labelled(self) -> bool:
        """Whether samples have label rows."""
        ...

    def read_into(self, place: int, *, text: NDArray[np.int64], label: NDArray[np.int64] | None) -> None:
        """Writes a sample to rows of ``seq_length + 1``. ``label`` is given if the samples have one."""
        ...


def read_samples(dataset: SampleDataset, places: Sequence[int]) -> Samples:
    """The samples at ``places``. A token is copied once, from the file's map to its row, and widened on the way."""
    text = np.empty((len(places), dataset.seq_length + 1), dtype=np.int64)
    label = np.empty_like(text) if dataset.is_labelled else None
    for row, place in enumerate(places):
        dataset.read_into(place, text=text[row], label=None if label is None else label[row])
    return Samples(text=text, label=label)


class GPTDataset:
    """Samples of one token file.

    Packed: every sequence end to end, cut each ``seq_length`` tokens; consecutive samples share a token. `len` is one less than the
    samples there are, as in GPT-NeoX, whose sampler never visits the last; a blend may ask for it (`num_readable`).

    pack_until_overflow and unpacked: whole sequences, right padded with 0, and always with a label row that hides the padding. Here
    `len` counts every sample: their number is the number asked for, and one less would end a run a sample early.
    """

    def __init__(self, tokens: IndexedDataset, index: SampleIndex, *, seq_length: int, labels: IndexedDataset | None = None) -> None:
        _check_labels(tokens, labels)
        if not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"{tokens.prefix} holds {tokens.dtype}, and tokens are integers: give the prefix of a token file.")
        self.tokens = tokens
        self.labels = labels
        self.index = index
        self.seq_length = seq_length
        self.is_packed = index.sample_idx.ndim == 2

    @classmethod
    def open(
        cls,
        tokens: IndexedDataset,
        name: str,
        request: SampleRequest,
        *,
        labels: IndexedDataset | None = None,
        is_builder: bool = True,
        barrier: Callable[[], None] = lambda: None,
    ) -> GPTDataset:
        """The samples of a request; its index comes from the cache under ``name`` where that is right."""
        _check_labels(tokens, labels)
        index = open_index(tokens, name, request, labels=labels, is_builder=is_builder, barrier=barrier)
        return cls(tokens, index, seq_length=request.seq_length, labels=labels)

    def __len__(self) -> int:
        return self.index.num_rows - 1 if self.is_packed else self.index.num_rows

    @property
    def num_readable(self) -> int:
        return self.index.num_rows

    @property
    def is_labelled(self) -> bool:
        return self.labels is not None or not self.is_packed

    def read_into(self, place: int, *, text: NDArray[np.int64], label: NDArray[np.int64] | None) -> None:
        pieces = self.pieces(place)
        _fill(text, self.tokens, pieces, padding=0)
        if label is not None:
            _fill(label, self.tokens if self.labels is None else self.labels, pieces, padding=IGNORED_LABEL)

    def pieces(self, place: int) -> list[Piece]:
        """What a sample is made of, in order, cut where it is full."""
        if not 0 <= place < self.index.num_rows:
            raise IndexError(f"Sample {place} of {self.tokens.prefix} does not exist: it has {self.index.num_rows}, counted from 0.")
        sample = int(self.index.shuffle_idx[place])
        left = self.seq_length + 1
        kept: list[Piece] = []
        for sequence, offset, length in self._packed_pieces(sample) if self.is_packed else self._whole_pieces(sample):
            if left and length:
                kept.append(Piece(sequence, offset, min(length, left)))
                left -= kept[-1].length
        return kept

    def _packed_pieces(self, sample: int) -> list[Piece]:
        """The sample's tokens and the one after them."""
        (first, begin), (last, end) = (map(int, self.index.sample_idx[row]) for row in (sample, sample + 1))
        doc_idx = self.index.doc_idx
        if first == last:
            return [Piece(int(doc_idx[first]), begin, end - begin + 1)]
        middle = [self._whole(position) for position in range(first + 1, last)]
        sequence, _, size = self._whole(first)
        return [Piece(sequence, begin, size - begin), *middle, Piece(int(doc_idx[last]), 0, end + 1)]

    def _whole_pieces(self, sample: int) -> list[Piece]:
        first, last = int(self.index.sample_idx[sample]), int(self.index.sample_idx[sample + 1])
        return [self._whole(position) for position in range(first, last)]

    def _whole(self, position: int) -> Piece:
        """All of the sequence at a place of the reading order."""
        sequence = int(self.index.doc_idx[position])
        return Piece(sequence, 0, int(self.tokens.sizes[sequence]))


def _fill(row: NDArray[np.int64], source: IndexedDataset, pieces: list[Piece], *, padding: int) -> None:
    """Writes the pieces to the row, one after another, and ``padding`` behind them."""
    filled = 0
    for piece in pieces:
        row[filled : filled + piece.length] = source.get(*piece)
        filled += piece.length
    row[filled:] = padding


def _check_labels(tokens: IndexedDataset, labels: IndexedDataset | None) -> None:
    if labels is not None and not np.array_equal(labels.sizes, tokens.sizes):
        raise ValueError(f"{labels.prefix} does not hold one label for each token of {tokens.prefix}: make both from the same documents.")
