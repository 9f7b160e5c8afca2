"""A tokenizer without files: token 0 ends a text, and pads; every other one is a byte."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = 0


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """257 tokens."""
    words = {"<end>": END} | {byte: place for place, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
    of_bytes = Tokenizer(models.BPE(vocab=words, merges=[]))
    of_bytes.pre_tokenizer, of_bytes.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=of_bytes, eos_token="<end>", pad_token="<end>")
