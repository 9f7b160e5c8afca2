"""Instructions and answers to a pair of token files and a pair of label files, so that only the answers are learned.

    python -m tools.datasets.instructions --input pairs.jsonl --tokenizer-type HFTokenizer --vocab-file tokenizer.json --output-prefix data/mine

writes <prefix>_text_document (each prompt, its answer, the end of document) for `train_data_paths` and <prefix>_label_document, as many
numbers, for `train_label_data_paths`: the token itself where it is to be learned, -100 on prompts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from megatron.config.schema import TokenizerConfig
from megatron.data.gpt_dataset import IGNORED_LABEL
from megatron.data.indexed import IndexedDatasetWriter, best_dtype
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from tools.command import exit_status
from tools.datasets.documents import find_sources, read_documents


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What the two pairs hold."""

    examples: int
    tokens: int
    learned: int
    """Tokens of answers, ends of documents included."""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    config = TokenizerConfig(tokenizer_type=options.tokenizer_type, vocab_file=options.vocab_file, merge_file=options.merge_file)

    def write() -> None:
        keys = (options.prompt_key, options.answer_key)
        sources = find_sources(options.input.split(","))
        pairs = ((prompt, answer) for source in sources for prompt, answer in read_documents(source, keys))
        written = write_examples(pairs, build_tokenizer(config), options.output_prefix)
        print(f"{options.output_prefix}: {written.examples} examples, {written.tokens} tokens, {written.learned} of them to be learned")

    return exit_status(write)


def write_examples(pairs: Iterable[tuple[str, str]], tokenizer: Tokenizer, output_prefix: str) -> Written:
    """Writes both pairs of files. Every example is a document of its own."""
    examples = tokens = learned = 0
    with ExitStack() as stack:
        text = stack.enter_context(IndexedDatasetWriter(f"{output_prefix}_text_document", best_dtype(tokenizer.vocab_size)))
        label = stack.enter_context(IndexedDatasetWriter(f"{output_prefix}_label_document", np.dtype("<i4")))
        for prompt, answer in pairs:
            asked, answered = tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.eod_id]
            text.add_document([*asked, *answered])
            label.add_document([*[IGNORED_LABEL] * len(asked), *answered])
            examples, tokens, learned = examples + 1, tokens + len(asked) + len(answered), learned + len(answered)
    return Written(examples=examples, tokens=tokens, learned=learned)


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="tools.datasets.instructions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--input", required=True, help="as prepare_data.py takes it")
    flags.add_argument("--prompt-key", default="prompt", help="field of what is asked (default: prompt)")
    flags.add_argument("--answer-key", default="answer", help="field of what is to be learned (default: answer)")
    flags.add_argument("--tokenizer-type", required=True)
    flags.add_argument("--vocab-file")
    flags.add_argument("--merge-file")
    flags.add_argument("--output-prefix", required=True)
    return flags


if __name__ == "__main__":
    sys.exit(main())
