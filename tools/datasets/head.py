"""The first documents of a .bin/.idx pair, as ids or as text.

    python -m tools.datasets.head data/mine_text_document -n 3
    python -m tools.datasets.head data/mine_text_document --start 1000 --tokenizer tokenizer.json

Of long documents only the beginning is shown (--tokens).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence

from megatron.data.indexed import IndexedDataset
from megatron.data.tokenizer import Tokenizer
from tools.command import exit_status
from tools.datasets.pairs import document_tokens, ids_text, open_pair, text_of
from tools.sepllm.vocabulary import open_tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)

    def report() -> None:
        tokenizer = None if options.tokenizer is None else open_tokenizer(options.tokenizer)
        for line in lines(open_pair(options.pair), options, tokenizer):
            print(line)

    return exit_status(report)


def lines(dataset: IndexedDataset, options: argparse.Namespace, tokenizer: Tokenizer | None) -> Iterator[str]:
    """What to print, a document after another."""
    if options.count < 0 or options.start < 0 or options.tokens < 1:
        raise ValueError("-n and --start count documents from 0 on, and --tokens is at least 1: give other numbers.")
    for document in range(options.start, min(options.start + options.count, dataset.num_documents)):
        ids = document_tokens(dataset, document)
        shown = ids[: options.tokens]
        if options.json:
            content: dict[str, object] = {"ids": shown.tolist()} if tokenizer is None else {"text": text_of(shown, tokenizer)}
            yield json.dumps({"document": document, "tokens": len(ids), **content}, ensure_ascii=False)
        else:
            more = f", the first {len(shown)} of which follow" if len(shown) < len(ids) else ""
            yield f"document {document}: {len(ids)} tokens{more}"
            yield ids_text(shown) if tokenizer is None else text_of(shown, tokenizer)


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="tools.datasets.head", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("pair", metavar="PREFIX")
    flags.add_argument("-n", "--count", type=int, default=5, metavar="COUNT", help="documents (default: %(default)s)")
    flags.add_argument("--start", type=int, default=0, metavar="DOCUMENT", help="the first of them (default: %(default)s)")
    flags.add_argument("--tokens", type=int, default=256, metavar="COUNT", help="of each document at most (default: %(default)s)")
    flags.add_argument("--tokenizer", metavar="TOKENIZER", help="print text: tokenizer.json, .model, a folder with one of them, or bytes")
    flags.add_argument("--json", action="store_true", help="print one object a line")
    return flags


if __name__ == "__main__":
    sys.exit(main())
