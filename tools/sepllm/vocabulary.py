"""Any tokenizer by its file, folder or name. Other than in a run, it need not have a token that ends a document."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.schema import TokenizerConfig
from megatron.data.tokenizer import END_OF_TEXT, HFTokenizer, Tokenizer, build_tokenizer

if TYPE_CHECKING:
    import tokenizers

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""What is looked for in a folder, in this order."""


def open_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer that ``source`` names.

    A ``tokenizer.json``; a SentencePiece ``.model``; a ``vocab.json`` with ``merges.txt`` beside it; a folder that holds one of them;
    ``bytes`` for one token a byte; or an encoding of tiktoken.
    """
    path = Path(source)
    if path.is_dir():
        path = next((path / name for name in FILES if (path / name).is_file()), path)
        if path.is_dir():
            raise ValueError(f"{source} holds no tokenizer: one of {', '.join(FILES)} must be in the folder.")
    if path.name == "vocab.json" and path.with_name("merges.txt").is_file():
        return _of_type("GPT2BPETokenizer", vocab_file=str(path), merge_file=str(path.with_name("merges.txt")))
    if path.suffix == ".json":
        return _AnyHFTokenizer.from_file(path)
    if path.suffix == ".model":
        return _of_type("SPMTokenizer", vocab_file=str(path))
    if str(source) == "bytes":
        return _of_type("CharLevelTokenizer")
    if path.exists():
        raise ValueError(f"{source} is no tokenizer that is known by its name: give a tokenizer.json, a .model, or a folder with one of them.")
    return _of_type("TiktokenTokenizer", vocab_file=str(source))


def readable(text: str) -> str:
    """A token's text for a table or an axis: blanks and line ends as signs; a blank before a word is left out."""
    if text.startswith(" ") and text[1:].isalnum():
        text = text[1:]
    for sign, shown in ((" ", "\u2423"), ("\n", "\\n"), ("\t", "\\t"), ("\r", "\\r")):
        text = text.replace(sign, shown)
    return text


class _AnyHFTokenizer(HFTokenizer):
    """A `tokenizer.json` as it is; `eod_id` is -1 where nothing ends a document."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, source: str, other_end: str | None = None) -> None:
        self._tokenizer = tokenizer
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        ends = (tokenizer.token_to_id(text) for text in (END_OF_TEXT, other_end) if text is not None)
        self.eod_id: int = next((end for end in ends if end is not None), -1)


def _of_type(tokenizer_type: str, *, vocab_file: str | None = None, merge_file: str | None = None) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(tokenizer_type=tokenizer_type, vocab_file=vocab_file, merge_file=merge_file))
