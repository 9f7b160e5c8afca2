"""Text to token files: `prepare_data.py --input my.jsonl --tokenizer-type HFTokenizer --vocab-file tokenizer.json --output-prefix my`.

The flags are those of GPT-NeoX's preprocess_data.py and preprocess_data_with_mask.py. Several --jsonl-keys give several pairs, each of its
own field; --mask-before-token also writes labels, to learn only what follows the first place where those tokens stand. A run that was
interrupted goes on when the same command is given again, and ends in the same files.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from megatron.config.schema import TokenizerConfig
from tools.datasets.chunks import Chunk, OtherSourceError, Position, cut, tokenized
from tools.datasets.documents import find_sources
from tools.datasets.encoding import Recipe, Rows, TextRecipe, encoder_of
from tools.datasets.growing import GrowingPair, Written
from tools.datasets.progress import Bar, Mark, ProgressFile

MARK_S = 10.0
"""Seconds between two marks that an interrupted run can go on from."""


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    recipe = TextRecipe(
        tokenizer=TokenizerConfig(tokenizer_type=options.tokenizer_type, vocab_file=options.vocab_file, merge_file=options.merge_file),
        keys=tuple(options.jsonl_keys),
        append_eod=options.append_eod,
        ftfy=options.ftfy,
        mask_before=_token_ids(options.mask_before_token),
    )
    run(recipe, options)


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="prepare_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--jsonl-keys", nargs="+", default=["text"], help="fields to tokenize; each becomes a pair of files (default: text)")
    flags.add_argument("--tokenizer-type", required=True, help="HFTokenizer, GPT2BPETokenizer, HFGPT2Tokenizer, SPMTokenizer, ...")
    flags.add_argument("--vocab-file", help="file of the tokenizer; of HFTokenizer also a folder or a name of the Hugging Face hub")
    flags.add_argument("--merge-file", help="merges of a GPT-2 BPE")
    flags.add_argument("--append-eod", action="store_true", help="end each document with the tokenizer's end-of-document token")
    flags.add_argument("--mask-before-token", metavar="ID,ID,...", help="also write labels; all up to and with these tokens is not learned")
    add_common_flags(flags)
    return flags


def add_common_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument(
        "--input", required=True, help="with commas between: files and folders (txt, jsonl, jsonl.zst, jsonl.gz, parquet, tar), - (stdin), hf:NAME"
    )
    flags.add_argument("--num-docs", type=int, help="documents of the input, for the progress bar only")
    flags.add_argument("--ftfy", action="store_true", help="repair broken Unicode first")
    flags.add_argument("--output-prefix", required=True, help="writes <prefix>_<key>_document.bin and .idx")
    flags.add_argument("--dataset-impl", default="mmap", help="mmap, the only kind")
    flags.add_argument("--workers", type=int, default=1, help="processes that tokenize, each on one core (default: %(default)s)")
    flags.add_argument("--log-interval", type=int, default=100, help="fewest documents between two movements of the progress bar")


def run(recipe: Recipe, options: argparse.Namespace) -> None:
    """What the flags ask for, and a line on each pair that was written."""
    if options.dataset_impl != "mmap":
        raise ValueError(f"--dataset-impl {options.dataset_impl} is not written any more: leave it out, or say mmap.")
    written = preprocess(
        options.input.split(","),
        options.output_prefix,
        recipe,
        workers=options.workers,
        num_docs=options.num_docs,
        log_interval=options.log_interval,
    )
    for pair in written:
        left_out = f", {pair.empty} empty ones left out" if pair.empty else ""
        print(f"{pair.prefix}: {pair.documents} documents, {pair.tokens} tokens, {pair.end_tokens} of them ends of documents{left_out}")


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    recipe: Recipe,
    *,
    workers: int = 1,
    num_docs: int | None = None,
    log_interval: int = 100,
) -> list[Written]:
    """Tokenize all documents of ``inputs`` in order. The pairs get their names when all of them are complete.

    What is wrong with the input (ValueError) leaves nothing behind; any other end leaves the parts, which the next call goes on from.
    """
    if workers < 1:
        raise ValueError(f"--workers is {workers}: it counts processes and must be at least 1.")
    sources = find_sources(inputs)
    outputs = encoder_of(recipe).outputs
    file = ProgressFile(output_prefix, recipe, sources=sources, outputs=outputs)
    mark = file.read() or Mark(position=Position(), documents=0, written=tuple(Written(prefix=f"{output_prefix}_{pair.name}") for pair in outputs))
    if mark.documents:
        print(f"Going on after {mark.documents} documents that an interrupted run prepared.")
    with ExitStack() as stack:
        pairs = []
        for written, output in zip(mark.written, outputs, strict=True):
            pairs.append(GrowingPair(written, output.dtype))
            stack.callback(pairs[-1].close)
        bar = stack.enter_context(Bar(sources, num_docs=num_docs, log_interval=log_interval, documents=mark.documents))
        try:
            _write(pairs, tokenized(cut(sources, recipe.keys, mark.position), recipe, workers=workers), mark, file, bar)
        except ValueError as mistake:
            if not isinstance(mistake, OtherSourceError):
                for pair in pairs:
                    pair.discard()
                file.remove()
            raise
    return [pair.written for pair in pairs]


def _write(pairs: Sequence[GrowingPair], chunks: Iterable[tuple[Chunk, list[Rows]]], mark: Mark, file: ProgressFile, bar: Bar) -> None:
    """Add all that comes after ``mark``, and finish the pairs."""
    documents, marked_s = mark.documents, time.monotonic()
    for chunk, additions in chunks:
        for pair, rows in zip(pairs, additions, strict=True):
            pair.add(rows)
        documents += len(chunk.records)
        bar.move(chunk, num_tokens=sum(len(rows.tokens) for rows in additions))
        if time.monotonic() - marked_s >= MARK_S:
            file.write(Mark(position=chunk.end, documents=documents, written=tuple(pair.mark() for pair in pairs)))
            marked_s = time.monotonic()
    for pair in pairs:
        pair.finish()
    file.remove()


def _token_ids(given: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in given.split(",")) if given else ()
    except ValueError as error:
        raise ValueError(f"--mask-before-token is {given}: give ids of tokens with commas between, such as 187,34.") from error
