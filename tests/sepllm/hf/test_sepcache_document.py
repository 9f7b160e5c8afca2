"""The page about SepCache and attaching says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAGE = (Path(__file__).parents[3] / "docs" / "sepcache.md").read_text(encoding="utf-8")


def test_the_python_of_the_page_generates_from_a_small_cache() -> None:
    torch.manual_seed(0)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    words = {"<end>": 0, ".": 1, ",": 2} | {f"w{number}": number for number in range(3, 30)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<end>")), eos_token="<end>")
    config = LlamaConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, eos_token_id=None)
    names: dict[str, object] = {
        "model": LlamaForCausalLM(config).eval(),
        "tokenizer": tokenizer,
        "separator_ids": (1, 2),
        "inputs": {"input_ids": torch.randint(3, 30, (1, 20)), "attention_mask": torch.ones(1, 20, dtype=torch.long)},
    }
    exec(code, names)
    text, cache, share = names["text"], names["cache"], names["share"]
    assert isinstance(text, torch.Tensor)
    assert text.shape == (1, 620)
    assert cache.get_usable_length() < 512  # type: ignore[attr-defined]
    assert isinstance(share, float)
    assert share < 1
