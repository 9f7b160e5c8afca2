"""Rows of token ids as training cuts them, from a dataset, a text file or ids in memory, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron.data.indexed import IndexedDataset
from megatron.data.tokenizer import Tokenizer

BLOCK = 32
"""Rows in memory at once."""


class Tokens(Protocol):
    """A long stretch of running text as token ids."""

    @property
    def name(self) -> str: ...
    @property
    def num_tokens(self) -> int: ...
    def read(self, start: int, length: int) -> NDArray[np.int64]: ...


class DatasetTokens:
    """All sequences of a ``.bin/.idx`` pair, back to back. Nothing is loaded but what is read."""

    def __init__(self, prefix: str | Path) -> None:
        self._dataset = IndexedDataset(Path(prefix).with_suffix("") if str(prefix).endswith((".bin", ".idx")) else prefix)
        self._ends = self._dataset.sizes.cumsum(dtype=np.int64)
        self.name = self._dataset.prefix
        self.num_tokens = self._dataset.num_tokens

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        out = np.empty(length, dtype=np.int64)
        filled, sequence = 0, int(np.searchsorted(self._ends, start, side="right"))
        while filled < length:
            offset = start + filled - (int(self._ends[sequence]) - int(self._dataset.sizes[sequence]))
            part = self._dataset.get(sequence, offset, min(length - filled, int(self._dataset.sizes[sequence]) - offset))
            out[filled : filled + len(part)] = part
            filled, sequence = filled + len(part), sequence + 1
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayTokens:
    """Token ids in memory."""

    name: str
    ids: NDArray[np.int64]

    @classmethod
    def of_text(cls, path: Path, tokenizer: Tokenizer) -> ArrayTokens:
        """A text file as one document."""
        return cls(name=path.name, ids=np.array(tokenizer.encode(path.read_text(encoding="utf-8")), dtype=np.int64))

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        return self.ids[start : start + length]


def row_blocks(tokens: Tokens, *, seq_length: int, most: int | None = None) -> Iterator[Tensor]:
    """All rows of ``seq_length`` tokens, or ``most`` of them spread evenly over the text. ``[b, seq_length]`` int64 each."""
    count = tokens.num_tokens // seq_length
    if count == 0:
        raise ValueError(f"{tokens.name} has {tokens.num_tokens} tokens, but a row takes {seq_length}: give more text, or a smaller --seq-length.")
    chosen = np.arange(count) if most is None or most >= count else np.arange(most) * count // most
    for block in np.split(chosen, range(BLOCK, len(chosen), BLOCK)):
        yield torch.from_numpy(np.stack([tokens.read(int(row) * seq_length, seq_length) for row in block]))
