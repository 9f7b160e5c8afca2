"""Texts, and the pairs of tokens that a model is asked about: what it reads, and what comes next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path

from transformers import PreTrainedTokenizerBase

HUB_NAMES = {"wikitext": "Salesforce/wikitext"}
"""What the reference's names of data sets are called today."""


def texts_in(paths: Sequence[Path]) -> Iterator[str]:
    """The texts of files, in order: each line's ``text`` in ``.jsonl`` files; any other file is one text."""
    for path in paths:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                yield from (json.loads(line)["text"] for line in lines if line.strip())
        else:
            yield path.read_text(encoding="utf-8")


def texts_of_dataset(name: str, task: str, split: str) -> Iterator[str]:
    """The column ``text`` of a data set that the package ``datasets`` loads, by name or from a folder."""
    if name == "pg19":
        raise ValueError("pg19 is published as a program, which datasets no longer runs: give the files of its books with --text.")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError("--dataset_name needs the package datasets (pip install datasets); --text FILE does not.") from None
    rows = load_dataset(HUB_NAMES.get(name, name), None if task == "default" else task, split=split)
    return (row["text"] for row in rows)


def token_pairs(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, num_samples: int | None = None) -> Iterator[tuple[int, int]]:
    """Each token of each text but its last, and the token after it. Texts begin as the tokenizer begins them (BOS)."""
    for text in islice(texts, num_samples):
        ids = tokenizer(text, verbose=False)["input_ids"]
        yield from pairwise(ids)


def digest(paths: Sequence[Path]) -> str:
    """Names the content of files."""
    hashed = hashlib.sha256()
    for path in paths:
        hashed.update(path.suffix.encode())
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                hashed.update(piece)
    return hashed.hexdigest()[:16]
