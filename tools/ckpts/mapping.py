"""Names and layouts: the training model's tensors as those of a transformers model."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from megatron.config.schema import ModelConfig

FIRST_BLOCK = 2
NEOX_PREFIXES = {"sepllm_gpt_neox": ("sepllm_gpt_neox", "embed_out"), "neox": ("gpt_neox", "lm_head")}
"""Of each architecture: what stands before the blocks' names, and what the output matrix is called."""


def neox_to_hf(state: Mapping[str, Tensor], model: ModelConfig, *, architecture: str = "sepllm_gpt_neox") -> dict[str, Tensor]:
    """The state dict of the transformers model that computes the same. Keys of ``state`` are ``sequential.N.<name>``.

    With tied embeddings there is no output matrix. Rows of query_key_value are per head ``q k v`` in both worlds.
    """
    named = _neox if architecture in NEOX_PREFIXES else _llama
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        match = re.fullmatch(r"sequential\.(\d+)\.(.+)", key)
        if match is None:
            raise ValueError(f"{key} is not a weight of a GPT-NeoX model: its name must be sequential.N.<name>.")
        converted |= named(int(match[1]), match[2], value, model, architecture)
    return converted


def _neox(place: int, name: str, value: Tensor, model: ModelConfig, architecture: str) -> dict[str, Tensor]:
    prefix, output = NEOX_PREFIXES[architecture]
    ends = {
        (0, "word_embeddings.weight"): f"{prefix}.embed_in.weight",
        (0, "position_embeddings.weight"): f"{prefix}.position_embeddings.weight",
        (model.num_layers + 3, "norm.weight"): f"{prefix}.final_layer_norm.weight",
        (model.num_layers + 3, "norm.bias"): f"{prefix}.final_layer_norm.bias",
        (model.num_layers + 4, "final_linear.weight"): f"{output}.weight",
    }
    block = _block(place, model)
    if block is None:
        return {_known(ends, place, name): value}
    name = name.replace("mlp.linear1.", "mlp.dense_h_to_4h.").replace("mlp.linear2.", "mlp.dense_4h_to_h.")
    return {f"{prefix}.layers.{block}.{name}": value}


def _llama(place: int, name: str, value: Tensor, model: ModelConfig, architecture: str) -> dict[str, Tensor]:
    ends = {
        (0, "word_embeddings.weight"): "model.embed_tokens.weight",
        (model.num_layers + 3, "norm.scale"): "model.norm.weight",
        (model.num_layers + 4, "final_linear.weight"): "lm_head.weight",
    }
    block = _block(place, model)
    if block is None:
        return {_known(ends, place, name): value}
    prefix = f"model.layers.{block}."
    if name == "attention.query_key_value.weight":
        return {f"{prefix}self_attn.{kind}_proj.weight": part for kind, part in zip("qkv", _split_qkv(value, model), strict=True)}
    if name == "mlp.linear1.weight":
        return {f"{prefix}mlp.{kind}_proj.weight": part.contiguous() for kind, part in zip(("up", "gate"), value.chunk(2), strict=True)}
    names = {
        "input_layernorm.scale": "input_layernorm.weight",
        "post_attention_layernorm.scale": "post_attention_layernorm.weight",
        "attention.dense.weight": "self_attn.o_proj.weight",
        "mlp.linear2.weight": "mlp.down_proj.weight",
    }
    if name not in names:
        raise ValueError(f"Layer {block} has {name}, for which {architecture} has no place.")
    return {prefix + names[name]: value}


def _split_qkv(value: Tensor, model: ModelConfig) -> list[Tensor]:
    """Rows of all queries, of all keys, of all values."""
    heads, groups = model.num_attention_heads, model.num_kv_heads
    head_size = model.hidden_size // heads
    if heads == groups:
        return [part.flatten(0, 1).contiguous() for part in value.unflatten(0, (heads, 3, head_size)).unbind(1)]
    return [part.contiguous() for part in value.split([heads * head_size, groups * head_size, groups * head_size])]


def _block(place: int, model: ModelConfig) -> int | None:
    """Index of the block at this place of the layer list, None for the other layers."""
    return place - FIRST_BLOCK if FIRST_BLOCK <= place < FIRST_BLOCK + model.num_layers else None


def _known(names: Mapping[tuple[int, str], str], place: int, name: str) -> str:
    if (place, name) not in names:
        raise ValueError(f"sequential.{place}.{name} has no place in the model: num_layers may not be that of the checkpoint.")
    return names[place, name]
