"""Tiny transformers models of every family, saved as people save them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, MistralConfig, PreTrainedConfig

from sepllm.hf import SepLLMGPTNeoXConfig

VOCABULARY = 50
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 3,
    "eos_token_id": 4,
    "pad_token_id": 5,
}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
SEPLLM = {"separator_token_ids": [7, 8], "prefill_local_window_size": 4, "generate_local_window_size": 6, "init_tok_max_idx": 1, "rotary_pct": 0.25}


def neox(**changes: object) -> PreTrainedConfig:
    return GPTNeoXConfig(**SHAPE | {"hidden_act": "gelu_pytorch_tanh", "rope_parameters": ROPE | {"partial_rotary_factor": 0.25}} | changes)


def llama(**changes: object) -> PreTrainedConfig:
    return LlamaConfig(**SHAPE | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_parameters": ROPE} | changes)


def mistral(**changes: object) -> PreTrainedConfig:
    return MistralConfig(**SHAPE | {"num_key_value_heads": 2, "sliding_window": 9, "rope_parameters": ROPE} | changes)


def sepllm_neox(**changes: object) -> PreTrainedConfig:
    return SepLLMGPTNeoXConfig(**SHAPE | SEPLLM | {"use_parallel_residual": True} | changes)


SaveFolder = Callable[..., Path]


@pytest.fixture
def save_folder(tmp_path: Path) -> SaveFolder:
    """Saves a model of random weights (norms and biases too) as ``form``: safetensors, shards, bin or bin shards."""

    def save(config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32, form: str = "safetensors", name: str = "hf-in") -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        model = model.to(dtype)
        folder = tmp_path / name
        model.save_pretrained(folder, max_shard_size="20KB" if form == "shards" else "1GB")
        if form.startswith("bin"):
            (folder / "model.safetensors").unlink()
            write_pickles(model.state_dict(), folder, parts=3 if form == "bin shards" else 1)
        return folder

    return save


def write_pickles(state: dict[str, Tensor], folder: Path, *, parts: int) -> None:
    """pytorch_model.bin, with the buffers that old folders hold, whole or in parts with their index."""
    state = {name.replace("lm_head.", "embed_out.") if "gpt_neox.embed_in.weight" in state else name: value for name, value in state.items()}
    if any(".attention." in name for name in state):
        prefix = next(name for name in state if ".attention." in name).split(".attention.")[0]
        state |= {f"{prefix}.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool), f"{prefix}.attention.masked_bias": torch.tensor(-1e9)}
        state[f"{prefix}.attention.rotary_emb.inv_freq"] = torch.ones(4)
    if parts == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    place = {name: f"pytorch_model-{i % parts + 1:05}-of-{parts:05}.bin" for i, name in enumerate(state)}
    for file in set(place.values()):
        torch.save({name: value for name, value in state.items() if place[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
