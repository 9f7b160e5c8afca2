"""A byte-level BPE like GPT-NeoX's, learned from text: a tokenizer.json for HFTokenizer.

    prepare_data.py train-tokenizer --input texts/ --vocab-size 32768 --output data/tokenizer.json

<|endoftext|> is token 0 and <|padding|> token 1; runs of 2 to 24 blanks are the last tokens, for code. The vocabulary may come out smaller
than asked where the text has no more to merge.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron.data.tokenizer import END_OF_TEXT, HFTokenizer, find_separator_ids
from tools.command import exit_status
from tools.datasets.documents import find_sources, read_documents

PADDING = "<|padding|>"
SPACE_RUNS = range(24, 1, -1)
"""Lengths of the runs of blanks that are tokens, in GPT-NeoX's order."""
SMALLEST = 2 + 256 + len(SPACE_RUNS)


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: train_from_flags(argv))


def train_from_flags(argv: Sequence[str] | None) -> None:
    options = _parser().parse_args(argv)
    if options.vocab_size < SMALLEST:
        raise ValueError(f"--vocab-size is {options.vocab_size}: bytes, special tokens and runs of blanks alone are {SMALLEST}.")
    sources = find_sources(options.input.split(","))
    texts = (text for source in sources for texts in read_documents(source, options.jsonl_keys) for text in texts)
    tokenizer = train_like_neox(texts, options.vocab_size)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    part = options.output.with_name(f"{options.output.name}.part")
    tokenizer.save(str(part))
    part.replace(options.output)
    separators = find_separator_ids(HFTokenizer.from_file(options.output))
    print(f"{options.output}: {tokenizer.get_vocab_size()} tokens; separator_token_ids: {separators}")


def train_like_neox(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """GPT-NeoX's kind of tokenizer of at most ``vocab_size`` tokens."""
    tokenizer = train_byte_level_bpe(texts, vocab_size - len(SPACE_RUNS), special_tokens=[END_OF_TEXT, PADDING], normalizer=normalizers.NFC())
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    tokenizer.add_tokens([AddedToken(" " * length, normalized=True) for length in SPACE_RUNS])
    return tokenizer


def train_byte_level_bpe(
    texts: Iterable[str], vocab_size: int, *, special_tokens: Sequence[str], normalizer: normalizers.Normalizer | None = None
) -> Tokenizer:
    """A byte-level BPE; the special tokens are its first."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(special_tokens), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="tools.datasets.train_tokenizer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--input", required=True, help="as prepare_data.py takes it")
    flags.add_argument("--jsonl-keys", nargs="+", default=["text"], help="fields to learn from (default: text)")
    flags.add_argument("--vocab-size", type=int, default=50277, help="at most this many tokens, all counted (default: %(default)s)")
    flags.add_argument("--output", type=Path, required=True, help="the tokenizer.json to write")
    return flags


if __name__ == "__main__":
    sys.exit(main())
