"""The run's tokenizer as a transformers tokenizer."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron.config.schema import TokenizerConfig
from megatron.data.tokenizer import END_OF_TEXT


def hf_tokenizer(config: TokenizerConfig, *, vocab_is_hf_tokenizer: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of the training data; `END_OF_TEXT` begins and ends a text.

    ``vocab_is_hf_tokenizer``: the vocabulary file is a folder (or a file in one) that a transformers tokenizer was saved to. So it is
    wherever tokenizer_config.json lies beside it.
    """
    if config.vocab_file is None or not Path(config.vocab_file).exists():
        raise ValueError(f"The tokenizer's vocab_file is {config.vocab_file}, which is not here: put it there, or give --no_save_tokenizer.")
    path = Path(config.vocab_file)
    folder = path if path.is_dir() else path.parent
    if vocab_is_hf_tokenizer or (folder / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    ends = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    if config.tokenizer_type == "HFTokenizer":
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
        if END_OF_TEXT not in tokenizer.get_vocab():
            raise ValueError(f"{path} has no token {END_OF_TEXT}: add it, or give --no_save_tokenizer.")
        return PreTrainedTokenizerFast(tokenizer_file=str(path), **ends)
    if config.tokenizer_type in ("GPT2BPETokenizer", "HFGPT2Tokenizer"):
        if config.merge_file is None or not Path(config.merge_file).exists():
            raise ValueError(f"The tokenizer's merge_file is {config.merge_file}, which is not here: put it there, or give --no_save_tokenizer.")
        return GPT2TokenizerFast(vocab=str(path), merges=config.merge_file, **ends)
    raise ValueError(f"A {config.tokenizer_type} has no counterpart in transformers: give --no_save_tokenizer.")
