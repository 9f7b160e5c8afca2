"""How records become tokens: a recipe says it and can travel to another process, and the encoder that it builds does it.

Texts become one pair of files for each field. With `mask_before` their labels become another, in which a text counts only after the first
place where those tokens stand. (Conversations: `conversations`.)
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.config.schema import TokenizerConfig
from megatron.data.gpt_dataset import IGNORED_LABEL
from megatron.data.indexed import best_dtype
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from tools.datasets.documents import Record, Source, check_whole, texts_of

LABELS = np.dtype("<i4")
"""Of labels, which may be -100, and of tokens that have labels, as GPT-NeoX writes both."""
LIBRARIES = ("tokenizers", "transformers", "sentencepiece", "tiktoken", "ftfy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A pair of files that a recipe makes."""

    name: str
    """What follows the prefix."""
    dtype: np.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What some documents add to one pair of files."""

    tokens: NDArray
    """All rows end to end."""
    sizes: NDArray[np.int32]
    """Tokens of each row."""
    end_tokens: int
    empty: int
    """Documents without text, which have no row."""


class Encoder(Protocol):
    outputs: list[Output]

    def encode(self, source: Source, records: Sequence[Record]) -> list[Rows]:
        """For each output, the rows of the records in their order."""
        ...


class Recipe(Protocol):
    """Frozen, so that a process builds its encoder once."""

    def __hash__(self) -> int: ...

    @property
    def keys(self) -> tuple[str, ...]:
        """Fields that are read."""
        ...

    def build(self) -> Encoder: ...
    def fingerprint(self) -> str:
        """Differs where the tokens may."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecipe:
    tokenizer: TokenizerConfig
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    ftfy: bool = False
    """Repair broken Unicode first."""
    mask_before: tuple[int, ...] = ()
    """Tokens that end what is not to be learned."""

    def build(self) -> Encoder:
        return _TextEncoder(self)

    def fingerprint(self) -> str:
        return fingerprint(repr(self), [self.tokenizer.vocab_file, self.tokenizer.merge_file])


class _TextEncoder:
    def __init__(self, recipe: TextRecipe) -> None:
        if recipe.mask_before and len(recipe.keys) > 1:
            raise ValueError(f"--mask-before-token labels one field, and --jsonl-keys names {len(recipe.keys)}: prepare them one by one.")
        if recipe.ftfy:
            repair("")
        self._recipe = recipe
        self._tokenizer: Tokenizer = build_tokenizer(recipe.tokenizer)
        dtype = LABELS if recipe.mask_before else best_dtype(self._tokenizer.vocab_size)
        labels = [Output(name="label_document", dtype=LABELS)] if recipe.mask_before else []
        self.outputs = [*(Output(name=f"{key}_document", dtype=dtype) for key in recipe.keys), *labels]

    def encode(self, source: Source, records: Sequence[Record]) -> list[Rows]:
        documents = [texts_of(source, record, self._recipe.keys) for record in records]
        columns = [self._tokens(source, records, texts) for texts in zip(*documents, strict=True)]
        if self._recipe.mask_before:
            columns.append([labels_after(row, self._recipe.mask_before) for row in columns[0]])
        return [rows_of(column, output, eod_id=self._tokenizer.eod_id) for column, output in zip(columns, self.outputs, strict=True)]

    def _tokens(self, source: Source, records: Sequence[Record], texts: Sequence[str]) -> list[list[int]]:
        """A row for each text; those of empty texts are empty."""
        if self._recipe.ftfy:
            texts = [repair(text) for text in texts]
        for record, text in zip(records, texts, strict=True):
            check_whole(text, source, record)
        rows = self._tokenizer.encode_batch(texts)
        if self._recipe.append_eod:
            for row in rows:
                if row:
                    row.append(self._tokenizer.eod_id)
        return rows


def labels_after(row: list[int], mask_before: Sequence[int]) -> list[int]:
    """The row with -100 up to and with the first place where ``mask_before`` stands; all of the row where it does not."""
    length = len(mask_before)
    for start in range(len(row) - length + 1):
        if row[start] == mask_before[0] and row[start : start + length] == list(mask_before):
            return [IGNORED_LABEL] * (start + length) + row[start + length :]
    return row


def rows_of(column: Sequence[Sequence[int]], output: Output, *, eod_id: int) -> Rows:
    """The rows that are not empty, end to end."""
    kept = [row for row in column if len(row)]
    try:
        tokens = np.concatenate([np.array(row, dtype=output.dtype) for row in kept]) if kept else np.zeros(0, dtype=output.dtype)
    except OverflowError as error:
        raise ValueError(f"A token does not fit {output.dtype}, as the tokenizer has ids above its size: {error}") from error
    ends = int(np.count_nonzero(tokens == eod_id))
    return Rows(tokens=tokens, sizes=np.array([len(row) for row in kept], dtype=np.int32), end_tokens=ends, empty=len(column) - len(kept))


def repair(text: str) -> str:
    try:
        import ftfy
    except ImportError as error:
        raise ValueError("--ftfy needs the package ftfy: pip install ftfy, or leave the flag out.") from error
    return str(ftfy.fix_text(text))


@functools.cache
def encoder_of(recipe: Recipe) -> Encoder:
    """One for each process."""
    return recipe.build()


def fingerprint(described: str, files: Sequence[str | Path | None]) -> str:
    """Of a description, the content of files and folders, and the versions of the libraries that tokenize."""
    digest = hashlib.sha256(described.encode())
    for name in files:
        for path in _files(Path(name)) if name else ():
            digest.update(path.read_bytes())
    for library in LIBRARIES:
        try:
            digest.update(f"{library} {metadata.version(library)}".encode())
        except metadata.PackageNotFoundError:
            continue
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(inner for inner in path.iterdir() if inner.suffix in (".json", ".jinja", ".model", ".txt"))
    return [path] if path.is_file() else []
