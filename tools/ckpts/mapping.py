"""Names and layouts: the training model's tensors as those of a transformers model, and back, bit for bit.

sequential.N.attention.query_key_value   one tensor in GPT-NeoX, q_proj k_proj v_proj in Llama
sequential.N.mlp.linear1                 the same tensor in GPT-NeoX; ``[up ; gate]``, so up_proj gate_proj, in Llama
everything else                          one tensor in both worlds
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from megatron.config.schema import ModelConfig

FIRST_BLOCK = 2
NEOX_PREFIXES = {"sepllm_gpt_neox": ("sepllm_gpt_neox", "embed_out"), "neox": ("gpt_neox", "lm_head")}
"""Of each architecture: what stands before the blocks' names, and what the output matrix is called."""
_BUFFERS = re.compile(r"\.attention\.(bias|masked_bias)$|rotary_emb\.inv_freq$")
"""What folders of older transformers hold beside the weights."""
_LLAMA_NAMES = {
    "input_layernorm.scale": ("input_layernorm.weight",),
    "post_attention_layernorm.scale": ("post_attention_layernorm.weight",),
    "attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.linear1": ("mlp.up_proj", "mlp.gate_proj"),
    "mlp.linear2": ("mlp.down_proj",),
}


def neox_to_hf(state: Mapping[str, Tensor], model: ModelConfig, *, architecture: str = "sepllm_gpt_neox") -> dict[str, Tensor]:
    """The state dict of the transformers model that computes the same. Keys of ``state`` are ``sequential.N.<name>``.

    With tied embeddings there is no output matrix.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        names = hf_names(key, model, architecture=architecture)
        converted |= zip(names, _unpacked(key, value, model, count=len(names)), strict=True)
    return converted


def hf_to_neox(state: Mapping[str, Tensor], model: ModelConfig, keys: Iterable[str], *, architecture: str) -> dict[str, Tensor]:
    """The weights ``keys`` of the training model, ``sequential.N.<name>``, out of a transformers state dict.

    ValueError where it lacks some of them, or holds others. Tied embeddings may be there twice if both are the same.
    """
    left = _without_buffers(state, model, architecture=architecture)
    converted: dict[str, Tensor] = {}
    lacking: list[str] = []
    for key in keys:
        names = hf_names(key, model, architecture=architecture)
        lacking += [name for name in names if name not in left]
        if not lacking:
            converted[key] = _packed(key, [left.pop(name) for name in names], model)
    if lacking:
        raise ValueError(f"The folder's weights lack {_some(lacking)}: it is not a whole model of its config.json.")
    if left:
        raise ValueError(f"The folder's weights also hold {_some(sorted(left))}, for which the training model has no place.")
    return converted


def hf_names(key: str, model: ModelConfig, *, architecture: str) -> tuple[str, ...]:
    """What the architecture calls the training model's tensor ``key``; several names where it keeps the parts of the tensor apart."""
    match = re.fullmatch(r"sequential\.(\d+)\.(.+)", key)
    if match is None:
        raise ValueError(f"{key} is not a weight of a GPT-NeoX model: its name must be sequential.N.<name>.")
    place, name = int(match[1]), match[2]
    is_neox = architecture in NEOX_PREFIXES
    if FIRST_BLOCK <= place < FIRST_BLOCK + model.num_layers:
        block = place - FIRST_BLOCK
        return _neox_block_names(name, block, architecture) if is_neox else _llama_block_names(name, block, architecture)
    ends = _neox_ends(model, architecture) if is_neox else _llama_ends(model)
    if (place, name) not in ends:
        raise ValueError(f"{key} has no place in the model: num_layers may not be that of the checkpoint.")
    return (ends[place, name],)


def _neox_ends(model: ModelConfig, architecture: str) -> dict[tuple[int, str], str]:
    prefix, output = NEOX_PREFIXES[architecture]
    return {
        (0, "word_embeddings.weight"): f"{prefix}.embed_in.weight",
        (0, "position_embeddings.weight"): f"{prefix}.position_embeddings.weight",
        (model.num_layers + 3, "norm.weight"): f"{prefix}.final_layer_norm.weight",
        (model.num_layers + 3, "norm.bias"): f"{prefix}.final_layer_norm.bias",
        (model.num_layers + 4, "final_linear.weight"): f"{output}.weight",
    }


def _llama_ends(model: ModelConfig) -> dict[tuple[int, str], str]:
    return {
        (0, "word_embeddings.weight"): "model.embed_tokens.weight",
        (model.num_layers + 3, "norm.scale"): "model.norm.weight",
        (model.num_layers + 4, "final_linear.weight"): "lm_head.weight",
    }


def _neox_block_names(name: str, block: int, architecture: str) -> tuple[str, ...]:
    name = name.replace("mlp.linear1.", "mlp.dense_h_to_4h.").replace("mlp.linear2.", "mlp.dense_4h_to_h.")
    return (f"{NEOX_PREFIXES[architecture][0]}.layers.{block}.{name}",)


def _llama_block_names(name: str, block: int, architecture: str) -> tuple[str, ...]:
    stem, _, kind = name.rpartition(".")
    if name in _LLAMA_NAMES:
        return tuple(f"model.layers.{block}.{own}" for own in _LLAMA_NAMES[name])
    if stem not in _LLAMA_NAMES:
        raise ValueError(f"Layer {block} has {name}, for which {architecture} has no place.")
    return tuple(f"model.layers.{block}.{own}.{kind}" for own in _LLAMA_NAMES[stem])


def _unpacked(key: str, value: Tensor, model: ModelConfig, *, count: int) -> list[Tensor]:
    """The parts that have names of their own."""
    if count == 1:
        return [value]
    if ".mlp.linear1." in key:
        return [part.contiguous() for part in value.chunk(2)]
    heads, groups = model.num_attention_heads, model.num_kv_heads
    head_size = model.hidden_size // heads
    if heads == groups:
        return [part.flatten(0, 1).contiguous() for part in value.unflatten(0, (heads, 3, head_size)).unbind(1)]
    return [part.contiguous() for part in value.split([heads * head_size, groups * head_size, groups * head_size])]


def _packed(key: str, parts: list[Tensor], model: ModelConfig) -> Tensor:
    """The inverse of `_unpacked`."""
    if len(parts) == 1:
        return parts[0]
    if ".mlp.linear1." in key or model.num_attention_heads != model.num_kv_heads:
        return torch.cat(parts)
    return torch.stack([part.unflatten(0, (model.num_attention_heads, -1)) for part in parts], 1).flatten(0, 2)


def _without_buffers(state: Mapping[str, Tensor], model: ModelConfig, *, architecture: str) -> dict[str, Tensor]:
    """The weights alone, the output matrix under its name of today, or left out where it is the embedding once more."""
    (embedding,) = hf_names("sequential.0.word_embeddings.weight", model, architecture=architecture)
    (output,) = hf_names(f"sequential.{model.num_layers + 4}.final_linear.weight", model, architecture=architecture)
    other = "lm_head.weight" if output == "embed_out.weight" else "embed_out.weight"
    left = {output if name == other else name: value for name, value in state.items() if not _BUFFERS.search(name)}
    if not model.no_weight_tying and output in left:
        if embedding in left and not torch.equal(left[embedding], left[output]):
            raise ValueError(f"tie_word_embeddings is true in the folder's config.json, but {output} differs from {embedding}: set it to false.")
        del left[output]
    return left


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
