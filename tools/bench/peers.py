"""Other frameworks' GPT-NeoX: transformers' and litgpt's, of the same shape, with this project's weights and their own losses.

Both compute what `full` computes, so their losses and gradients must agree with it. What each one does as its own trainer does it:
transformers without a key-value cache (`use_cache` is False in its TrainingArguments) and with the loss inside its forward; litgpt with its
`chunked_cross_entropy`. In bf16 both trainers autocast over float32 weights (the arms `..._autocast`), and litgpt's compiles its model
(`litgpt_compiled`); the plain arms have the dtypes that this project has.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from megatron.config.schema import Config, ModelConfig
from megatron.model.gpt import build_model
from sepllm.pattern import AttentionPattern
from tools.bench.arms import Arm, Contender, Framework
from tools.ckpts.hf_config import SpecialTokens, hf_config
from tools.ckpts.mapping import FIRST_BLOCK, neox_to_hf

INSTALL = "pip install --no-deps -r requirements/bench.txt"
NEEDS: dict[Framework, tuple[str, ...]] = {"ours": (), "transformers": ("transformers",), "litgpt": ("litgpt", "lightning", "torchmetrics")}
INSTALLED_BY = {"transformers": "pip install -r requirements/train.txt", "litgpt": INSTALL}


def absence(framework: Framework) -> str | None:
    """Why the framework cannot be compared with here, and what to do; None where it is installed."""
    missing = [name for name in NEEDS[framework] if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)}: not installed; {INSTALLED_BY[framework]}" if missing else None


def build_peer(arm: Arm, config: Config, device: torch.device) -> Contender:
    """The peer's model with the weights that this project's has at its start."""
    ours = build_model(config, device="cpu")
    weights = {name: value.detach() for name, value in ours.state_dict().items()}
    peer = _BUILDERS[arm.framework](config, weights)
    peer.module.to(device).train()
    return peer


class Transformers:
    """GPTNeoXForCausalLM with torch's attention."""

    def __init__(self, config: Config, weights: Mapping[str, Tensor]) -> None:
        from transformers import GPTNeoXForCausalLM

        rows = config.model.padded_vocab_size
        assert rows is not None
        plain = config.model_copy(update={"attention": config.attention.model_copy(update=_full_attention(config))})
        shape = hf_config(plain, architecture="neox", vocab_rows=rows, tokens=SpecialTokens(bos=None, eos=None, pad=None))
        shape._attn_implementation = "sdpa"
        self.module = cast(nn.Module, GPTNeoXForCausalLM(shape)).to(_dtype(weights))
        self.module.load_state_dict(neox_to_hf(weights, config.model, architecture="neox"))

    def loss(self, run: nn.Module, text: Tensor) -> Tensor:
        """The labels are given shifted, so that the last token's counts too."""
        ids, labels = _split(text, self.module)
        return run(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss

    def attention_gradient(self) -> Tensor:
        gradient = self.module.get_parameter("gpt_neox.layers.0.attention.query_key_value.weight").grad
        assert gradient is not None
        return gradient


class LitGPT:
    """litgpt's GPT in the shape of its Pythia configurations."""

    def __init__(self, config: Config, weights: Mapping[str, Tensor]) -> None:
        litgpt = importlib.import_module("litgpt")  # optional, so type checkers do not see it
        self.heads = config.model.num_attention_heads
        self._cross_entropy = importlib.import_module("litgpt.utils").chunked_cross_entropy
        self.module = cast(nn.Module, litgpt.GPT(litgpt.Config(**litgpt_shape(config.model)))).to(_dtype(weights))
        self.module.load_state_dict(litgpt_weights(weights, config.model))

    def loss(self, run: nn.Module, text: Tensor) -> Tensor:
        """Logits leave the model in float32, as its trainer's precision plugin has it."""
        ids, labels = _split(text, self.module)
        logits: Tensor = run(ids)
        return self._cross_entropy(logits.float(), labels)

    def attention_gradient(self) -> Tensor:
        gradient = self.module.get_parameter("transformer.h.0.attn.qkv.weight").grad
        assert gradient is not None
        return gradient.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)


def litgpt_shape(model: ModelConfig) -> dict[str, object]:
    """Members of litgpt's Config for a Pythia model."""
    return {
        "name": "pythia",
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "block_size": model.seq_length,
        "padded_vocab_size": model.padded_vocab_size,
        "vocab_size": model.padded_vocab_size,
        "intermediate_size": model.intermediate_size,
        "norm_eps": model.norm_epsilon,
        "rotary_percentage": model.rotary_pct,
        "rope_base": model.rotary_emb_base,
        "parallel_residual": model.gpt_j_residual,
        "gelu_approximate": {"gelu": "none", "gelu_tanh": "tanh"}[model.activation],
        "mlp_class_name": "GptNeoxMLP",
        "norm_class_name": "LayerNorm",
        "bias": True,
        "lm_head_bias": False,
    }


def litgpt_weights(weights: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """This project's state dict under litgpt's names. Its rows of qkv are all queries, all keys, all values."""
    return {_litgpt_name(name, model): _litgpt_rows(name, value, model) for name, value in weights.items()}


def _litgpt_name(name: str, model: ModelConfig) -> str:
    match = re.fullmatch(r"sequential\.(\d+)\.(.+)\.(weight|bias)", name)
    assert match is not None, name
    place, layer, kind = int(match[1]), match[2], match[3]
    ends = {0: "transformer.wte", model.num_layers + 3: "transformer.ln_f", model.num_layers + 4: "lm_head"}
    if place in ends:
        return f"{ends[place]}.{kind}"
    return f"transformer.h.{place - FIRST_BLOCK}.{_LITGPT_LAYERS[layer]}.{kind}"


_LITGPT_LAYERS = {
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
    "attention.query_key_value": "attn.qkv",
    "attention.dense": "attn.proj",
    "mlp.linear1": "mlp.fc",
    "mlp.linear2": "mlp.proj",
}


def _litgpt_rows(name: str, value: Tensor, model: ModelConfig) -> Tensor:
    if ".attention.query_key_value." not in name:
        return value
    return value.unflatten(0, (model.num_attention_heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def _full_attention(config: Config) -> dict[str, object]:
    """transformers' GPT-NeoX has no other attention."""
    full = AttentionPattern.full(config.model.num_layers)
    return {"mode": "full", "prefill": full, "decode": full}


def _split(text: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Inputs and the token after each, on the module's device."""
    text = text.to(next(module.parameters()).device)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def _dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    return next(iter(weights.values())).dtype


_BUILDERS: dict[Framework, Callable[[Config, Mapping[str, Tensor]], Contender]] = {"transformers": Transformers, "litgpt": LitGPT}
