"""Text to token files: `prepare_data.py --input my.jsonl --tokenizer-type HFTokenizer --vocab-file tokenizer.json --output-prefix my`.

The flags are those of GPT-NeoX's preprocess_data.py. Several --jsonl-keys give several pairs, each of its own field.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron.config.schema import TokenizerConfig
from megatron.data.indexed import IndexedDatasetWriter, best_dtype
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from tools.datasets.documents import input_files, read_documents

CHUNK = 128
"""Documents that one process tokenizes at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a text becomes tokens."""

    tokenizer: TokenizerConfig
    append_eod: bool = False
    ftfy: bool = False
    """Repair broken Unicode first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What one pair holds."""

    prefix: str
    documents: int
    tokens: int
    end_tokens: int
    """Tokens that end a document. Where it is 0, nothing in the file separates documents."""
    empty: int
    """Documents without text, which were left out."""


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    if options.dataset_impl != "mmap":
        raise ValueError(f"--dataset-impl {options.dataset_impl} is not written any more: leave it out, or say mmap.")
    if options.workers < 1:
        raise ValueError(f"--workers is {options.workers}: it counts processes and must be at least 1.")
    recipe = Recipe(
        tokenizer=TokenizerConfig(tokenizer_type=options.tokenizer_type, vocab_file=options.vocab_file, merge_file=options.merge_file),
        append_eod=options.append_eod,
        ftfy=options.ftfy,
    )
    written = preprocess(
        options.input.split(","),
        options.output_prefix,
        recipe,
        keys=options.jsonl_keys,
        workers=options.workers,
        num_docs=options.num_docs,
        log_interval=options.log_interval,
    )
    for pair in written:
        left_out = f", {pair.empty} empty ones left out" if pair.empty else ""
        print(f"{pair.prefix}: {pair.documents} documents, {pair.tokens} tokens, {pair.end_tokens} of them ends of documents{left_out}")


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="prepare_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--input", required=True, help="files or folders, with commas between: txt, jsonl, jsonl.zst, jsonl.gz, parquet")
    flags.add_argument("--jsonl-keys", nargs="+", default=["text"], help="fields to tokenize; each becomes a pair of files")
    flags.add_argument("--num-docs", type=int, help="documents of the input, for the progress bar only")
    flags.add_argument("--tokenizer-type", required=True, help="HFTokenizer, GPT2BPETokenizer, HFGPT2Tokenizer, SPMTokenizer, ...")
    flags.add_argument("--vocab-file", help="file of the tokenizer")
    flags.add_argument("--merge-file", help="merges of a GPT-2 BPE")
    flags.add_argument("--append-eod", action="store_true", help="end each document with the tokenizer's end-of-document token")
    flags.add_argument("--ftfy", action="store_true", help="repair broken Unicode first")
    flags.add_argument("--output-prefix", required=True, help="writes <prefix>_<key>_document.bin and .idx")
    flags.add_argument("--dataset-impl", default="mmap", help="mmap, the only kind")
    flags.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    flags.add_argument("--log-interval", type=int, default=100, help="documents between two movements of the progress bar")
    return flags


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    recipe: Recipe,
    *,
    keys: Sequence[str] = ("text",),
    workers: int = 1,
    num_docs: int | None = None,
    log_interval: int = 100,
) -> list[Written]:
    """Tokenize all documents of ``inputs`` in order; one pair of files for each key. Nothing is written if anything fails."""
    files = input_files(inputs)
    tokenizer = _tokenizer(recipe.tokenizer)
    if recipe.ftfy:
        _repair("")
    documents = itertools.chain.from_iterable(read_documents(path, keys) for path in files)
    bar = tqdm(total=num_docs, unit="documents", miniters=log_interval, mininterval=0)
    with ExitStack() as stack:
        stack.enter_context(bar)
        pairs = [_Pair(f"{output_prefix}_{key}_document", tokenizer, append_eod=recipe.append_eod, stack=stack) for key in keys]
        for rows in _tokenized(documents, recipe, workers=workers):
            for pair, tokens in zip(pairs, rows, strict=True):
                pair.add(tokens)
            bar.update()
    return [pair.written() for pair in pairs]


class _Pair:
    """One output: its writer and its counts."""

    def __init__(self, prefix: str, tokenizer: Tokenizer, *, append_eod: bool, stack: ExitStack) -> None:
        self._prefix = prefix
        self._eod_id = tokenizer.eod_id
        self._append_eod = append_eod
        self._writer = stack.enter_context(IndexedDatasetWriter(prefix, best_dtype(tokenizer.vocab_size)))
        self._documents = self._tokens = self._ends = self._empty = 0

    def add(self, tokens: NDArray[np.int32]) -> None:
        if not len(tokens):
            self._empty += 1
            return
        if self._append_eod:
            tokens = np.append(tokens, np.int32(self._eod_id))
        self._writer.add_document(tokens)
        self._documents += 1
        self._tokens += len(tokens)
        self._ends += int((tokens == self._eod_id).sum())

    def written(self) -> Written:
        return Written(prefix=self._prefix, documents=self._documents, tokens=self._tokens, end_tokens=self._ends, empty=self._empty)


def _tokenized(documents: Iterable[tuple[str, ...]], recipe: Recipe, *, workers: int) -> Iterator[list[NDArray[np.int32]]]:
    """Token rows of each document, one for each key, in the order of the documents. Reads ahead a few chunks only."""
    chunks = _chunks(documents)
    if workers == 1:
        for chunk in chunks:
            yield from _tokenize(recipe, chunk)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting: deque[Future[list[list[NDArray[np.int32]]]]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_tokenize, recipe, chunk))
            if len(waiting) > 3 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _chunks(documents: Iterable[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    iterator = iter(documents)
    while chunk := list(itertools.islice(iterator, CHUNK)):
        yield chunk


def _tokenize(recipe: Recipe, chunk: list[tuple[str, ...]]) -> list[list[NDArray[np.int32]]]:
    texts = [_repair(text) if recipe.ftfy else text for document in chunk for text in document]
    rows = iter(_tokenizer(recipe.tokenizer).encode_batch(texts))
    return [[np.array(next(rows), dtype=np.int32) for _ in document] for document in chunk]


@functools.cache
def _tokenizer(config: TokenizerConfig) -> Tokenizer:
    """One for each process."""
    return build_tokenizer(config)


def _repair(text: str) -> str:
    try:
        import ftfy
    except ImportError as error:
        raise ValueError("--ftfy needs the package ftfy: pip install ftfy, or leave the flag out.") from error
    return str(ftfy.fix_text(text))
