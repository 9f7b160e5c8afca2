"""Tokens of a tokenizer file, and rows of the embedding for them. Reads no model and none of the tokenizer classes of the data package."""

from __future__ import annotations

import json
from pathlib import Path

from megatron.config.schema import TokenizerConfig

_CHARACTERS = 512
"""GPT-NeoX's CharLevelTokenizer."""
_JSON = ("HFTokenizer", "GPT2BPETokenizer")
"""Kinds whose `vocab_file` is JSON that holds every token."""


def vocabulary_size(tokenizer: TokenizerConfig) -> int | None:
    """Tokens, added ones included. None where the file is absent or its kind is not read here.

    Raises ValueError when the file is there and is no tokenizer.
    """
    if tokenizer.tokenizer_type == "CharLevelTokenizer":
        return _CHARACTERS
    path = Path(tokenizer.vocab_file) if tokenizer.vocab_file is not None else None
    if tokenizer.tokenizer_type not in _JSON or path is None or not path.is_file() or path.suffix != ".json":
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _size(content)
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"vocab_file {path} is not a tokenizer file ({error!r}): give a tokenizers JSON or a vocabulary JSON.") from error


def _size(content: dict[str, object]) -> int:
    """Distinct ids of a `tokenizers` file (its model's vocabulary and its added tokens), or the length of a plain GPT-2 vocabulary.

    Of GPT-2's own vocabulary `model` is a token.
    """
    if content and all(isinstance(token_id, int) for token_id in content.values()):
        return len(content)
    model, added = content["model"], content.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(added, list):
        raise TypeError("model is no mapping or added_tokens is no list")
    vocabulary = model["vocab"]
    ids = set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))
    return len(ids | {token["id"] for token in added})


def padded_vocab_size(vocab_size: int, divisible_by: int, model_parallel_size: int) -> int:
    """Rows of the embedding: the vocabulary, rounded up so that every tensor-parallel rank holds a multiple of ``divisible_by``."""
    multiple = divisible_by * model_parallel_size
    return -(-vocab_size // multiple) * multiple
