"""The attention half of a block: one projection to queries, keys and values, `sepllm.attention`, one projection back."""

from __future__ import annotations

import math

from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.model.norms import make_norm
from megatron.model.passes import LayerPass, rotary_dims
from sepllm.attention import attend
from sepllm.ops.choice import Impl
from sepllm.ops.rotary import Heads, rotate_packed, split_packed
from sepllm.positions import apply_rotary, rotary_frequencies


class SelfAttention(nn.Module):
    """Attention of one layer over the keys that its pattern names.

    Rows of `query_key_value`, with H the head size:

        as many k/v heads as heads    head 0: q k v | head 1: q k v | ...     H rows each
        grouped heads                 q of all heads | k of all k/v heads | v of all k/v heads

    The second is GPT-NeoX's order since #1315; before that, and in the SepLLM fork, a group was ``q .. q k v``.
    """

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.attention_dropout = config.attention_dropout
        self.rotary_impl: Impl = "auto" if config.rope_fusion else "reference"
        self.score_divisor = max(1, layer) if config.apply_query_key_layer_scaling else 1
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        self.query_key_value = nn.Linear(config.hidden_size, rows, bias=config.use_bias_in_attn_linear)
        self.qk_layernorm = _make_qk_layernorm(config) if config.use_qk_layernorm else None
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias_in_attn_linear)
        if config.pos_emb == "rotary" and config.rotary_save_freqs_buffer:
            self.rotary_emb = SavedFrequencies(config)

    def forward(self, hidden_BTD: Tensor, shared: LayerPass) -> Tensor:
        q_BTNH, k_BTKH, v_BTKH = self._heads(self.query_key_value(hidden_BTD), shared.rotary)
        if shared.cache is not None:
            k_BSKH, v_BSKH = shared.cache.append(self.layer, k_BTKH, v_BTKH)
        else:
            k_BSKH, v_BSKH = k_BTKH, v_BTKH
        return self.dense(self._attend(q_BTNH, k_BSKH, v_BSKH, shared).flatten(2))

    def _attend(self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, shared: LayerPass) -> Tensor:
        """Query-key layer scaling divides the product of q and k by the layer's number, so that it fits fp16, and undoes it after."""
        scale = 1 / math.sqrt(self.head_size)
        if self.score_divisor > 1:
            q_BTNH, scale = q_BTNH * (scale / self.score_divisor), float(self.score_divisor)
        return attend(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            shared.ranges,
            scale=scale,
            core=shared.core,
            softmax=shared.softmax,
            bias=shared.bias,
            dropout=self.attention_dropout if self.training else 0.0,
        )

    def _heads(self, packed: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Heads:
        """Queries, keys and values, ``[B, T, heads, H]``, normed and rotated; ``packed`` is given up."""
        num_heads, num_kv_heads, head_size = self.num_heads, self.num_kv_heads, self.head_size
        if rotary is not None and self.qk_layernorm is None:
            return rotate_packed(packed, *rotary, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, impl=self.rotary_impl)
        q, k, v = split_packed(packed, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size)
        if self.qk_layernorm is not None:
            q, k = self.qk_layernorm(q), self.qk_layernorm(k)
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        return Heads(q, k, v)


class SavedFrequencies(nn.Module):
    """Puts `inv_freq` into checkpoints, as GPT-NeoX did until 2023 (`rotary_save_freqs_buffer`). Nothing is read back from it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rotary_dims, self.base = rotary_dims(config), config.rotary_emb_base

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "inv_freq"] = rotary_frequencies(self.rotary_dims, base=self.base, device="cpu")

    def _load_from_state_dict(self, *_: object) -> None:
        pass


def _make_qk_layernorm(config: ModelConfig) -> nn.Module:
    """One norm for queries and keys, over all heads at once, as in GPT-NeoX."""
    if config.num_kv_heads != config.num_attention_heads:
        raise ValueError(
            f"use_qk_layernorm is one norm over all heads of q and of k, but there are {config.num_attention_heads} heads and num_kv_heads is "
            f"{config.num_kv_heads}: leave num_kv_heads out, or use_qk_layernorm off."
        )
    return make_norm(config.norm, (config.num_attention_heads, config.hidden_size // config.num_attention_heads), epsilon=config.norm_epsilon)
