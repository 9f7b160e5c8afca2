"""The model of a folder, ready to be attached to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sepllm.hf import SepLLMGPTNeoXForCausalLM
from sepllm.hf.separators import PRESETS, preset, separators_of
from sepllm.pattern import Standard

BEGINNING_OF_LLAMA_3 = 128000
"""Counts as a separator in the reference's SepCache, but not in its streaming."""

SHARED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "max_position_embeddings"),
    *("rope_parameters", "use_parallel_residual", "tie_word_embeddings", "layer_norm_eps", "initializer_range", "bos_token_id", "eos_token_id"),
)
"""Fields of configurations that sepllm_gpt_neox and GPT-NeoX both have."""


def load(name: str, *, dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer of a folder or a name on the hub. A ``sepllm_gpt_neox`` model comes as GPT-NeoX with its weights."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    if isinstance(model, SepLLMGPTNeoXForCausalLM):
        model = as_gpt_neox(model)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name)


def as_gpt_neox(trained: SepLLMGPTNeoXForCausalLM) -> GPTNeoXForCausalLM:
    """GPT-NeoX with the same weights, which reads everything: in a stream the cache says what there is to read."""
    config = trained.config
    wrong = [
        reason
        for is_so, reason in (
            (config.pos_emb != "rotary", f"its positions are {config.pos_emb}"),
            (config.USE_BiPE, "it has bilevel positions (USE_BiPE)"),
            (not isinstance(config.prefill_pattern().softmax, Standard), "its softmax is self-adjusting"),
            (config.sliding_window_width is not None, "it has a sliding_window_width"),
        )
        if is_so
    ]
    if wrong:
        raise ValueError(f"This sepllm_gpt_neox model cannot be streamed: {', '.join(wrong)}. Positions in the cache need plain rotary GPT-NeoX.")
    plain = GPTNeoXForCausalLM(GPTNeoXConfig(**{name: getattr(config, name) for name in SHARED}))
    weights = {
        name.replace("sepllm_gpt_neox.", "gpt_neox.").replace("embed_out.", "lm_head."): weight for name, weight in trained.state_dict().items()
    }
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    return plain


def separator_ids(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Those that ``--separators`` names: "tokenizer", a family of models (the reference's list), or ids."""
    if list(words) == ["tokenizer"]:
        return separators_of(tokenizer).ids
    if len(words) == 1 and words[0] in PRESETS:
        return tuple(number for number in preset(words[0]).ids if number != BEGINNING_OF_LLAMA_3)
    if not words or not all(word.isdecimal() for word in words):
        raise ValueError(f"--separators {' '.join(words)}: give tokenizer, one of {', '.join(PRESETS)}, or token ids.")
    return tuple(int(word) for word in words)
